"""Models with operators of their own: --custom-ops gives every session the library, and such nodes stay float."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import qdq_surgeon
from qdq_surgeon.cli import insert_main, main
from qdq_surgeon.errors import QdqError
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
