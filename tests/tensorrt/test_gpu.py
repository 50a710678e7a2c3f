"""Runs FP32, FP16 and INT8 engines. Skipped without a GPU."""

import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.model import load
from qdq_surgeon.tensorrt.engine import has_gpu
from qdq_surgeon.tensorrt.runs import compare_engines
from tests.graphs import typed

pytestmark = pytest.mark.skipif(not has_gpu(), reason="no GPU: engines cannot be run here")

NET = """g (float[N,32,32,32] x) => (y) <float[64,32,3,3] w, float[64,64,3,3] v, float[10,64] u> {
  a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a)
  c = Conv<pads=[1,1,1,1]>(b, v) d = Add(c, b) e = Relu(d)
  p = GlobalAveragePool(e) q = Flatten(p)
  y = Gemm<transB=1>(q, u)
}"""


@pytest.fixture(scope="module")
def report():
    model = load(typed(NET))
    data = np.random.default_rng(0).standard_normal((32, 32, 32, 32)).astype(np.float32)
    result = qdq_surgeon.quantize(model, {"x": data})
    return compare_engines(model, result.model, result.evaluation, "random data", True)


def test_three_engines_run(report):
    assert [run.precision for run in report.runs] == ["FP32", "FP16", "INT8"]
    assert all(run.latency.median > 0 and run.latency.p95 >= run.latency.median for run in report.runs)


def test_the_float_engines_agree_with_onnxruntime(report):
    fp32, fp16, int8 = (run.comparison.sqnr for run in report.runs)
    assert fp32 > 60
    assert fp16 > 40
    assert int8 > 20


def test_every_planned_op_runs_in_int8(report):
    assert report.audit.in_float == ()
    assert report.speedup is not None
