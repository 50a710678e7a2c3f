"""Two models side by side: what a walk computes is what a plain run computes, and what a visit changes goes on."""

import numpy as np
import pytest

from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.model import load
from qdq_surgeon.refinement.lockstep import (
    ENOUGH,
    FEWEST,
    MOST_SAMPLES,
    apart,
    evenly,
    fitting_samples,
    walk,
)
from tests.graphs import model
from tests.refinement.nets import CONCAT, NETS, OUTPUTS, RESIDUAL, prepared, rows, run, singles


def top_tensors(source):
    """What the ops with inputs that are computed make, in the top graph."""
    graph = source.graph
    return [node.first_output for node in graph.nodes if not node.scope and not graph.is_constant(node.first_output)]


@pytest.mark.parametrize("stops", ["nowhere", "everywhere"])
@pytest.mark.parametrize("net", NETS)
def test_both_models_compute_what_a_plain_run_does(net, stops):
    text, shape = NETS[net]
    x = rows(5, *shape)
    source, _, quantized = prepared(text, x)
    floats = tuple(name for name in source.graph.outputs)
    found = walk(source, quantized, singles(x), floats, top_tensors(source) if stops == "everywhere" else ())
    assert [both.name for both in found] == list(floats)
    for index in range(5):
        feed = {"x": x[index : index + 1]}
        expected, rounded = run(source.proto, feed), run(quantized, feed, simulate=True)
        for both in found:
            np.testing.assert_allclose(both.float[index], expected[both.name], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(both.int8[index], rounded[both.name], rtol=1e-5, atol=1e-5)
            assert np.abs(both.float[index] - both.int8[index]).max() > 1e-4


@pytest.mark.parametrize("net", NETS)
def test_a_visit_sees_every_stop_once_and_producers_first(net):
    text, shape = NETS[net]
    x = rows(3, *shape)
    source, _, quantized = prepared(text, x)
    seen = []
    walk(source, quantized, singles(x), source.graph.outputs, top_tensors(source), lambda both: seen.append(both.name))
    assert sorted(seen) == sorted(top_tensors(source))
    for node in (source.graph.producer(name) for name in seen):
        earlier = seen[: seen.index(node.first_output)]
        assert all(name in earlier for name in node.inputs if name in seen)


def test_a_visit_sees_the_tensors_themselves():
    x = rows(3, 16, 8, 8)
    source, _, quantized = prepared(OUTPUTS, x)
    seen = {}
    walk(
        source, quantized, singles(x), ("y",), ("r",), lambda both: seen.update(f=both.float.copy(), i=both.int8.copy())
    )
    np.testing.assert_allclose(np.concatenate(seen["f"]), run(source.proto, {"x": x})["r"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(seen["i"]), run(quantized, {"x": x}, True)["r"], rtol=1e-5, atol=1e-5)


def test_what_a_visit_changes_is_what_later_nodes_read():
    """In the Q/DQ model only: every later reader, other outputs among them, goes on with the changed values."""
    x = rows(3, 16, 8, 8)
    source, _, quantized = prepared(OUTPUTS, x)

    def silence(both):
        for array in both.int8:
            array[:] = 0

    found = {b.name: b for b in walk(source, quantized, singles(x), ("r", "y", "p"), ("r",), silence)}
    assert all((array == 0).all() for array in found["r"].int8)
    bias = run(quantized, {"x": x}, True)["y"] * 0
    # r = 0 makes d = 0 (no bias), so y is its bias and p is 0
    for array in found["y"].int8:
        np.testing.assert_array_equal(array, found["y"].int8[0])
        assert array.shape == bias[:1].shape
    assert all((array == 0).all() for array in found["p"].int8)
    expected = run(source.proto, {"x": x})
    for name in ("r", "y", "p"):
        np.testing.assert_allclose(np.concatenate(found[name].float), expected[name], rtol=1e-5, atol=1e-5)


def test_a_graph_input_may_be_a_result_too():
    x = rows(3, 16, 8, 8)
    source, _, quantized = prepared(RESIDUAL, x)
    (both, _) = walk(source, quantized, singles(x), ("x", "z"))
    np.testing.assert_array_equal(np.concatenate(both.float), x)


def test_the_order_of_the_samples_stays():
    x = rows(20, 16, 8, 8)
    source, _, quantized = prepared(CONCAT, x)
    (both,) = walk(source, quantized, singles(x), ("y",))
    np.testing.assert_allclose(np.concatenate(both.float), run(source.proto, {"x": x})["y"], rtol=1e-4, atol=1e-4)


# ---- which samples ----------------------------------------------------------------------------------------------


def batches_of(x, size):
    pieces = [x[index : index + size] for index in range(0, len(x), size)]
    return [Batch({"x": piece}, len(piece), frozenset({"x"})) for piece in pieces]


def sizes(batches):
    return [len(batch.feed["x"]) for batch in batches]


@pytest.mark.parametrize("net", ["residual", "concat", "several outputs"])
def test_samples_come_apart_where_the_model_allows_it(net):
    text, shape = NETS[net]
    x = rows(7, *shape)
    found = apart(load(model(text)), batches_of(x, 4))
    assert sizes(found) == [1] * 7
    np.testing.assert_array_equal(np.concatenate([batch.feed["x"] for batch in found]), x)


TOGETHER = {
    "each sample reads all": "g (float[N,4] x) => (y) { m = ReduceMean<axes=[0], keepdims=1>(x)\n y = Sub(x, m) }",
    "a Softmax over the batch": "g (float[N,4] x) => (y) { y = Softmax<axis=0>(x) }",
    "an output per batch": "g (float[N,4] x) => (y) { y = ReduceSum<keepdims=0>(x) }",
    "samples along axis 1": "g (float[N,4] x) => (y) { y = Transpose<perm=[1,0]>(x) }",
}


@pytest.mark.parametrize("case", TOGETHER)
def test_batches_stay_whole_where_axis_0_holds_no_samples(case):
    assert sizes(apart(load(model(TOGETHER[case])), batches_of(rows(8, 4), 4))) == [4, 4]


def test_batches_stay_whole_where_an_output_has_as_many_columns_as_the_data_say():
    text = "g (float[N,4] x) => (y) { r = Relu(x)\n y = NonZero(r) }"
    x = np.tile(np.tri(4, dtype=np.float32), (2, 1))  # one value, two values ...
    assert sizes(apart(load(model(text)), batches_of(x, 4))) == [4, 4]


def test_batches_that_cannot_be_cut_stay_whole():
    batches = [Batch({"x": rows(4, 16, 8, 8)}, 4)]
    assert apart(load(model(RESIDUAL)), batches) == batches


def test_no_batches_are_no_samples():
    assert apart(load(model(RESIDUAL)), []) == []
    assert fitting_samples(load(model(RESIDUAL)), []) == []


@pytest.mark.parametrize(
    ("number", "expected"), [(10, list(range(10))), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0])]
)
def test_samples_are_evenly_spread(number, expected):
    assert evenly(list(range(10)), number) == expected


def test_one_sample_in_three_but_enough_and_not_too_many():
    source = load(model(RESIDUAL))
    for given, expected in ((10, 10), (24, 24), (60, ENOUGH), (120, 40), (400, MOST_SAMPLES)):
        assert len(fitting_samples(source, batches_of(rows(given, 16, 8, 8), 8))) == expected


WIDE = """g (float[N,16,256,256] x) => (float[N,16,256,256] z) <float[16,16,1,1] w> {
    c = Conv(x, w)
    z = Add(c, x)
}"""


def test_a_memory_budget_takes_fewer_samples():
    """At the Add, x is fed and c and z are held: 8 MiB of one sample in each of two models, twice."""
    source = load(model(WIDE))
    x = np.zeros((1, 16, 256, 256), np.float32)
    samples = [Batch({"x": x}, 1)] * 30
    assert len(fitting_samples(source, samples)) == (256 << 20) // (2 * 8 << 20)
    assert len(fitting_samples(source, samples, memory=1)) == FEWEST
