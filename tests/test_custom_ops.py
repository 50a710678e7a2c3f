"""Models with operators of their own: --custom-ops gives every session the library, and such nodes stay float."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import qdq_surgeon
from qdq_surgeon.cli import insert_main, main
from qdq_surgeon.errors import ModelError, QdqError
from qdq_surgeon.existing import strip_pairs
from qdq_surgeon.report.explain import explain
from tests.graphs import model

TEXT = """g (float[N,64] x) => (float[N,64] y) <float[64,64] w, float[64,64] v> {
    m = MatMul(x, w)
    r = Relu(m)
    y = MatMul(r, v)
}"""

NOTES_EVERY_CALL = """
#include <stdio.h>
#include <stdlib.h>
void *RegisterCustomOps(void *options, const void *api) {
    FILE *file = fopen(getenv("CALLS"), "a");
    fputs("called\\n", file);
    fclose(file);
    return 0;
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    onnx.save(model(TEXT), "model.onnx")
    np.savez("data.npz", x=np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32))
    return tmp_path


@pytest.fixture
def library(folder) -> Path:
    """A library that registers nothing and notes that it was asked."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here to make a library of custom ops with")
    Path("ops.c").write_text(NOTES_EVERY_CALL)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "ops.so", "ops.c"], check=True)
    return folder / "ops.so"


@pytest.fixture
def operators(folder) -> Path:
    """A library with mine::Twice, and mine::IsPositive, which gives INT64: shape inference knows neither."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here to make a library of custom ops with")
    source = Path(__file__).with_name("custom_ops.c")
    subprocess.run([compiler, "-std=gnu11", "-shared", "-fPIC", "-o", "ops.so", str(source)], check=True)
    return folder / "ops.so"


WITH_OPERATORS = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
g (float[N,64] x, bool c) => (float[N,64] y) <float[64,64] w, float[64,64] v> {
    m = MatMul(x, w)
    d = mine.Twice(m)
    k = mine.IsPositive(m)
    t = If (c) <
        then_branch = yes () => (float[N,64] e) { f = Cast<to=1>(k) e = MatMul(f, v) },
        else_branch = no () => (float[N,64] h) { h = MatMul(d, v) }
    >
    y = MatMul(t, w)
}"""


def test_operators_of_ones_own_run_through_the_whole_line(operators):
    """What stands around them is measured and quantized, also in bodies that capture what they make."""
    draw = np.random.default_rng(0).standard_normal
    samples = [{"x": draw((4, 64)).astype(np.float32), "c": np.array(index % 2 == 0)} for index in range(8)]
    loaded = qdq_surgeon.load(model(WITH_OPERATORS), custom_ops=[operators])
    assert loaded.graph.notes == ("2 nodes of the domain mine left float: only ONNX's own operators are planned",)
    statistics = qdq_surgeon.calibrate(loaded, qdq_surgeon.plan(loaded), samples).tensors
    w = numpy_helper.to_array(loaded.proto.graph.initializer[0])
    doubled = np.concatenate([2 * sample["x"] @ w for sample in samples if not sample["c"]])
    assert statistics["d"].maximum == pytest.approx(np.max([2 * sample["x"] @ w for sample in samples]), rel=1e-4)
    assert statistics["d"].count == 2 * doubled.size
    assert (statistics["t.then_branch/f"].minimum, statistics["t.then_branch/f"].maximum) == (0, 1)
    result = qdq_surgeon.quantize(loaded, samples)
    assert {edge.reader for site in result.plan.sites for edge in site.edges} == {"m", "e", "h", "y"}
    assert result.comparison.sqnr > 20


def test_the_plan_and_the_insertion_say_what_stays_float(folder, capsys):
    onnx.save(model(FUNCTION), "model.onnx")
    line = "note: 1 node of the domain own left float: only ONNX's own operators are planned"
    for arguments in (["--plan"], ["--data", "data.npz"]):
        assert insert_main(["model.onnx", *arguments]) == 0
        assert line in capsys.readouterr().out.splitlines()


FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[N,64] x) => (float[N,64] y) <float[64,64] w> { a = own.lin(x, w) y = Relu(a) }
<domain: "own", opset_import: ["" : 17]> lin (p, w) => (r) { r = MatMul(p, w) }"""


def test_a_function_runs_and_what_stands_around_it_is_quantized():
    proto = model(FUNCTION.replace("y = Relu(a)", "y = MatMul(a, w)"))
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    result = qdq_surgeon.quantize(proto, {"x": x})
    assert {edge.reader for site in result.plan.sites for edge in site.edges} == {"y"}
    assert result.comparison.sqnr > 25
    assert strip_pairs(result.model) == proto


def test_pairs_inside_a_function_are_named_because_they_are_not_seen():
    proto = model("""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,64] x) => (float[N,64] y) <float[64,64] w, float s = {0.05}, int8 z = {0}> {
        a = own.fake(x, s, z)
        y = MatMul(a, w)
    }
    <domain: "own", opset_import: ["" : 17]>
    fake (p, s, z) => (r) { k = QuantizeLinear(p, s, z) r = DequantizeLinear(k, s, z) }""")
    _, note = qdq_surgeon.load(proto).graph.notes
    assert note.startswith("the function own.fake holds Q/DQ pairs, which stay")


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
@pytest.mark.parametrize("op", ["MatMulInteger", "QLinearConv", "QOrderedMatMul", "DynamicQuantizeLinear"])
def test_operator_form_is_refused_wherever_it_stands(op, domain):
    proto = model(FUNCTION)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.functions[0].node[0].op_type, proto.functions[0].node[0].domain = op, domain
    with pytest.raises(ModelError, match=rf"quantized in operator form \(1 {op}\)"):
        qdq_surgeon.plan(proto)


def test_an_operator_of_ones_own_may_be_called_as_those_of_the_operator_form():
    proto = model(FUNCTION.replace("lin", "ToInteger"))
    assert not qdq_surgeon.plan(proto).sites


def calls() -> int:
    return len(Path("calls").read_text().splitlines()) if Path("calls").exists() else 0


def test_every_session_of_a_run_gets_the_library(library, capsys, monkeypatch):
    opened = []

    class Counted(ort.InferenceSession):
        def __init__(self, *arguments, **options):
            opened.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", Counted)
    assert insert_main(["model.onnx", "--data", "data.npz", "--custom-ops", "ops.so"]) == 0
    assert calls() == len(opened) > 3  # calibration, bias correction, both sides of the comparison


def test_two_libraries_are_both_registered(library):
    loaded = qdq_surgeon.load("model.onnx", custom_ops=[library, library])
    qdq_surgeon.calibrate(loaded, qdq_surgeon.plan(loaded), "data.npz")
    assert calls() == 2


def test_compare_takes_libraries(library, capsys):
    assert main(["compare", "model.onnx", "model.onnx", "--data", "data.npz", "--custom-ops", "ops.so"]) == 0
    assert calls() == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere.so", "no such library of custom ops"), ("model.onnx", "is no library of custom ops that onnxruntime")],
)
def test_what_is_no_library_is_one_line(name, reason, folder, capsys):
    assert insert_main(["model.onnx", "--data", "data.npz", "--custom-ops", name]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"qdq-insert: error: {name}")
    assert (reason in errors, errors.count("\n")) == (True, 1)


def test_nodes_of_a_custom_domain_stay_float_and_the_plan_says_so():
    proto = model(TEXT)
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Gadget", "mine"
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    plan = qdq_surgeon.plan(proto)
    assert {edge.reader for site in plan.sites for edge in site.edges} == {"m", "y"}
    assert "reads 'm' in slot 0: float: Gadget is of the domain mine, not ONNX's own" in explain(
        plan, qdq_surgeon.load(proto).graph, "r"
    )


# ---- simplify -----------------------------------------------------------------------------------------------------

REDUNDANT = """g (float[N,64] x) => (float[N,64] y) <float[64,64] w> {
    i = Identity(x)
    a = Transpose<perm=[1,0]>(i)
    b = Transpose<perm=[1,0]>(a)
    m = MatMul(b, w)
    y = Identity(m)
}"""


def test_simplify_rewrites_the_graph_and_compares_with_the_model_as_given(folder, capsys):
    pytest.importorskip("onnxslim")
    onnx.save(model(REDUNDANT), "model.onnx")
    before = Path("model.onnx").read_bytes()
    assert insert_main(["model.onnx", "--data", "data.npz", "--simplify", "--min-sqnr", "20"]) == 0
    assert "onnxslim simplified the graph from 5 to 1 nodes" in capsys.readouterr().out
    kinds = [node.op_type for node in onnx.load("model.qdq.onnx").graph.node]
    assert set(kinds) == {"QuantizeLinear", "DequantizeLinear", "MatMul"}
    assert Path("model.onnx").read_bytes() == before


def test_the_float_side_of_the_comparison_is_the_model_as_given(folder):
    pytest.importorskip("onnxslim")
    loaded = qdq_surgeon.load(model(REDUNDANT), simplify=True)
    assert (len(loaded.original.graph.node), len(loaded.proto.graph.node)) == (5, 1)


def test_simplify_without_onnxslim_names_the_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxslim", None)
    with pytest.raises(QdqError, match=r"pip install 'qdq-surgeon\[simplify\]'"):
        qdq_surgeon.load(model(TEXT), simplify=True)
