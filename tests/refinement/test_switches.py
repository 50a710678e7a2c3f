"""A switch at every pair: none is the float model, all is the Q/DQ model, one is the model with that pair alone."""

import dataclasses

import numpy as np
import onnx
import pytest

from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.existing import count_pairs
from qdq_surgeon.insertion import insert_pairs
from qdq_surgeon.model import load
from qdq_surgeon.pipeline import calibrate, choose, plan
from qdq_surgeon.refinement.switches import Switched
from tests.graphs import model
from tests.refinement.nets import NETS, prepared, rows, run

HALF = """g (float16[N,16] x) => (float16[N,32] y) <float16[16,32] w, float16[32] b, float16[32,32] v> {
    c = Gemm(x, w, b)
    r = Relu(c)
    y = MatMul(r, v)
}"""


def switched(quantized, source):
    return Switched(quantized, source.graph.outputs)


def results(switches, x, pairs):
    return switches.run(Batch({"x": x}, len(x)), pairs)


@pytest.mark.parametrize("net", NETS)
def test_none_is_the_float_model_and_all_is_the_quantized_one(net):
    text, shape = NETS[net]
    x = rows(4, *shape)
    source, _, quantized = prepared(text, x)
    switches = switched(quantized, source)
    assert len(switches.pairs) == count_pairs(quantized)
    none, every = results(switches, x, ()), results(switches, x, switches.pairs)
    expected, rounded = run(source.proto, {"x": x}), run(quantized, {"x": x}, simulate=True)
    for index, name in enumerate(source.graph.outputs):
        np.testing.assert_allclose(none[index], expected[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(every[index], rounded[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_one_is_the_model_with_that_pair_alone(net):
    """Up to values that lie between two levels, which float rounding may send to either."""
    text, shape = NETS[net]
    x = rows(4, *shape)
    source = load(model(text))
    whole = plan(source)
    scales = choose(source, whole, calibrate(source, whole, {"x": x}))
    switches = switched(insert_pairs(source, whole, scales, "1"), source)
    alone = [insert_pairs(source, dataclasses.replace(whole, sites=(site,)), scales, "1") for site in whole.sites]
    expected = [[run(proto, {"x": x}, simulate=True)[name] for name in source.graph.outputs] for proto in alone]
    found = [results(switches, x, (pair,)) for pair in switches.pairs]
    none = results(switches, x, ())
    assert len(found) == len(expected)
    nearest = [min(range(len(expected)), key=lambda at: distance(given, expected[at])) for given in found]
    assert sorted(nearest) == list(range(len(expected)))
    for given, at in zip(found, nearest, strict=True):
        assert distance(given, expected[at]) < 0.1 * distance(given, none)


def distance(left, right):
    return sum(float(np.linalg.norm(a - b)) for a, b in zip(left, right, strict=True))


def test_half_precision():
    x = rows(4, 16).astype(np.float16)
    source, _, quantized = prepared(HALF, x, opset=19)
    switches = switched(quantized, source)
    np.testing.assert_allclose(results(switches, x, ())[0], run(source.proto, {"x": x})["y"], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(
        results(switches, x, switches.pairs)[0], run(quantized, {"x": x}, True)["y"], rtol=1e-2, atol=1e-3
    )


def test_tensors_within_the_graph_can_be_asked_for():
    x = rows(4, 16, 8, 8)
    _, _, quantized = prepared(NETS["residual"][0], x)
    switches = Switched(quantized, ("c2", "s"))
    c2, s = results(switches, x, ())
    np.testing.assert_allclose(c2 + x, s, rtol=1e-5, atol=1e-5)


def test_the_quantized_model_stays_as_it_was():
    x = rows(4, 16, 8, 8)
    source, _, quantized = prepared(NETS["residual"][0], x)
    before = quantized.SerializeToString()
    switched(quantized, source)
    assert quantized.SerializeToString() == before
    onnx.checker.check_model(quantized)
