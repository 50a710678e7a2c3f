"""The command line: what it writes, what it says, and that bad input is one line, exit code 2 and nothing written."""

import errno
import json
import os
import re
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import qdq_surgeon
from qdq_surgeon.cli import insert_main, main
from tests.graphs import model

CLASSIFIER = """g (float[N,3,8,8] x) => (float[N,16] y)
<float[32,3,8,8] w, float[32] b, float[16,32] fw, float[16] fb> {
    c = Conv(x, w, b)
    r = Relu(c)
    f = Flatten(r)
    y = Gemm<transB=1>(f, fw, fb)
}"""

RUNS_ONE_SAMPLE_ONLY = """g (float[N,3,8,8] x) => (float[N,16] y) <float[192,16] w, int64[2] flat = {1, 192}> {
    r = Relu(x)
    f = Reshape(r, flat)
    y = MatMul(f, w)
}"""

NOTHING_TO_DO = "g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"

ALREADY_QUANTIZED = """g (uint8[N,3,8,8] x) => (int32[N,8,6,6] y) <uint8[8,3,3,3] w> { y = ConvInteger(x, w) }"""

IMAGE_TO_IMAGE = """g (float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,16,3,3] w> {
    c = Conv(x, w)
    y = Relu(c)
}"""

LOG_OF_NEGATIVES = """g (float[N,32] x) => (float[N,16] y) <float[32,16] w> {
    m = MatMul(x, w)
    y = Log(m)
}"""

BAD_RULE = '[[rule]]\nname = "r"\nmatch = "Conf(x, ...)"\nquantize = ["x"]\nbecause = "b"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a model, 20 samples for it, and everything that can be wrong with either."""
    monkeypatch.chdir(tmp_path)
    whole = model(CLASSIFIER)
    onnx.save(whole, "model.onnx")
    x = images(20)
    np.savez("data.npz", x=x)

    Path("truncated.onnx").write_bytes(whole.SerializeToString()[:-300])
    Path("text.onnx").write_text("This is not a model.\n")
    Path("empty.onnx").touch()
    Path("folder").mkdir()
    onnx.save(model(ALREADY_QUANTIZED), "integers.onnx")
    onnx.save(model(NOTHING_TO_DO), "nothing.onnx")
    onnx.save(model(IMAGE_TO_IMAGE), "image.onnx")
    np.savez("image.npz", x=np.random.default_rng(0).standard_normal((4, 16, 8, 8)).astype(np.float32))
    onnx.save(custom_op(), "custom.onnx")
    onnx.save(model(CLASSIFIER.replace("Relu", "Sigmoid")), "other.onnx")
    Path("other.json").write_text(qdq_surgeon.plan("other.onnx").to_json())
    Path("good.json").write_text(qdq_surgeon.plan("model.onnx").to_json())
    Path("broken.json").write_text('{"format": 1, "sites": [{"tensor": 3}]}')
    Path("future.json").write_text('{"format": 99}')
    Path("rules.toml").write_text(BAD_RULE)
    Path("broken.toml").write_text("[[rule\n")
    np.savez("wrong_name.npz", image=x)
    np.savez("wrong_type.npz", x=x.astype(complex))
    np.savez("wrong_shape.npz", x=x[:, :2])
    np.savez("nan.npz", x=np.where(x > 2, np.nan, x))
    np.savez("no_samples.npz", x=x[:0])
    Path("truncated.npz").write_bytes(Path("data.npz").read_bytes()[:-200])
    return tmp_path


# ---- the usual run ----------------------------------------------------------------------------------------------


def test_the_result_lands_beside_the_model(folder, capsys):
    done = run(capsys, "model.onnx", "--data", "data.npz")
    assert (done.code, done.err) == (0, "")
    result = onnx.load("model.qdq.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in result.graph.node) == 4
    onnx.checker.check_model(result, full_check=True)


def test_the_result_is_what_the_api_gives(folder, capsys):
    run(capsys, "model.onnx", "--data", "data.npz", "--method", "max", "--exclude", "c")
    expected = qdq_surgeon.quantize("model.onnx", "data.npz", method="max", exclude="c").model
    assert onnx.load("model.qdq.onnx") == expected


def test_the_input_file_stays_as_it_was(folder, capsys):
    before = Path("model.onnx").read_bytes()
    run(capsys, "model.onnx", "--data", "data.npz")
    assert Path("model.onnx").read_bytes() == before


def test_the_steps_are_said_in_order(folder, capsys):
    out = run(capsys, "model.onnx", "--data", "data.npz", "--method", "entropy").out
    assert_in_order(
        out,
        "model.onnx: 4 Q/DQ pairs for 4 edges",
        "calibrated by entropy on 15 samples of data.npz",
        "SQNR",
        "wrote model.qdq.onnx",
    )


@pytest.mark.parametrize(
    ("given", "written"),
    [("model.onnx", "model.qdq.onnx"), ("net.v2.onnx", "net.v2.qdq.onnx"), ("net", "net.qdq.onnx")],
)
def test_the_default_name(given, written, folder, capsys):
    if given != "model.onnx":
        Path("model.onnx").rename(given)
    assert run(capsys, given, "--data", "data.npz").code == 0
    assert Path(written).is_file()


def test_an_output_that_exists_is_replaced(folder, capsys):
    Path("out.onnx").write_text("of yesterday")
    assert run(capsys, "model.onnx", "--data", "data.npz", "-o", "out.onnx").code == 0
    assert onnx.load("out.onnx").graph.node


def test_the_output_may_lie_in_another_folder(folder, capsys):
    assert run(capsys, "model.onnx", "--data", "data.npz", "--output", "folder/out.onnx").code == 0
    assert Path("folder/out.onnx").is_file()


def test_nothing_but_the_output_is_left_behind(folder, capsys):
    before = set(folder.rglob("*"))
    run(capsys, "model.onnx", "--data", "data.npz")
    assert set(folder.rglob("*")) - before == {folder / "model.qdq.onnx"}


def test_samples_limits_the_calibration(folder, capsys):
    assert "on 5 samples of data.npz" in run(capsys, "model.onnx", "--data", "data.npz", "--samples", "5").out


def test_no_compare_leaves_the_comparison_out(folder, capsys):
    done = run(capsys, "model.onnx", "--data", "data.npz", "--no-compare")
    assert done.code == 0
    assert "float against" not in done.out


def test_quiet_prints_nothing(folder, capsys):
    done = run(capsys, "model.onnx", "--data", "data.npz", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert Path("model.qdq.onnx").is_file()


def test_warnings_are_printed_even_when_quiet(folder, capsys):
    onnx.save(model(CLASSIFIER.replace("N", "8")), "eight.onnx")
    done = run(capsys, "eight.onnx", "--data", "data.npz", "--quiet")
    assert (done.code, done.out) == (0, "")
    assert re.fullmatch(r"WARNING: .*the last 4 samples do not fill the model's batch of 8.*\n", done.err)


def test_a_raised_opset_is_said(folder, capsys):
    onnx.save(model(CLASSIFIER, opset=11), "old.onnx")
    assert "note: opset raised from 11 to 13\n" in run(capsys, "old.onnx", "--data", "data.npz").out


def test_verbose_says_what_happens_on_the_way(folder, capsys):
    onnx.save(model(RUNS_ONE_SAMPLE_ONLY), "one.onnx")
    slowly = "INFO: the model does not run on 5 samples at once: one at a time from here on\n"
    assert run(capsys, "one.onnx", "--data", "data.npz", "--verbose", "--no-compare").err.count(slowly) == 1
    assert run(capsys, "one.onnx", "--data", "data.npz").err == ""


def test_edges_that_go_back_to_float_are_said(folder, capsys):
    text = """g (float[N,16,8,8] a, float[N,16,8,8] b) => (float[N,16,6,6] z) <float[16,32,3,3] w> {
        y = Concat<axis=1>(a, b)
        z = Conv(y, w)
    }"""
    onnx.save(model(text), "concat.onnx")
    a = np.random.default_rng(0).standard_normal((4, 16, 8, 8)).astype(np.float32)
    np.savez("far.npz", a=a, b=100 * a)
    out = run(capsys, "concat.onnx", "--data", "far.npz").out
    assert "Concat y[0] stays float: the ranges to share differ by a factor of 100, more than 4" in out


# ---- made-up inputs ---------------------------------------------------------------------------------------------


def test_without_data_a_warning_is_shouted_and_the_model_says_so(folder, capsys):
    done = run(capsys, "model.onnx")
    assert done.code == 0
    assert "MADE-UP INPUTS" in done.err
    written = {entry.key: entry.value for entry in onnx.load("model.qdq.onnx").metadata_props}
    assert written["qdq_surgeon.data"] == "synthetic"


def test_the_shout_is_heard_when_quiet(folder, capsys):
    done = run(capsys, "model.onnx", "--quiet")
    assert done.out == ""
    assert "MADE-UP INPUTS" in done.err


def test_shapes_give_the_sizes_of_made_up_inputs(folder, capsys):
    text = "g (float[N,L,32] x) => (float[N,L,16] y) <float[32,16] w> { y = MatMul(x, w) }"
    onnx.save(model(text), "sequence.onnx")
    assert run(capsys, "sequence.onnx", "--shapes", "x:2x5x32").code == 0


def test_nothing_to_quantize_writes_the_model_as_it_is(folder, capsys):
    done = run(capsys, "nothing.onnx")
    assert (done.code, done.err) == (0, "")
    assert "nothing to quantize" in done.out
    assert onnx.load("nothing.qdq.onnx") == onnx.load("nothing.onnx")


def test_nothing_to_quantize_needs_no_data(folder, capsys):
    """No size that could be made up fits this model."""
    onnx.save(model("g (float[N,L] x) => (float[1,9] y) <int64[2] s = {1, 9}> { y = Reshape(x, s) }"), "nine.onnx")
    assert run(capsys, "nine.onnx").code == 0
    assert Path("nine.qdq.onnx").is_file()


def test_weights_alone_need_no_data(folder, capsys):
    """Their scales come from the weights, so there is nothing to warn of."""
    done = run(capsys, "model.onnx", "--placement", "weights-only", "--no-compare")
    assert (done.code, done.err) == (0, "")


# ---- plans ------------------------------------------------------------------------------------------------------


def test_plan_prints_the_plan_and_writes_nothing(folder, capsys):
    before = contents(folder)
    done = run(capsys, "model.onnx", "--plan")
    assert (done.code, done.err, contents(folder)) == (0, "", before)
    assert_in_order(done.out, "4 Q/DQ pairs", "quantized", "x -> Conv c[0]", "\nkept float\n", "b -> Conv c[2]")


def test_explain_tells_the_story_of_one_node(folder, capsys):
    out = run(capsys, "model.onnx", "--plan", "--explain", "y").out
    assert_in_order(out, "Gemm y", "reads 'f' in slot 0: quantized", "reads 'fb' in slot 2: float by", "a graph output")
    assert "Conv" not in out


@pytest.mark.parametrize("stop_at_plan", [True, False])
def test_a_saved_plan_is_applied_as_if_it_was_made_anew(stop_at_plan, folder, capsys):
    filters = ["--exclude", "c", "--placement", "tensorrt-all-add-inputs"]
    stop = ["--plan"] if stop_at_plan else ["--data", "data.npz"]
    run(capsys, "model.onnx", *stop, *filters, "--json", "plan.json")
    run(capsys, "model.onnx", "--data", "data.npz", *filters, "-o", "direct.onnx")
    done = run(capsys, "model.onnx", "--data", "data.npz", "--plan-file", "plan.json", "-o", "saved.onnx")
    assert (done.code, done.err) == (0, "")
    assert Path("saved.onnx").read_bytes() == Path("direct.onnx").read_bytes()


def test_json_holds_plan_and_comparison(folder, capsys):
    run(capsys, "model.onnx", "--data", "data.npz", "--json", "report.json")
    written = json.loads(Path("report.json").read_text())
    assert [site["tensor"] for site in written["sites"]] == ["x", "w", "f", "fw"]
    (output,) = written["comparison"]["outputs"]
    assert output["name"] == "y"
    assert output["sqnr"] > 20


def test_json_of_an_output_that_is_not_a_number_is_valid(folder, capsys):
    onnx.save(model(LOG_OF_NEGATIVES), "log.onnx")
    np.savez("log.npz", x=np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32))
    assert run(capsys, "log.onnx", "--data", "log.npz", "--json", "report.json").code == 0
    json.loads(Path("report.json").read_text(), parse_constant=pytest.fail)


# ---- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "code", "said"),
    [
        (["--min-sqnr", "10"], 0, ""),
        (["--min-sqnr", "200"], 1, r"gate failed: SQNR \d+\.\d dB is below 200 dB\n"),
        (["--min-agreement", "0.1"], 0, ""),
        (["--min-agreement", "0"], 0, ""),
        (["--min-sqnr", "10", "--min-agreement", "0.1"], 0, ""),
        (["--min-sqnr", "200", "--min-agreement", "0.1"], 1, "gate failed: SQNR.*\n"),
    ],
)
def test_a_gate_that_fails_exits_with_1_and_the_model_is_written(gate, code, said, folder, capsys):
    done = run(capsys, "model.onnx", "--data", "data.npz", *gate)
    assert done.code == code
    assert re.fullmatch(said, done.err)
    assert Path("model.qdq.onnx").is_file()


def test_an_agreement_gate_can_fail(folder, capsys):
    """Rounding against the identity: the top class changes for many samples."""
    onnx.save(model("g (float[N,10] x) => (float[N,10] y) { y = Identity(x) }"), "exact.onnx")
    onnx.save(model("g (float[N,10] x) => (float[N,10] y) { y = Round(x) }"), "rough.onnx")
    np.savez("ten.npz", x=np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32))
    done = run(capsys, "compare", "exact.onnx", "rough.onnx", "--data", "ten.npz", "--min-agreement", "1", main=main)
    assert done.code == 1
    assert "THIS MODEL LOST ITS ACCURACY" in done.err
    assert re.search(r"\ngate failed: top-1 agreement 0\.\d+ is below 1\n$", done.err)


def test_an_agreement_gate_without_class_scores_is_refused(folder, capsys):
    done = run(capsys, "image.onnx", "--data", "image.npz", "--min-agreement", "0.9")
    assert done.code == 2
    assert_one_line(done.err.splitlines(keepends=True)[-1], "no output looks like class scores; use --min-sqnr")


# ---- bad input --------------------------------------------------------------------------------------------------

DATA = ["--data", "data.npz"]

BAD = {
    "no model": ([], "model"),
    "missing file": (["nowhere.onnx", *DATA], "nowhere.onnx: no such file"),
    "truncated file": (["truncated.onnx", *DATA], "truncated.onnx"),
    "text file": (["text.onnx", *DATA], "text.onnx"),
    "empty file": (["empty.onnx", *DATA], "empty.onnx"),
    "folder": (["folder", *DATA], "folder is a folder"),
    "this folder": ([".", *DATA], "folder"),
    "already quantized": (["integers.onnx", *DATA], "already quantized in operator form (1 ConvInteger)"),
    "refused by onnxruntime": (["custom.onnx"], "onnxruntime refuses the model"),
    "unknown preset": (["model.onnx", *DATA, "--placement", "tensort"], "Did you mean 'tensorrt'"),
    "missing placement file": (["model.onnx", *DATA, "--placement", "no.toml"], "no.toml: no such placement file"),
    "bad placement file": (["model.onnx", *DATA, "--placement", "rules.toml"], "Did you mean 'Conv'"),
    "placement file that is not TOML": (
        ["model.onnx", *DATA, "--placement", "broken.toml"],
        "broken.toml is not valid",
    ),
    "unknown exclude": (["model.onnx", *DATA, "--exclude", "cc"], "no node is called 'cc'"),
    "unknown include": (["model.onnx", *DATA, "--include", "layer*"], "no node is called 'layer*'"),
    "unknown op type": (["model.onnx", *DATA, "--op-types", "Conf"], "Did you mean 'Conv'"),
    "unknown method": (["model.onnx", *DATA, "--method", "msee"], "Did you mean 'mse'"),
    "bad percentile": (["model.onnx", *DATA, "--method", "percentile:x"], "percentile:P"),
    "data of another name": (["model.onnx", "--data", "wrong_name.npz"], "has no 'x'"),
    "data of another type": (["model.onnx", "--data", "wrong_type.npz"], "complex128"),
    "data of another shape": (["model.onnx", "--data", "wrong_shape.npz"], "but the model wants [N, 3, 8, 8]"),
    "NaN in the data": (["model.onnx", "--data", "nan.npz"], "NaN or infinity"),
    "no samples": (["model.onnx", "--data", "no_samples.npz"], "'x' is empty"),
    "truncated data": (["model.onnx", "--data", "truncated.npz"], "truncated.npz is not a whole"),
    "data file missing": (["model.onnx", "--data", "nowhere.npz"], "nowhere.npz: no such data file"),
    "folder without data": (["model.onnx", "--data", "folder"], "folder holds no .npz"),
    "output folder missing": (["model.onnx", *DATA, "-o", "nowhere/out.onnx"], "the folder nowhere does not exist"),
    "output is a folder": (["model.onnx", *DATA, "-o", "folder"], "folder is a folder"),
    "output is the input": (["model.onnx", *DATA, "-o", "model.onnx"], "the input itself"),
    "output is the input by another name": (["model.onnx", *DATA, "-o", "folder/../model.onnx"], "the input itself"),
    "json is the input": (["model.onnx", *DATA, "--json", "model.onnx"], "the input itself"),
    "json of the plan is the input": (["model.onnx", "--plan", "--json", "model.onnx"], "the input itself"),
    "json folder missing": (["model.onnx", *DATA, "--json", "nowhere/plan.json"], "nowhere"),
    "json is the output": (["model.onnx", *DATA, "-o", "a.onnx", "--json", "a.onnx"], "a.onnx"),
    "output is the data": (["model.onnx", *DATA, "-o", "data.npz"], "data.npz"),
    "json is the data": (["model.onnx", *DATA, "--json", "data.npz"], "data.npz"),
    "malformed shapes": (["model.onnx", "--shapes", "x:1x3xbig"], "write name:1x3x224x224"),
    "shapes without a name": (["model.onnx", "--shapes", "1x3x8x8"], "write name:1x3x224x224"),
    "shapes of an unknown input": (["model.onnx", "--shapes", "y:1x3x8x8"], "the model has no input 'y'"),
    "shapes that do not fit": (["model.onnx", "--shapes", "x:1x3x9x9"], "the model wants [N, 3, 8, 8]"),
    "plan of another model": (["model.onnx", *DATA, "--plan-file", "other.json"], "belongs to another model"),
    "broken plan": (["model.onnx", *DATA, "--plan-file", "broken.json"], "broken.json: not a saved plan"),
    "plan that is not JSON": (["model.onnx", *DATA, "--plan-file", "rules.toml"], "rules.toml: not a saved plan"),
    "plan of another format": (["model.onnx", *DATA, "--plan-file", "future.json"], "future.json"),
    "plan file missing": (["model.onnx", *DATA, "--plan-file", "nowhere.json"], "nowhere.json"),
    "explain without plan": (["model.onnx", *DATA, "--explain", "c"], "--explain goes with --plan"),
    "explain an unknown node": (["model.onnx", "--plan", "--explain", "nobody"], "no node is called 'nobody'"),
    "gate without comparison": (["model.onnx", *DATA, "--no-compare", "--min-sqnr", "9"], "leave --no-compare out"),
    "gate beyond 1": (["model.onnx", *DATA, "--min-agreement", "98"], "between 0 and 1, not 98"),
    "gate that is no number": (["model.onnx", *DATA, "--min-sqnr", "high"], "--min-sqnr"),
    "no samples wanted": (["model.onnx", *DATA, "--samples", "0"], "above 0"),
    "unknown option": (["model.onnx", *DATA, "--fast"], "--fast"),
    "abbreviated option": (["model.onnx", "--dat", "data.npz"], "--dat"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_written(name, folder, capsys):
    arguments, message = BAD[name]
    before = contents(folder)
    done = run(capsys, *arguments)
    assert done.code == 2
    assert_one_line(done.err, message)
    assert contents(folder) == before


BAD_STAGE = {
    "no command": ([], "COMMAND"),
    "unknown command": (["quantise", "model.onnx"], "quantise"),
    "compare without a second model": (["compare", "model.onnx", *DATA], "quantized"),
    "compare with a missing model": (["compare", "nowhere.onnx", "model.onnx", *DATA], "nowhere.onnx: no such file"),
    "compare a missing model into a report that exists": (
        ["compare", "nowhere.onnx", "model.onnx", "--json", "good.json"],
        "nowhere.onnx",
    ),
    "compare with a text file": (["compare", "model.onnx", "text.onnx", *DATA], "text.onnx"),
    "compare unlike models": (["compare", "model.onnx", "image.onnx", *DATA], "model"),
    "compare where the report is a model": (
        ["compare", "model.onnx", "other.onnx", "--json", "other.onnx"],
        "other.onnx",
    ),
    "compare without class scores": (
        ["compare", "image.onnx", "image.onnx", "--data", "image.npz", "--min-agreement", "0.9"],
        "--min-sqnr",
    ),
    "calibrate with bad data": (["calibrate", "model.onnx", "--data", "nan.npz"], "NaN or infinity"),
    "calibrate where the report is the data": (["calibrate", "model.onnx", *DATA, "--json", "data.npz"], "data.npz"),
    "plan of a quantized model": (["plan", "integers.onnx"], "already quantized"),
}


@pytest.mark.parametrize("name", BAD_STAGE)
def test_bad_input_to_a_stage_is_one_line_and_exit_code_2_and_nothing_written(name, folder, capsys):
    arguments, message = BAD_STAGE[name]
    before = contents(folder)
    done = run(capsys, *arguments, main=main)
    assert done.code == 2
    assert_one_line(done.err, message)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["unknown method", "json folder missing", "unknown preset", "plan of another model"])
def test_what_can_be_refused_at_once_does_not_wait_for_the_calibration(name, folder, capsys, monkeypatch):
    def collect(*arguments, **options):
        raise AssertionError("the model was run")

    monkeypatch.setattr("qdq_surgeon.pipeline.collect", collect)
    assert run(capsys, *BAD[name][0]).code == 2


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(folder, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    before = contents(folder)
    done = run(capsys, "model.onnx", "--data", "data.npz")
    assert done.code == 2
    assert_one_line(done.err, "model.qdq.onnx cannot be written: No space left on device")
    assert contents(folder) == before


def test_an_interrupt_is_one_line_and_exit_code_130(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("qdq_surgeon.pipeline.collect", interrupted)
    before = contents(folder)
    done = run(capsys, "model.onnx", "--data", "data.npz")
    assert done.code == 130
    assert_one_line(done.err, "interrupted")
    assert contents(folder) == before


# ---- qdq-surgeon: one subcommand per stage ----------------------------------------------------------------------


def test_surgeon_insert_is_qdq_insert(folder, capsys):
    run(capsys, "model.onnx", "--data", "data.npz", "-o", "a.onnx")
    assert run(capsys, "insert", "model.onnx", "--data", "data.npz", "-o", "b.onnx", main=main).code == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_surgeon_plan_is_the_option_plan(folder, capsys):
    expected = run(capsys, "model.onnx", "--plan").out
    done = run(capsys, "plan", "model.onnx", main=main)
    assert (done.code, done.out) == (0, expected)


def test_surgeon_plan_takes_no_options_of_other_stages(folder, capsys):
    done = run(capsys, "plan", "model.onnx", "--data", "data.npz", main=main)
    assert done.code == 2
    assert_one_line(done.err, "--data")


def test_surgeon_calibrate_prints_the_ranges_of_the_data(folder, capsys):
    done = run(capsys, "calibrate", "model.onnx", "--data", "data.npz", "--json", "ranges.json", main=main)
    assert (done.code, done.err) == (0, "")
    x = images(20)
    assert re.search(rf"^x +{x.min():.5g} +{x.max():.5g} ", done.out, re.MULTILINE)
    written = json.loads(Path("ranges.json").read_text())
    assert written["samples"] == 20
    assert written["ranges"]["x"]["min"] == x.min()


def test_surgeon_compare_measures_two_models(folder, capsys):
    run(capsys, "model.onnx", "--data", "data.npz")
    done = run(capsys, "compare", "model.onnx", "model.qdq.onnx", "--data", "data.npz", main=main)
    assert (done.code, done.err) == (0, "")
    expected = qdq_surgeon.compare("model.onnx", "model.qdq.onnx", "data.npz")
    assert f"{expected.sqnr:.1f} dB" in done.out


def test_surgeon_compare_of_equal_models_is_exact_and_valid_json(folder, capsys):
    np.savez("three.npz", x=np.ones((2, 3), np.float32))
    done = run(
        capsys, "compare", "nothing.onnx", "nothing.onnx", "--data", "three.npz", "--json", "same.json", main=main
    )
    assert (done.code, done.err) == (0, "")
    assert "exact" in done.out
    (output,) = json.loads(Path("same.json").read_text(), parse_constant=pytest.fail)["comparison"]["outputs"]
    assert (output["max_error"], output["sqnr"]) == (0, None)


# ---- help and version -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [insert_main, main])
def test_version(entry, capsys):
    assert run(capsys, "--version", main=entry).out == f"qdq-surgeon {version('qdq-surgeon')}\n"


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        (insert_main, []),
        (main, []),
        (main, ["insert"]),
        (main, ["plan"]),
        (main, ["calibrate"]),
        (main, ["merge"]),
        (main, ["compare"]),
    ],
)
def test_help_fits_a_screen_and_ends_with_examples(entry, arguments, capsys):
    done = run(capsys, *arguments, "--help", main=entry)
    lines = done.out.splitlines()
    assert done.code == 0
    assert len(lines) <= 58
    assert max(map(len, lines)) <= 110
    examples = lines[lines.index("examples:") + 1 :]
    assert 2 <= len(examples) <= 3
    assert all(line.startswith(("  qdq-insert ", "  qdq-surgeon ")) for line in examples)


# ---- in a process of its own --------------------------------------------------------------------------------------


def test_a_process_of_its_own_prints_what_it_should_and_nothing_on_stderr(folder):
    done = process("model.onnx", "--data", "data.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote model.qdq.onnx" in done.stdout


def test_every_process_writes_the_same_bytes(folder):
    for seed in ("1", "2"):
        process("model.onnx", "--data", "data.npz", "-o", f"{seed}.onnx", env={"PYTHONHASHSEED": seed})
    assert Path("1.onnx").read_bytes() == Path("2.onnx").read_bytes()


def test_bad_input_in_a_process_of_its_own(folder):
    done = process("custom.onnx")
    assert (done.returncode, done.stdout.count("Traceback")) == (2, 0)
    assert_one_line(done.stderr, "onnxruntime refuses the model")


def test_a_reader_that_has_enough_is_no_error(folder):
    """`qdq-insert model.onnx --plan | head -1`"""
    reading, writing = os.pipe()
    os.close(reading)
    done = process("model.onnx", "--plan", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# ---- helpers ----------------------------------------------------------------------------------------------------


def images(count):
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


def custom_op():
    proto = model(CLASSIFIER)
    proto.graph.node[1].domain = "nobody"
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    return proto


def run(capsys, *arguments, main=insert_main):
    """Run a console script in this process."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return types.SimpleNamespace(code=code, out=out, err=err)


def process(*arguments, env=None, stdout=subprocess.PIPE):
    code = "import sys; from qdq_surgeon.cli import insert_main; sys.exit(insert_main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, env=os.environ | (env or {}),
    )  # fmt: skip


def contents(folder):
    """Every file's bytes: nothing added, nothing changed, nothing gone."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(text, message):
    assert message in text
    assert "Traceback" not in text
    assert text.count("\n") == 1
    assert text.endswith("\n")


def assert_in_order(text, *parts):
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
