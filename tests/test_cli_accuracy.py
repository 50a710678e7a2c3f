"""Bias correction, mixed precision, scores and `qdq-surgeon sensitivity` from the command line."""

import html.parser
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx
import pytest

import qdq_surgeon
from qdq_surgeon.biases import BIAS_KEY
from qdq_surgeon.cli import main
from tests.graphs import model
from tests.test_cli import run
from tests.test_verdict import lost_model

NET = """g (float[N,16,8,8] x) => (float[N,16] y)
<float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[16,1024] fw, float[16] fb> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
    r2 = Relu(c2)
    f = Flatten(r2)
    y = Gemm<transB=1>(f, fw, fb)
}"""
OPS = {"c1", "c2", "y"}

IMAGE_TO_IMAGE = """g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,3,3] w1, float[16] b1> {
    y = Conv<pads=[1,1,1,1]>(x, w1, b1)
}"""

SCORE = """import numpy as np

def score(run):
    x = np.load("data.npz")["x"]
    return float((run({"x": x})["y"].argmax(1) == np.load("labels.npy")).mean())
"""

DATA = ("--data", "data.npz")
CLIPPED = ("--method", "percentile:98")
"""A range method that loses much, so that there is something to correct and to keep float."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(model(NET), "model.onnx")
    onnx.save(model(IMAGE_TO_IMAGE), "image.onnx")
    x = np.abs(np.random.default_rng(0).standard_normal((40, 16, 8, 8))).astype(np.float32)
    np.savez("data.npz", x=x)
    Path("score.py").write_text(SCORE)
    Path("bad_score.py").write_text("def score(run):\n    return 1 / 0\n")
    Path("no_number.py").write_text("def score(run):\n    return 'good'\n")
    Path("constant.py").write_text("def score(run):\n    return 0.5\n")
    from tests.refinement.nets import run as run_model

    np.save("labels.npy", run_model(model(NET), {"x": x})["y"].argmax(1))
    return tmp_path


def float_ops(path="model.qdq.onnx"):
    """The weighted ops that read no pair; fails where one is half quantized."""
    graph = onnx.load(path).graph
    pairs = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found = set()
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            quantized = [name in pairs for name in node.input[:2]]
            assert all(quantized) or not any(quantized), f"{node.output[0]} is half quantized"
            found |= set() if all(quantized) else {node.output[0]}
    return found


# ---- bias correction --------------------------------------------------------------------------------------------


def test_biases_are_corrected_unless_told_not_to(folder, capsys):
    done = run(capsys, "model.onnx", *DATA, *CLIPPED)
    assert (done.code, done.err) == (0, "")
    assert "biases corrected, fitted on" in done.out
    assert "by which it was chosen" in done.out
    corrected = [n for n in onnx.load("model.qdq.onnx").graph.node if any(e.key == BIAS_KEY for e in n.metadata_props)]
    assert corrected
    done = run(capsys, "model.onnx", *DATA, *CLIPPED, "--no-bias-correction", "-o", "plain.onnx")
    assert "corrected" not in done.out
    plain = qdq_surgeon.quantize("model.onnx", "data.npz", method="percentile:98", bias_correction=False).model
    assert onnx.load("plain.onnx") == plain


def test_made_up_inputs_correct_nothing(folder, capsys):
    assert "corrected" not in run(capsys, "model.onnx").out


def test_stripping_what_was_corrected_gives_the_float_model_back(folder, capsys):
    run(capsys, "model.onnx", *DATA, *CLIPPED)
    assert run(capsys, "strip", "model.qdq.onnx", "-o", "float.onnx", main=main).code == 0
    assert onnx.load("float.onnx") == onnx.load("model.onnx")


def test_the_comparison_names_the_three_worst_ops(folder, capsys):
    for more in ((), ("--no-bias-correction",)):
        (line,) = [line for line in run(capsys, "model.onnx", *DATA, *more).out.splitlines() if "most error" in line]
        assert all(f" {op} (" in line for op in ("Conv c1", "Conv c2", "Gemm y"))


# ---- mixed precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_the_worst_ops_stay_float_as_a_whole(number, folder, capsys):
    done = run(capsys, "model.onnx", *DATA, "--float-worst", str(number))
    assert done.code == 0
    kept = float_ops()
    assert len(kept) == min(number, 3)
    assert f"{min(number, 3)} op{'s' if number > 1 else ''} kept float, " in done.out
    for op in kept:
        assert f" {op}: " in done.out


def test_the_worst_is_what_sensitivity_ranks_first(folder, capsys):
    run(capsys, "model.onnx", *DATA, "--float-worst", "1")
    run(capsys, "sensitivity", "model.onnx", *DATA, "--json", "noise.json", main=main)
    assert float_ops() == {json.loads(Path("noise.json").read_text())["ops"][0]["output"]}


def test_a_target_that_int8_reaches_keeps_nothing_float(folder, capsys):
    done = run(capsys, "model.onnx", *DATA, "--target-sqnr", "3")
    assert "SQNR 3 dB reached with every planned op in INT8 (32 calibration samples)" in done.out
    assert float_ops() == set()


def test_a_target_is_reached_on_the_calibration_samples_and_said_so(folder, capsys):
    plain = qdq_surgeon.quantize("model.onnx", "data.npz", method="percentile:98", samples=24)
    aim = qdq_surgeon.compare("model.onnx", plain.model, first(24)).sqnr + 3
    done = run(capsys, "model.onnx", *DATA, *CLIPPED, "--samples", "24", "--target-sqnr", str(aim))
    assert done.code == 0
    kept = float_ops()
    assert 0 < len(kept) < 3
    assert f"to reach SQNR {aim:g} dB on 24 calibration samples (" in done.out
    assert qdq_surgeon.compare("model.onnx", "model.qdq.onnx", first(24)).sqnr >= aim


def first(number):
    return {"x": np.load("data.npz")["x"][:number]}


def test_a_target_takes_no_more_multiply_accumulates_than_the_worst_ops(folder):
    """Of the worst ops, as many as it takes; the target finds something as cheap or cheaper."""
    plain = qdq_surgeon.quantize("model.onnx", "data.npz", method="percentile:98", samples=24, compare=False)
    aim = qdq_surgeon.compare("model.onnx", plain.model, first(24)).sqnr + 3
    options = {"method": "percentile:98", "samples": 24, "compare": False}
    for number in (1, 2, 3):
        worst = qdq_surgeon.quantize("model.onnx", "data.npz", float_worst=number, **options)
        if worst.mixed.ops and qdq_surgeon.compare("model.onnx", worst.model, first(24)).sqnr >= aim:
            break
    found = qdq_surgeon.quantize("model.onnx", "data.npz", target_sqnr=aim, **options)
    assert found.mixed.reached
    assert found.mixed.share_of_macs <= worst.mixed.share_of_macs


def test_a_target_beyond_reach_is_told_and_leaves_a_float_model(folder, capsys):
    """No pair at all is exact, which no number of dB beats."""
    done = run(capsys, "model.onnx", *DATA, "--target-sqnr", "1000")
    assert "3 ops kept float, 100.0% of the MACs, to reach SQNR 1000 dB" in done.out
    assert float_ops() == OPS
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load("model.qdq.onnx").graph.node)


def test_a_target_agreement(folder, capsys):
    done = run(capsys, "model.onnx", *DATA, "--method", "percentile:80", "--target-agreement", "1")
    assert done.code == 0
    assert "agreement 1 " in done.out
    float_ops()


def test_the_plan_that_is_written_holds_the_float_ops(folder, capsys):
    run(capsys, "model.onnx", *DATA, "--float-worst", "1", "--json", "plan.json", "--no-bias-correction")
    kept = float_ops()
    again = run(capsys, "model.onnx", *DATA, "--plan-file", "plan.json", "-o", "again.onnx", "--no-bias-correction")
    assert again.code == 0
    assert float_ops("again.onnx") == kept
    assert onnx.load("again.onnx").graph == onnx.load("model.qdq.onnx").graph


def test_the_users_own_filters_stay(folder, capsys):
    run(capsys, "model.onnx", *DATA, "--exclude", "c1", "--float-worst", "1")
    assert float_ops() > {"c1"}
    assert len(float_ops()) == 2


def test_a_target_after_a_calibration_of_its_own(folder, capsys):
    main(["calibrate", "model.onnx", *DATA, "-o", "stats.npz", "--quiet"])
    done = run(capsys, "model.onnx", "--stats", "stats.npz", *DATA, "--float-worst", "1")
    assert done.code == 0
    assert len(float_ops()) == 1


POOLED = """g (float[N,16,8,8] x) => (float[N,16,4,4] s)
<float[16,16,3,3] w, float[16,16,3,3] w2, float[16,16,3,3] w3> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    a = Conv<pads=[1,1,1,1]>(r, w2)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    d = Conv<pads=[1,1,1,1]>(p, w3)
    e = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
    s = Add(d, e)
}"""


def test_a_target_beside_statistics_of_a_calibration(folder, capsys):
    """Where a MaxPool and what it reads share a scale, a plan with the first in float needs the other's statistic."""
    onnx.save(model(POOLED), "pooled.onnx")
    main(["calibrate", "pooled.onnx", *DATA, "-o", "stats.npz", "--quiet"])
    done = run(capsys, "pooled.onnx", "--stats", "stats.npz", *DATA, "--target-sqnr", "50")
    assert (done.code, done.err) == (0, "")


def test_ops_that_are_called_like_other_ops_outputs(folder, capsys):
    proto = model(NET)
    for node in proto.graph.node:
        node.name = {"c1": "c2", "c2": "y", "y": "c1"}.get(node.output[0], "")
    onnx.save(proto, "names.onnx")
    assert run(capsys, "names.onnx", *DATA, "--float-worst", "1").code == 0
    assert len(float_ops("names.qdq.onnx")) == 1


HALF_DONE = """g (float[N,16,8,8] x) => (float[N,16,4,4] y)
<float s = {0.05}, int8 z = {0}, float[16,16,3,3] w, float[16,16,3,3] w2> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    c = Conv(d, w)
    y = Conv(c, w2)
}"""


@pytest.mark.parametrize("more", [("--float-worst", "1"), ("--target-sqnr", "60")])
def test_a_target_for_a_model_that_comes_with_pairs_is_refused(more, folder, capsys):
    onnx.save(model(HALF_DONE), "half.onnx")
    done = run(capsys, "half.onnx", *DATA, *more)
    assert done.code == 2
    assert "this one comes with pairs: requantize or strip it" in done.err
    assert run(capsys, "half.onnx", *DATA, *more, "--requantize").code == 0


# ---- the verdict ------------------------------------------------------------------------------------------------


def test_a_lost_model_is_shouted_whatever_the_exit_code(folder, capsys):
    proto, x = lost_model()
    onnx.save(proto, "lost.onnx")
    np.savez("lost.npz", x=x)
    for more in ((), ("--quiet",)):
        done = run(capsys, "lost.onnx", "--data", "lost.npz", "--method", "max", *more)
        assert done.code == 0
        shouted = " ".join(done.err.replace("│", " ").split())
        assert "THIS MODEL LOST ITS ACCURACY" in shouted
        assert "The error first jumps at MatMul c (" in shouted
        assert "--float-worst 3" in shouted


def test_its_advice_helps(folder, capsys):
    proto, x = lost_model()
    onnx.save(proto, "lost.onnx")
    np.savez("lost.npz", x=x)
    done = run(capsys, "lost.onnx", "--data", "lost.npz", "--method", "max", "--float-worst", "1")
    assert done.err == ""
    assert "LOST" not in done.out


def test_a_verdict_is_said_once_and_loudly(folder, capsys):
    proto, x = lost_model()
    onnx.save(proto, "lost.onnx")
    np.savez("lost.npz", x=x)
    made = run(capsys, "lost.onnx", "--data", "lost.npz", "--method", "max")
    pair = ("compare", "lost.onnx", "lost.qdq.onnx", "--data", "lost.npz")
    compared, quiet = (run(capsys, *pair, *more, main=main) for more in ((), ("--quiet",)))
    for done in (made, compared, quiet):
        assert "LOST" not in done.out
        assert done.err.count("THIS MODEL LOST ITS ACCURACY") == 1


def test_a_target_that_is_missed_on_other_samples_says_so(folder, capsys):
    """The calibration samples lie on the INT8 grid, which reaches to 127; those held out between its points."""
    x = np.round(np.load("data.npz")["x"])
    x[:, 0, 0, 0] = 127
    x[8:] += 0.5
    np.savez("easy.npz", x=x)
    proto = model("g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,1,1] w> { y = Conv(x, w) }")
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.eye(16, dtype="f")[..., None, None], "w"))
    onnx.save(proto, "easy.onnx")
    done = run(capsys, "easy.onnx", "--data", "easy.npz", "--method", "max", "--samples", "8", "--target-sqnr", "60")
    assert done.code == 0
    assert "SQNR 60 dB reached with every planned op in INT8 (8 calibration samples)" in done.out
    assert "the target SQNR 60 dB is missed on the samples held out: SQNR" in done.out


def test_the_json_of_a_run_holds_what_was_chosen_and_corrected(folder, capsys):
    run(capsys, "model.onnx", *DATA, *CLIPPED, "--float-worst", "1", "--json", "out.json")
    found = json.loads(Path("out.json").read_text(), parse_constant=pytest.fail)["refinements"]
    assert found.keys() == {"mixed", "correction"}
    assert [op["output"] for op in found["mixed"]["ops"]] == [*float_ops()]
    assert found["correction"]["candidates"] == 2


# ---- scores -----------------------------------------------------------------------------------------------------


def test_a_score_is_told_of_both_models(folder, capsys):
    done = run(capsys, "model.onnx", *DATA, "--score-script", "score.py", "--json", "out.json")
    assert "score: float 1, INT8 0.9" in done.out or "score: float 1, INT8 1" in done.out
    floats, quantized = json.loads(Path("out.json").read_text())["comparison"]["scores"]
    assert floats == 1
    assert 0.5 < quantized <= 1


def test_a_target_score(folder, capsys):
    done = run(
        capsys, "model.onnx", *DATA, "--method", "percentile:80", "--score-script", "score.py", "--target-score", "1"
    )
    assert done.code == 0
    assert "score 1" in done.out
    assert "score: float 1, INT8 1\n" in done.out


def test_a_target_score_without_a_comparison(folder, capsys):
    done = run(capsys, "model.onnx", *DATA, "--score-script", "constant.py", "--target-score", "0.5", "--no-compare")
    assert (done.code, done.err) == (0, "")
    assert "score 0.5 reached with every planned op in INT8" in done.out


BAD_SCORES = {
    "an error": ("bad_score.py", "bad_score.py, line 2: ZeroDivisionError"),
    "no number": ("no_number.py", "which is no number"),
    "no file": ("none.py", "none.py: no such script"),
    "no script": ("model.onnx", "is no Python script"),
    "no function": ("score.py:scor", "has no function 'scor'. Did you mean 'score'?"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_a_score_that_fails_is_one_line_and_nothing_is_written(case, folder, capsys):
    name, words = BAD_SCORES[case]
    done = run(capsys, "model.onnx", *DATA, "--score-script", name)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not Path("model.qdq.onnx").exists()


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "two ways to choose": (["--target-sqnr", "30", "--float-worst", "1"], "leave one out"),
    "two ways, agreement": (["--target-agreement", "0.9", "--float-worst", "1"], "leave one out"),
    "two ways, score": (
        ["--target-score", "0.9", "--score-script", "score.py", "--float-worst", "1"],
        "--float-worst says how many ops stay float, a target finds out",
    ),
    "a plan and a target": (["--plan-file", "plan.json", "--target-sqnr", "30"], "--plan-file holds the decisions"),
    "a plan and the worst": (["--plan-file", "plan.json", "--float-worst", "1"], "--plan-file holds the decisions"),
    "no share": (["--target-agreement", "1.01"], "--target-agreement is a share between 0 and 1, not 1.01"),
    "a share of 0": (["--target-agreement", "0"], "is a share between 0 and 1, not 0"),
    "a negative share": (["--target-agreement", "-1"], "is a share between 0 and 1, not -1"),
    "a share that is none": (["--target-agreement", "nan"], "is a share between 0 and 1, not nan"),
    "a percentage": (["--target-agreement", "99"], "is a share between 0 and 1, not 99"),
    "a score without script": (["--target-score", "0.9"], "--target-score goes with --score-script"),
    "a script for nothing": (["--score-script", "score.py", "--no-compare"], "leave --no-compare out"),
    "none of the worst": (["--float-worst", "0"], "--float-worst"),
    "a fraction of the worst": (["--float-worst", "1.5"], "--float-worst"),
    "an SQNR in words": (["--target-sqnr", "high"], "--target-sqnr"),
    "the script as output": (["--score-script", "score.py", "-o", "score.py"], "is the input itself"),
    "the script of a function as output": (["--score-script", "score.py:score", "--json", "score.py"], "input itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_before_any_work(case, folder, capsys):
    more, words = REFUSED[case]
    before = Path("score.py").read_text()
    done = run(capsys, "no_such_model.onnx" if "output" not in case else "model.onnx", *DATA, *more)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert Path("score.py").read_text() == before


WITHOUT_DATA = {
    "statistics, target": ["--stats", "stats.npz", "--target-sqnr", "30"],
    "statistics, worst": ["--stats", "stats.npz", "--float-worst", "1"],
    "cache, target": ["--calibration-cache", "scales.cache", "--target-agreement", "0.9"],
    "cache, worst": ["--calibration-cache", "scales.cache", "--float-worst", "1"],
}


@pytest.mark.parametrize("case", WITHOUT_DATA)
def test_a_target_without_samples_is_refused(case, folder, capsys):
    done = run(capsys, "no_such_model.onnx", *WITHOUT_DATA[case])
    assert done.code == 2
    assert "need samples to try on: give --data too" in done.err


IGNORED = {
    "a score where nothing is compared": (["--stats", "stats.npz", "--score-script", "score.py"], "model.onnx"),
    "an SQNR that is no number": ([*DATA, "--target-sqnr", "nan"], "model.onnx"),
    "an agreement without classes": ([*DATA, "--target-agreement", "0.9"], "image.onnx"),
    "a target for a plan": (["--plan", "--target-sqnr", "30"], "model.onnx"),
    "the worst for a plan": (["--plan", "--float-worst", "1"], "model.onnx"),
    "a score for a plan": (["--plan", "--score-script", "score.py"], "model.onnx"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_would_be_ignored_is_refused(case, folder, capsys):
    more, name = IGNORED[case]
    main(["calibrate", "model.onnx", *DATA, "-o", "stats.npz", "--quiet"])
    assert run(capsys, name, *more).code == 2


# ---- sensitivity ------------------------------------------------------------------------------------------------


def sensitivity(capsys, *arguments):
    return run(capsys, "sensitivity", *arguments, main=main)


def test_sensitivity_ranks_ops_and_pairs(folder, capsys):
    done = sensitivity(capsys, "model.onnx", *DATA)
    assert (done.code, done.err) == (0, "")
    assert "10 forward passes of 8 samples; SQNR with all 6 pairs" in done.out
    for word in ("Conv c1", "Conv c2", "Gemm y", "147,456", "weight", "activation", "of the error", "SQNR alone"):
        assert word in done.out
    assert sorted(path.name for path in folder.glob("model.*")) == ["model.onnx"]


def test_sensitivity_measures_on_as_many_samples_as_it_is_told(folder, capsys):
    assert "forward passes of 3 samples" in sensitivity(capsys, "model.onnx", *DATA, "--measure", "3").out
    assert "forward passes of 5 samples" in sensitivity(capsys, "model.onnx", *DATA, "--samples", "5").out


def test_the_json_holds_all_figures(folder, capsys):
    assert "wrote noise.json" in sensitivity(capsys, "model.onnx", *DATA, "--json", "noise.json").out
    found = json.loads(Path("noise.json").read_text(), parse_constant=pytest.fail)
    assert {op["output"] for op in found["ops"]} == OPS
    assert sum(site["share"] for site in found["sites"]) == pytest.approx(1)
    assert [tensor["output"] for tensor in found["tensors"]] == ["c1", "c2", "y"]
    assert (found["passes"], found["samples"]) == (10, 8)


SVG = "{http://www.w3.org/2000/svg}"


def check_chart(text, labels):
    """Valid XML, one bar of the right length for each row, nothing from outside."""
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    width = float(root.get("width"))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") != "#ffffff"]
    lengths = [float(bar.get("width")) for bar in bars]
    assert lengths == sorted(lengths, reverse=True)
    assert all(float(bar.get("x")) + float(bar.get("width")) <= width for bar in bars)
    words = " ".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))
    assert all(label in words for label in labels)
    assert "href" not in text
    return lengths


def test_the_chart_is_valid_svg_in_proportion(folder, capsys):
    assert "wrote noise.svg" in sensitivity(capsys, "model.onnx", *DATA, "--svg", "noise.svg", "--json", "n.json").out
    lengths = check_chart(Path("noise.svg").read_text(encoding="utf-8"), ["Conv c1", "Conv c2", "Gemm y"])
    shares = [op["share"] for op in json.loads(Path("n.json").read_text())["ops"]]
    np.testing.assert_allclose(np.array(lengths) / lengths[0], np.array(shares) / shares[0], atol=0.01)


class Balanced(html.parser.HTMLParser):
    """Every element is closed by its own end tag, in order; void elements have none."""

    VOID = ("meta", "br", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text):
    page = Balanced()
    page.feed(text)
    page.close()
    assert page.open == []
    tags = [tag for tag, _ in page.seen]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert not any("href" in attributes or "src" in attributes for _, attributes in page.seen)
    return tags


def test_the_page_is_whole_and_valid(folder, capsys):
    assert "wrote noise.html" in sensitivity(capsys, "model.onnx", *DATA, "--html", "noise.html").out
    text = Path("noise.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    tags = check_page(text)
    assert tags.count("svg") == 2
    for chart in text.split("<svg")[1:]:
        check_chart("<svg" + chart.split("</svg>")[0] + "</svg>", [])
    assert all(word in text for word in ("10 forward passes of 8 samples", "Conv c1", "Along the graph"))


def test_names_with_markup_do_no_harm(folder, capsys):
    name = "<script>alert('\"&')</script>"
    proto = model(NET)
    for node in proto.graph.node:
        node.input[:] = [name if tensor == "r1" else tensor for tensor in node.input]
        node.output[:] = [name if tensor == "r1" else tensor for tensor in node.output]
        node.name = f"{name}{node.output[0]}"
    onnx.save(proto, "evil & <b>.onnx")
    assert sensitivity(capsys, "evil & <b>.onnx", *DATA, "--html", "n.html", "--svg", "n.svg").code == 0
    check_page(Path("n.html").read_text(encoding="utf-8"))
    check_chart(Path("n.svg").read_text(encoding="utf-8"), ["evil & <b>.onnx"])


def test_names_with_control_characters_do_no_harm(folder, capsys):
    proto = model(NET)
    for node in proto.graph.node:
        node.name = f"\x1b[1m{node.output[0]}"
    onnx.save(proto, "names.onnx")
    assert sensitivity(capsys, "names.onnx", *DATA, "--svg", "n.svg").code == 0
    check_chart(Path("n.svg").read_text(encoding="utf-8"), [])


SENSITIVITY_REFUSED = {
    "no such model": (["none.onnx", *DATA], "none.onnx"),
    "no such data": (["model.onnx", "--data", "none.npz"], "none.npz: no such data file"),
    "a wrong method": (["model.onnx", *DATA, "--method", "mean"], "mean"),
    "no samples": (["model.onnx", *DATA, "--measure", "0"], "--measure"),
    "one file for two": (["model.onnx", *DATA, "--html", "a", "--svg", "a"], "is named for two outputs"),
    "the model as output": (["model.onnx", *DATA, "--html", "model.onnx"], "is the input itself"),
    "the data as output": (["model.onnx", *DATA, "--json", "data.npz"], "is the input itself"),
    "no such folder": (["model.onnx", *DATA, "--svg", "none/a.svg"], "the folder none does not exist"),
    "nothing to measure": (["model.onnx", *DATA, "--exclude", "*"], "the plan has no pairs"),
    "two kinds of data": (["model.onnx", *DATA, "--data-loader-script", "load.py"], "both give data"),
    "shapes beside data": (["model.onnx", *DATA, "--shapes", "x:1x16x8x8"], "--shapes is for made-up inputs"),
}


@pytest.mark.parametrize("case", SENSITIVITY_REFUSED)
def test_what_sensitivity_refuses(case, folder, capsys):
    more, words = SENSITIVITY_REFUSED[case]
    done = sensitivity(capsys, *more)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


def test_a_model_with_pairs_needs_requantize(folder, capsys):
    run(capsys, "model.onnx", *DATA)
    done = sensitivity(capsys, "model.qdq.onnx", *DATA)
    assert done.code == 2
    assert "give the float model (strip makes one), or --requantize" in done.err
    assert sensitivity(capsys, "model.qdq.onnx", *DATA, "--requantize").code == 0


def test_sensitivity_on_made_up_inputs_says_so(folder, capsys):
    done = sensitivity(capsys, "model.onnx")
    assert "MADE-UP INPUTS" in done.err


def test_the_options_are_in_the_help(capsys):
    text = run(capsys, "--help").out + run(capsys, "sensitivity", "--help", main=main).out
    for option in ("--no-bias-correction", "--float-worst", "--target-sqnr", "--target-agreement", "--target-score"):
        assert option in text
    for option in ("--score-script", "--measure", "--svg", "--html"):
        assert option in text


# ---- GPTQ, weights as integers, a range method by trying --------------------------------------------------------


@pytest.fixture
def correlated(folder):
    """Data of which GPTQ can make something: images whose channels share most of what they hold."""
    rng = np.random.default_rng(1)
    x = 0.3 * rng.standard_normal((40, 16, 8, 8)) + rng.standard_normal((40, 1, 8, 8))
    np.savez("data.npz", x=x.astype(np.float32))
    return folder


def initializers(path):
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def test_gptq_is_told_and_written(correlated, capsys):
    done = run(capsys, "model.onnx", *DATA, "--gptq")
    assert (done.code, done.err) == (0, "")
    assert "3 weights rounded by GPTQ, on " in done.out
    assert " others\n" in done.out
    before, after = initializers("model.onnx"), initializers("model.qdq.onnx")
    assert all(before[name] != after[name] for name in ("w1", "w2", "fw"))
    assert before["b1"].dims == after["b1"].dims


def test_without_gptq_weights_are_those_of_the_model(correlated, capsys):
    run(capsys, "model.onnx", *DATA)
    before, after = initializers("model.onnx"), initializers("model.qdq.onnx")
    assert all(before[name] == after[name] for name in ("w1", "w2", "fw"))


def test_weights_as_integers_are_the_same_numbers_in_less_space(folder, capsys):
    figures = []
    for more in ("pairs", "int8"):
        done = run(capsys, "model.onnx", *DATA, "--weights", more, "-o", f"{more}.onnx")
        assert (done.code, done.err) == (0, "")
        figures.append([line for line in done.out.splitlines() if "SQNR" in line])
    assert figures[0] == figures[1]
    weights = 4 * (2 * 16 * 16 * 9 + 16 * 1024)
    saved = Path("pairs.onnx").stat().st_size - Path("int8.onnx").stat().st_size
    assert saved == pytest.approx(0.75 * weights, rel=0.05)
    assert float_ops("int8.onnx") == set()


def test_weights_as_integers_compare_and_strip_like_any_others(folder, capsys):
    run(capsys, "model.onnx", *DATA, "--weights", "int8")
    done = run(capsys, "compare", "model.onnx", "model.qdq.onnx", *DATA, "--min-agreement", "0.7", main=main)
    assert (done.code, done.err) == (0, "")
    assert run(capsys, "strip", "model.qdq.onnx", "-o", "float.onnx", main=main).code == 0
    assert not any("Linear" in node.op_type for node in onnx.load("float.onnx").graph.node)


def test_all_of_them_at_once(correlated, capsys):
    done = run(capsys, "model.onnx", *DATA, "--gptq", "--weights", "int8", "--method", "auto", "--float16")
    assert (done.code, done.err) == (0, "")
    for words in ("range method ", "the best of 5 on ", "by GPTQ, on ", "wrote model.qdq.onnx"):
        assert words in done.out


def test_gptq_and_a_float_op(correlated, capsys):
    """What stays float is not rounded."""
    done = run(capsys, "model.onnx", *DATA, "--gptq", "--float-worst", "1")
    assert done.code == 0
    (kept,) = float_ops()
    before, after = initializers("model.onnx"), initializers("model.qdq.onnx")
    weight = {"c1": "w1", "c2": "w2", "y": "fw"}[kept]
    assert before[weight] == after[weight]


NEED_SAMPLES = {
    "gptq, statistics": (["--stats", "stats.npz", "--gptq"], "gptq needs samples to look at: give data too"),
    "auto, statistics": (["--stats", "stats.npz", "--method", "auto"], "the method auto needs samples to look at"),
    "gptq, cache": (["--calibration-cache", "scales.cache", "--gptq"], "gptq needs samples to look at"),
    "auto, cache": (
        ["--calibration-cache", "scales.cache", "--method", "auto"],
        "a calibration cache gives ranges, which leaves the method auto nothing to choose",
    ),
}


@pytest.mark.parametrize("case", NEED_SAMPLES)
def test_what_needs_samples_is_refused_without(case, folder, capsys):
    more, words = NEED_SAMPLES[case]
    run(capsys, "model.onnx", *DATA, "--write-cache", "scales.cache", "-o", "other.onnx", "--no-compare")
    main(["calibrate", "model.onnx", *DATA, "-o", "stats.npz", "--quiet"])
    capsys.readouterr()
    done = run(capsys, "model.onnx", *more)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not Path("model.qdq.onnx").exists()


def test_ranges_only_leave_auto_no_choice(folder, capsys):
    plan = qdq_surgeon.plan("model.onnx")
    qdq_surgeon.calibrate("model.onnx", plan, "data.npz", method="max").save("stats.npz")
    done = run(capsys, "model.onnx", *DATA, "--stats", "stats.npz", "--method", "auto")
    assert done.code == 2
    assert "these statistics hold ranges only, for the method max: calibrate again for another" in done.err


@pytest.mark.parametrize("more", [("--gptq",), ("--method", "auto")])
def test_they_are_for_float_models(more, folder, capsys):
    onnx.save(model(HALF_DONE), "half.onnx")
    done = run(capsys, "half.onnx", *DATA, *more)
    assert done.code == 2
    assert "is for float models, and this one comes with pairs: requantize or strip it" in done.err


def test_a_way_to_store_weights_that_there_is_not(folder, capsys):
    done = run(capsys, "model.onnx", *DATA, "--weights", "int4")
    assert done.code == 2
    assert "invalid choice: 'int4'" in done.err


def test_gptq_on_made_up_inputs_says_that_it_did_nothing(folder, capsys):
    done = run(capsys, "model.onnx", "--gptq")
    assert "gptq" in (done.out + done.err).lower()
