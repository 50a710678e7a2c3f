"""What can be said of engine runs without a GPU: the report, its verdict, profiles, the trtexec line."""

import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.comparison import Comparison
from qdq_surgeon.errors import QdqError
from qdq_surgeon.model import load
from qdq_surgeon.tensorrt.audit import Audit, Figures, OpAudit
from qdq_surgeon.tensorrt.engine import Backend, EngineError, has_gpu
from qdq_surgeon.tensorrt.runs import EngineReport, EngineRun, Latency, compare_engines, shapes_of
from qdq_surgeon.tensorrt.trtexec import trtexec_command
from tests.graphs import typed

NET = "g (float[N,16,8,8] x) => (y) <float[32,16,3,3] w> { c = Conv<pads=[1,1,1,1]>(x, w) y = Relu(c) }"


def report(runs=(), in_float=0):
    ops = tuple(
        OpAudit(f"Conv c{i}", f"c{i}", True, i >= in_float, 100, ("kernel",), "one-sided" if i < in_float else "")
        for i in range(4)
    )
    figures = Figures(10, 4 - in_float, 1.0, 0, 1000, 0)
    audit = Audit(Backend("tensorrt", "11.4", True), ops, figures, None, ())
    comparison = Comparison((), 8, "data", True)
    return EngineReport(
        audit.backend,
        audit,
        tuple(EngineRun(name, 1_000_000, Latency(median, median * 1.1, 8), comparison) for name, median in runs),
    )


def test_the_speedup_is_against_the_faster_float_engine():
    assert report([("FP32", 4.0), ("FP16", 1.9), ("INT8", 1.0)]).speedup == pytest.approx(1.9)
    assert report().speedup is None


def test_the_verdict_is_one_line_with_reasons():
    verdict = report([("FP32", 4.0), ("FP16", 1.9), ("INT8", 1.0)], in_float=1).verdict
    assert verdict == "; ".join(
        [
            "INT8 is 1.90x as fast as the best float engine",
            "3 of 4 planned ops run in INT8",
            "1 in float because of one-sided",
        ]
    )


def test_throughput_follows_from_the_median():
    assert Latency(median=2.0, p95=3.0, batch=8).throughput == pytest.approx(4000)


def test_the_profile_covers_all_batches():
    model = load(typed(NET))
    batches = [Batch({"x": np.zeros((size, 16, 8, 8), np.float32)}, size) for size in (8, 8, 3)]
    assert shapes_of(model, batches) == {"x": ((3, 16, 8, 8), (8, 16, 8, 8), (8, 16, 8, 8))}


def test_without_samples_there_is_nothing_to_run():
    with pytest.raises(QdqError, match="no samples"):
        shapes_of(load(typed(NET)), [])


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_without_a_gpu_the_report_says_what_it_left_out():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'qdq-surgeon[rtx]'")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'qdq-surgeon[rtx]'")
    model = load(typed(NET))
    data = np.random.default_rng(0).standard_normal((8, 16, 8, 8)).astype(np.float32)
    result = qdq_surgeon.quantize(model, {"x": data})
    done = compare_engines(model, result.model, result.evaluation, "data", False, backend="tensorrt-rtx")
    assert (done.runs, done.speedup) == ((), None)
    assert "left out: accuracy and latency in TensorRT, for lack of a GPU" in str(done)
    assert str(done).endswith("verdict: 1 of 1 planned op run in INT8")


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("trt10", "trtexec --onnx=m.onnx --saveEngine=m.engine --noTF32 --stronglyTyped"),
        ("trt11", "trtexec --onnx=m.onnx --saveEngine=m.engine --noTF32"),
        ("rtx", "tensorrt_rtx --onnx=m.onnx --saveEngine=m.engine --noTF32"),
    ],
)
def test_the_trtexec_line_is_that_of_the_version(target, line, tmp_path):
    model = load(typed("g (float[1,4] x) => (y) { y = Relu(x) }"))
    assert trtexec_command(model, tmp_path / "m.onnx", target).replace(f"{tmp_path}/", "") == line


def test_open_inputs_get_a_profile_on_the_trtexec_line(tmp_path):
    line = trtexec_command(load(typed(NET)), tmp_path / "m.onnx", "trt11")
    assert line.endswith("--minShapes=x:1x16x8x8 --optShapes=x:1x16x8x8 --maxShapes=x:1x16x8x8")


def test_an_unknown_target_gets_the_nearest_name(tmp_path):
    with pytest.raises(QdqError, match="Did you mean 'trt11'"):
        trtexec_command(load(typed(NET)), tmp_path / "m.onnx", "trt12")


def test_open_dimensions_must_be_stated(tmp_path):
    with pytest.raises(EngineError, match="--shapes x:1x3xNxN"):
        trtexec_command(load(typed("g (float[1,3,H,W] x) => (y) { y = Relu(x) }")), tmp_path / "m.onnx", "trt11")
