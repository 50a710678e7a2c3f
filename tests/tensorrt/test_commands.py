"""lint, build and audit as a user types them, and what qdq-insert offers for TensorRT."""

import importlib.util
import json
import shutil
from pathlib import Path

import onnx
import pytest

from qdq_surgeon.cli import insert_main, main
from qdq_surgeon.tensorrt.engine import has_gpu

MODELS = Path(__file__).parents[1] / "models"
rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("digits.onnx", "digits_calibration.npz", "digits_test.npz"):
        shutil.copy(MODELS / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert insert("--quiet") == 0
    return tmp_path


def insert(*words):
    return insert_main(["digits.onnx", "--data", "digits_calibration.npz", *words])


def test_our_output_lints_clean_but_for_the_fp32_rest(folder, capsys):
    assert main(["lint", "digits.qdq.onnx", "--json", "lint.json"]) == 0
    assert "0 errors, 1 warning for trt11" in capsys.readouterr().out
    found = json.loads(Path("lint.json").read_text())
    assert [finding["code"] for finding in found["findings"]] == ["fp32-rest"]


def test_in_float16_nothing_is_left_to_warn_of(folder, capsys):
    assert insert("--float16", "--no-compare") == 0
    assert main(["lint", "digits.qdq.onnx"]) == 0
    assert "0 errors, 0 warnings for trt11" in capsys.readouterr().out


def test_errors_exit_with_1_and_fix_mends_them(folder, capsys):
    broken = onnx.load("digits.qdq.onnx")
    next(node for node in broken.graph.node if node.op_type == "DequantizeLinear" and node.attribute).ClearField(
        "attribute"
    )
    onnx.save(broken, "broken.onnx")
    assert main(["lint", "broken.onnx"]) == 1
    assert "axis-missing" in capsys.readouterr().out
    assert main(["lint", "broken.onnx", "--fix", "mended.onnx"]) == 0
    assert main(["lint", "mended.onnx", "--quiet"]) == 0


def test_an_unknown_target_is_refused(folder, capsys):
    assert main(["lint", "digits.qdq.onnx", "--target", "trt12"]) == 2
    assert "Did you mean" in capsys.readouterr().err


@rtx
def test_build_writes_an_engine(folder, capsys):
    assert main(["build", "digits.qdq.onnx", "--shapes", "image:1x1x8x8,8x1x8x8,32x1x8x8"]) == 0
    out = capsys.readouterr().out
    assert "image: 1x1x8x8 / 8x1x8x8 / 32x1x8x8" in out
    assert "strongly typed, TF32 off" in out
    assert Path("digits.qdq.engine").stat().st_size > 1000


@rtx
def test_audit_says_what_ran_in_int8(folder, capsys):
    assert main(["audit", "digits.qdq.onnx", "--json", "audit.json", "--html", "audit.html"]) == 0
    assert "8 of 8 planned ops run in INT8" in capsys.readouterr().out
    assert all(op["int8"] for op in json.loads(Path("audit.json").read_text())["ops"] if op["planned"])
    assert Path("audit.html").read_text().startswith("<!doctype html>")


@rtx
@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_engine_as_the_last_step_of_the_one_command(folder, capsys):
    assert insert("--engine", "--float16") == 0
    assert "verdict: 8 of 8 planned ops run in INT8" in capsys.readouterr().out
    assert insert("--engine", "--min-speedup", "1.2") == 2
    assert "no GPU to measure on" in capsys.readouterr().err


def test_trtexec_is_printed_for_the_output(folder, capsys):
    assert insert("--trtexec", "trt10", "--no-compare") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("trtexec --onnx=digits.qdq.onnx")


def test_a_calibration_cache_goes_out_and_in(folder, capsys):
    assert insert("--write-cache", "digits.cache", "--no-compare", "--no-bias-correction") == 0
    before = {t.name: t for t in onnx.load("digits.qdq.onnx").graph.initializer}
    assert insert_main(["digits.onnx", "--calibration-cache", "digits.cache", "--no-compare"]) == 0
    after = {t.name: t for t in onnx.load("digits.qdq.onnx").graph.initializer}
    assert before == after
    assert capsys.readouterr().err == ""


def test_float16_io_alone_is_refused(folder, capsys):
    assert insert("--float16-io") == 2
    assert "--float16-io goes with --float16" in capsys.readouterr().err
