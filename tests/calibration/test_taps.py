"""One pass of onnxruntime gives the statistics that onnx's own reference evaluator gives for the same data."""

import numpy as np
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qdq_surgeon.calibration import taps
from qdq_surgeon.calibration.feeds import Batch, read_data
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.calibration.taps import Session, collect, largest, tap
from qdq_surgeon.errors import DataError, ModelError
from qdq_surgeon.model import load
from tests.graphs import model

CONV_RELU = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
}"""

RUNS_ONE_SAMPLE_ONLY = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[1024,16] v, int64[2] flat = {1, 1024}> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    f = Reshape(c, flat)
    y = MatMul(f, v)
}"""


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def test_statistics_equal_those_of_the_reference_evaluator():
    proto, x = model(CONV_RELU), images(20)
    expected = computed(proto, x, ["c", "r", "y"])
    for name, statistic in collected(proto, ["x", "c", "r", "y"], x).items():
        assert statistic.count == expected[name].size
        assert statistic.minimum == pytest.approx(expected[name].min(), rel=1e-5, abs=1e-6)
        assert statistic.maximum == pytest.approx(expected[name].max(), rel=1e-5)
        assert_same_histogram(statistic, expected[name])


def test_the_statistics_of_a_graph_input_are_those_of_the_data():
    x = images(5)
    statistic = collected(model(CONV_RELU), ["x"], x)["x"]
    assert (statistic.minimum, statistic.maximum, statistic.count) == (x.min(), x.max(), x.size)


def test_an_input_needs_no_run_of_the_model():
    """onnxruntime does not know the op, and is not asked."""
    proto = model("g (float[N,3,8,8] x) => (float y) { y = Relu(x) }")
    proto.graph.node[0].op_type = "Unheard"
    assert collected(proto, ["x"], images(2))["x"].count == 2 * 3 * 8 * 8


def test_a_tensor_that_is_an_output_already_is_not_tapped_twice():
    proto = model(CONV_RELU)
    tapped = tap(load(proto), ["c", "y"])
    assert [value.name for value in tapped.graph.output] == ["y", "c"]


def test_tapping_leaves_the_model_as_it_was():
    proto = model(CONV_RELU)
    before = proto.SerializeToString()
    collected(proto, ["c"], images(2))
    assert proto.SerializeToString() == before


def test_a_model_that_runs_one_sample_at_a_time_is_calibrated_on_all_of_them():
    proto, x = model(RUNS_ONE_SAMPLE_ONLY), images(10)
    expected = np.concatenate([computed(proto, x[i : i + 1], ["f"])["f"] for i in range(10)])
    statistic = collected(proto, ["f"], x)["f"]
    assert statistic.count == expected.size
    assert_same_histogram(statistic, expected)


def test_fp16_tensors_are_tapped():
    proto = model("g (float16[N,16] x) => (y) <float16[16,16] w> { m = MatMul(x, w)\n y = Relu(m) }", opset=19)
    x = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float16)
    statistic = collected(proto, ["m"], x)["m"]
    assert statistic.maximum == pytest.approx(computed(proto, x, ["m"])["m"].max(), rel=2e-3)


def test_what_the_model_makes_of_a_log_of_negatives_is_not_finite():
    proto = model("g (float[N,3,8,8] x) => (y) { y = Log(x) }")
    x = images(4)
    statistic = collected(proto, ["y"], x)["y"]
    assert (statistic.count, statistic.non_finite) == (np.sum(x > 0), np.sum(x < 0))


def test_a_tensor_that_held_nan_or_infinity_is_warned_of_once(caplog):
    proto = model("g (float[N,3,8,8] x) => (y) { t = Log(x)\n y = Neg(x) }")
    x = images(20)
    collected(proto, ["t", "y"], x)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"'t' held {np.sum(x < 0)} NaN or infinite values during calibration")


DOUBLED_IN_THE_GRAPH = "g (bool c, float[N] x) => (y) { r = Relu(x)\n y = Neg(r) }"
DOUBLED_IN_A_BODY = """g (bool c, float[N] x) => (y) {
    y = If<
        then_branch = yes () => (float[N] a) { n = Relu(x)\n a = Neg(n) },
        else_branch = no () => (float[N] b) { b = Neg(x) }
    >(c)
}"""
DOUBLED_IN_A_FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (bool c, float[N] x) => (float[N] y) { y = own.f(x) }
<domain: "own", opset_import: ["" : 17]> f (p) => (q) { n = Relu(p)\n q = Neg(n) }"""


@pytest.mark.parametrize("text", [DOUBLED_IN_THE_GRAPH, DOUBLED_IN_A_BODY, DOUBLED_IN_A_FUNCTION])
def test_doubled_node_names_do_not_keep_a_model_from_running_and_stay_in_it(text):
    proto = model(text)
    for nodes in (
        proto.graph.node,
        *(f.node for f in proto.functions),
        *(b.g.node for b in proto.graph.node[0].attribute),
    ):
        for node in nodes:
            node.name = "twin"
    before = proto.SerializeToString()
    batch = Batch({"c": np.array(True), "x": np.float32([-1, 2])}, 2)
    np.testing.assert_array_equal(Session(proto).run(batch, ["y"])[0][0], [0, -2])
    assert proto.SerializeToString() == before


def test_a_trial_gives_the_reason_and_opens_one_session(monkeypatch):
    opened = []
    monkeypatch.setattr(taps, "Session", lambda proto: opened.append(proto) or Session(proto))
    runs = taps.trial(model(CONV_RELU))
    assert not opened
    assert runs({"x": images(1)}) is None
    assert "rank" in runs({"x": images(1)[0]})
    assert len(opened) == 1


def test_a_model_that_onnxruntime_refuses_is_named_in_one_line():
    proto = model(CONV_RELU)
    proto.graph.node[1].domain = "nobody"
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    with pytest.raises(ModelError, match=r"onnxruntime refuses the model.*nobody") as error:
        collected(proto, ["c"], images(2))
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_run_on_the_data_is_named_in_one_line():
    """Indices beyond the table."""
    proto = model("g (int64[N] i) => (y) <float[4,2] table> { y = Gather(table, i) }")
    with pytest.raises(DataError, match="onnxruntime cannot run the model on the data") as error:
        collected(proto, ["y"], np.array([9, 9, 9]), "i")
    assert "\n" not in str(error.value)


def test_progress_is_told_after_every_batch():
    told = []
    collected(model(CONV_RELU), ["c"], images(12), progress=lambda *step: told.append(step))
    assert told == [("calibrate", 8, 12), ("calibrate", 12, 12)]


def test_progress_may_stop_the_run_by_raising():
    def stop(stage, done, total):
        raise TimeoutError

    with pytest.raises(TimeoutError):
        collected(model(CONV_RELU), ["c"], images(20), progress=stop)


def collected(proto, tensors, array, name="x", progress=None):
    loaded = load(proto)
    split = Split(read_data({name: array}, loaded), hold_out=False)
    return collect(loaded, tensors, split, split.feeds.total, progress)


def computed(proto, x, names):
    """Tensors as onnx's reference evaluator computes them."""
    copy = tap(load(proto), names)
    return {"x": x} | dict(zip(names, ReferenceEvaluator(copy).run(names, {"x": x}), strict=True))


def assert_same_histogram(statistic, values):
    """Equal but for the few values that rounding puts on the other side of a bucket's edge."""
    bits = np.abs(values.astype(np.float32)).view(np.uint32).reshape(-1) >> 16
    expected = np.bincount(bits, minlength=statistic.histogram.size)
    assert np.abs(statistic.histogram - expected).sum() <= max(4, 0.002 * values.size)


def test_the_largest_value_of_every_activation_leaves_infinity_out():
    """A mask of -inf is exact in FP16."""
    text = "g (float[N,4] x) => (y) { a = Log(x) b = Abs(x) y = Add(a, b) }"
    x = np.array([[0, 1, 2, 3], [4, 5, 6, 100]], np.float32)
    loaded = load(model(text))
    found = largest(loaded, read_data({"x": x}, loaded).batches)
    assert found["a"] == pytest.approx(np.log(100))
    assert found["b"] == 100
