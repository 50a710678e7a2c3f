"""One pass of onnxruntime gives the statistics that onnx's own reference evaluator gives for the same data."""

import numpy as np
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qdq_surgeon.calibration.feeds import Split, read_data
from qdq_surgeon.calibration.taps import collect, tap
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
    collected(model(CONV_RELU), ["c"], images(20), progress=lambda *step: told.append(step))
    assert told == [("calibrate", 8, 20), ("calibrate", 16, 20), ("calibrate", 20, 20)]


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
