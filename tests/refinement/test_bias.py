"""Bias correction: shifts against closed forms, bounds and targets against NumPy and by name."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.edges import Plan
from qdq_surgeon.model import load
from qdq_surgeon.pipeline import calibrate, choose, insert
from qdq_surgeon.refinement.bias import best_shift, correct_biases, targets
from tests.graphs import model

FREE = (-np.inf, np.inf)
RELU = (0.0, np.inf)
RELU6 = (0.0, 6.0)


def shifted(expected, actual, bounds=FREE):
    """`best_shift` for one channel: one row of values per sample."""
    rows = [[np.asarray(values, np.float32)[None] for values in side] for side in (expected, actual)]
    (shift,) = best_shift(*rows, *(np.full(1, bound, np.float32) for bound in bounds))
    return float(shift)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def loss(expected, actual, bounds, shift=0.0):
    """What is left behind the activation, over all samples."""
    expected, actual = (
        np.concatenate([np.ravel(row) for row in side]).astype(np.float64) for side in (expected, actual)
    )
    return np.square(np.clip(expected, *bounds) - np.clip(actual + shift, *bounds)).mean()


# ---- shifts against closed forms --------------------------------------------------------------------------------


def test_without_an_activation_it_is_the_mean_error_times_the_james_stein_factor():
    actual = noise(6, 50)
    error = 0.3 + 0.5 * noise(6, 50, seed=1) + 0.2 * noise(6, 1, seed=2)
    means = error.mean(1)
    variance = means.var(ddof=1) / 6
    expected = means.mean() * (1 - variance / means.mean() ** 2)
    assert shifted(actual + error, actual) == pytest.approx(expected, rel=1e-4)


def test_samples_of_different_sizes_count_by_their_values():
    sizes = (10, 30, 60, 20)
    actual = [noise(size, seed=size) for size in sizes]
    errors = [1 + 0.3 * noise(size, seed=-size % 97) for size in sizes]
    total = sum(sizes)
    mean = sum(error.sum() for error in errors) / total
    variance = sum((error - mean).sum() ** 2 for error in errors) / total**2 * 4 / 3
    expected = mean * (1 - variance / mean**2)
    found = shifted([a + e for a, e in zip(actual, errors, strict=True)], actual)
    assert found == pytest.approx(expected, rel=1e-4)


def test_one_sample_is_believed():
    actual = noise(1, 50)
    error = noise(1, 50, seed=1)
    assert shifted(actual + error, actual) == pytest.approx(error.mean(), rel=1e-4)


@pytest.mark.parametrize("bounds", [FREE, RELU, RELU6])
@pytest.mark.parametrize("error", [0.25, -0.25, 1.5])
def test_a_constant_error_is_found_exactly(bounds, error):
    actual = 2 + 2 * noise(8, 200)
    assert shifted(actual + error, actual, bounds) == pytest.approx(error, abs=1e-3)


def test_a_channel_that_the_relu_cuts_off_gets_nothing():
    actual = -5 - np.abs(noise(8, 50))
    assert shifted(actual + 1, actual, RELU) == 0


def test_a_channel_above_the_clip_gets_nothing():
    actual = 10 + np.abs(noise(8, 50))
    assert shifted(actual - 1, actual, RELU6) == 0


def test_outliers_beyond_a_clip_do_not_move_it():
    """SqueezeNet: clipped ranges cost the largest values much, and the mean error would raise all others."""
    actual = 1 + np.abs(noise(8, 100))
    actual[:, :5] = 7
    expected = actual + 0.1
    expected[:, :5] = 60  # what the clipped range lost; the Clip cuts it off on both sides
    plain = float((expected - actual).mean())
    found = shifted(expected, actual, RELU6)
    assert found == pytest.approx(0.1, abs=1e-3)
    assert loss(expected, actual, RELU6, found) < loss(expected, actual, RELU6) < loss(expected, actual, RELU6, plain)


def test_a_channel_on_which_the_samples_disagree_gets_nothing():
    actual = noise(8, 100)
    signs = np.array([1, -1] * 4)[:, None]
    assert shifted(actual + signs + 0.01, actual) == 0


def test_a_channel_on_which_most_agree_gets_less_than_the_mean():
    actual = noise(8, 100)
    errors = np.array([1, 1, 1, 1, 1, 1, 1, -1])[:, None]
    mean, variance = errors.mean(), errors.var(ddof=1) / 8
    assert shifted(actual + errors, actual) == pytest.approx(mean * (1 - variance / mean**2), rel=1e-3)


def test_channels_do_not_see_each_other():
    actual = noise(8, 2, 50).astype(np.float32)
    expected = actual + np.array([[0.5], [-2.0]], np.float32)
    both = best_shift(list(expected), list(actual), np.full(2, -np.inf), np.full(2, np.inf))
    np.testing.assert_allclose(both, [0.5, -2.0], rtol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32)), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([FREE, RELU, RELU6]),
)
def test_the_loss_never_rises(samples, bounds):
    expected, actual = ([np.array([pair[side] for pair in sample]) for sample in samples] for side in (0, 1))
    found = shifted(expected, actual, bounds)
    before = loss(expected, actual, bounds)
    assert loss(expected, actual, bounds, found) <= before * (1 + 1e-4) + 1e-6


# ---- bounds -----------------------------------------------------------------------------------------------------


def targets_of(text_or_proto, opset=17, **filters):
    source = load(model(text_or_proto, opset) if isinstance(text_or_proto, str) else text_or_proto)
    return list(targets(source.graph, qdq_surgeon.plan(source, **filters)))


CONV_THEN = """g (float[N,16,8,8] x) => (float[N,16,6,6] y)
<float[16,16,3,3] w, float[16] b, float lo = {{-1}}, float hi = {{3}}> {{
    c = Conv(x, w, b)
    y = {}
}}"""


@pytest.mark.parametrize(
    ("activation", "bounds"),
    [
        ("Relu(c)", (0, np.inf)),
        ("Clip(c, lo, hi)", (-1, 3)),
        ("Clip(c, lo)", (-1, np.inf)),
        ("Clip(c, , hi)", (-np.inf, 3)),
        ("Clip(c)", (-np.inf, np.inf)),
        ("Sigmoid(c)", (-np.inf, np.inf)),
    ],
)
def test_the_activation_behind_bounds_what_counts(activation, bounds):
    (target,) = targets_of(CONV_THEN.format(activation))
    assert (set(target.low), set(target.high)) == ({bounds[0]}, {bounds[1]})


def test_a_computed_clip_bounds_nothing():
    (target,) = targets_of(CONV_THEN.format("Clip(c, m, hi)\n m = ReduceMin<keepdims=0>(x)"))
    assert (set(target.low), set(target.high)) == ({-np.inf}, {np.inf})


def test_a_clip_whose_bounds_have_one_dimension():
    text = CONV_THEN.replace("float lo", "float[1] lo").replace("float hi", "float[1] hi")
    (target,) = targets_of(text.format("Clip(c, lo, hi)"))
    assert (set(target.low), set(target.high)) == ({-1}, {3})


def test_an_activation_that_is_not_the_only_reader_bounds_nothing():
    text = """g (float[N,16,8,8] x) => (float[N,16,6,6] y, float[N,16,6,6] z) <float[16,16,3,3] w, float[16] b> {
        c = Conv(x, w, b)
        y = Relu(c)
        z = Sigmoid(c)
    }"""
    (target,) = targets_of(text)
    assert (set(target.low), set(target.high)) == ({-np.inf}, {np.inf})


NORMALIZED = """g (float[N,16,8,8] x) => (float[N,16,6,6] y)
<float[16,16,3,3] w, float[16] b, float[16] gain, float[16] shift, float[16] mean, float[16] variance> {
    c = Conv(x, w, b)
    n = BatchNormalization<epsilon=0.001>(c, gain, shift, mean, variance)
    y = Relu(n)
}"""


def with_values(proto, **values):
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values[tensor.name], np.float32), tensor.name))
    return proto


def test_an_unfolded_normalization_moves_the_bounds():
    """A value counts where moving it a little changes what Relu(BatchNormalization(value)) is, by NumPy."""
    rng = np.random.default_rng(0)
    gain = rng.standard_normal(16)
    gain[3] = gain[4] = 0
    shift, mean, variance = rng.standard_normal(16), rng.standard_normal(16), rng.uniform(0.1, 2, 16)
    proto = with_values(model(NORMALIZED), gain=gain, shift=shift, mean=mean, variance=variance)
    (target,) = targets_of(proto)

    def relu_of_bn(value):
        return np.maximum(
            0, gain[:, None] * (value - mean[:, None]) / np.sqrt(variance + 0.001)[:, None] + shift[:, None]
        )

    values = np.tile(np.linspace(-20, 20, 3999), (16, 1))
    step = 1e-6
    counts = relu_of_bn(values - step) != relu_of_bn(values + step)
    inside = (values > target.low[:, None]) & (values < target.high[:, None])
    live = gain != 0
    assert (gain[live] < 0).any()
    assert np.mean(counts[live] != inside[live]) < 1e-3
    assert set(target.low[~live]) == {-np.inf}
    assert set(target.high[~live]) == {np.inf}


def test_a_normalization_along_another_axis_than_the_bias():
    """BatchNormalization's channels are axis 1, those of a MatMul's bias the last axis."""
    text = """g (float[N,5,16] x) => (float[N,5,32] y)
    <float[16,32] w, float[32] b, float[5] gain, float[5] shift, float[5] mean, float[5] variance = {1, 1, 1, 1, 1}> {
        m = MatMul(x, w)
        a = Add(m, b)
        n = BatchNormalization(a, gain, shift, mean, variance)
        y = Relu(n)
    }"""
    (target,) = targets_of(text)
    assert target.low.shape == target.high.shape == (32,)


# ---- which biases -----------------------------------------------------------------------------------------------


def places(found):
    """Each target as 'node[slot] bias, channels along axis'."""
    return [f"{t.node.first_output}[{t.slot}] {t.bias or '-'}, {t.channels} along {t.axis}" for t in found]


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (
            "g (float[N,16,8,8] x) => (y) <float[32,16,3,3] w, float[32] b> { y = Conv(x, w, b) }",
            ["y[2] b, 32 along 1"],
        ),
        ("g (float[N,16,8,8] x) => (y) <float[32,16,3,3] w> { y = Conv(x, w) }", ["y[2] -, 32 along 1"]),
        (
            "g (float[N,32,8,8] x) => (y) <float[32,8,3,3] w> { y = ConvTranspose<group=2>(x, w) }",
            ["y[2] -, 16 along 1"],
        ),
        (
            "g (float[N,32,8,8] x) => (y) <float[32,8,3,3] w, float[32] b> { y = ConvTranspose<group=4>(x, w, b) }",
            ["y[2] b, 32 along 1"],
        ),
        ("g (float[N,16] x) => (y) <float[16,32] w, float[32] b> { y = Gemm(x, w, b) }", ["y[2] b, 32 along 1"]),
        (
            "g (float[N,16] x) => (y) <float[32,16] w, float[1,32] b> { y = Gemm<transB=1>(x, w, b) }",
            ["y[2] b, 32 along 1"],
        ),
        ("g (float[N,16] x) => (y) <float[16,32] w> { y = Gemm<beta=0.5>(x, w) }", ["y[2] -, 32 along 1"]),
        ("g (float[N,16] x) => (y) <float[16,32] w, float[32] b> { y = Gemm<beta=0.0>(x, w, b) }", []),
        ("g (float[4,16] x) => (y) <float[16,32] w, float[4,32] b> { y = Gemm(x, w, b) }", []),
        ("g (float[4,16] x) => (y) <float[16,32] w, float[4,1] b> { y = Gemm(x, w, b) }", []),
        ("g (float[4,16] x) => (y) <float[16,32] w, float b> { y = Gemm(x, w, b) }", []),
        ("g (float[4,16] x, float[32] b) => (y) <float[16,32] w> { y = Gemm(x, w, b) }", []),
        (
            "g (float[N,16] x) => (y) <float[16,32] w, float[32] b> { s = Sin(b)\n y = Gemm(x, w, s) }",
            ["y[2] s, 32 along 1"],
        ),
        (
            "g (float[N,5,16] x) => (y) <float[16,32] w, float[32] b> { m = MatMul(x, w)\n y = Add(m, b) }",
            ["y[1] b, 32 along -1"],
        ),
        (
            "g (float[N,5,16] x) => (y) <float[16,32] w, float[1,1,32] b> { m = MatMul(x, w)\n y = Add(b, m) }",
            ["y[0] b, 32 along -1"],
        ),
        ("g (float[N,5,16] x) => (y) <float[16,32] w, float[5,32] b> { m = MatMul(x, w)\n y = Add(m, b) }", []),
        ("g (float[N,5,16] x) => (y) <float[16,32] w> { m = MatMul(x, w)\n y = Add(m, m) }", []),
        ("g (float[N,5,16] x) => (y) <float[16,32] w> { y = MatMul(x, w) }", []),
        ("g (float[N,5,16] x) => (y, m) <float[16,32] w, float[32] b> { m = MatMul(x, w)\n y = Add(m, b) }", []),
        ("g (float[N,16] x) => (y) <float[16,32] w, float[32] b> { m = MatMul(x, w)\n y = Sub(m, b) }", []),
    ],
)
def test_the_biases_that_can_take_a_correction(graph, expected):
    assert places(targets_of(graph)) == expected


def test_a_shared_bias_is_a_target_twice_and_one_listed_as_input_too():
    text = """g (float[N,16] x) => (y, z) <float[16,32] w, float[16,32] v, float[32] b> {
        y = Gemm(x, w, b)
        z = Gemm(x, v, b)
    }"""
    proto = model(text)
    expected = ["y[2] b, 32 along 1", "z[2] b, 32 along 1"]
    assert places(targets_of(proto)) == expected
    proto.graph.input.append(helper.make_tensor_value_info("b", 1, [32]))
    assert places(targets_of(proto)) == expected


def test_ops_that_stay_float_and_ops_in_bodies_are_left_alone():
    text = """g (float[N,16] x, bool t) => (z) <float[16,32] w, float[16,32] v, float[32] b> {
        y = Gemm(x, w, b)
        f = Gemm(x, v, b)
        z = If (t) <
            then_branch = yes () => (float[N,32] a) { q = Gemm(x, w, b)\n a = Add(q, y) },
            else_branch = no () => (float[N,32] c) { c = Add(y, f) }
        >
    }"""
    assert places(targets_of(text, exclude="f")) == ["y[2] b, 32 along 1"]


def test_a_half_precision_bias_is_a_target():
    text = "g (float16[N,16] x) => (float16[N,32] y) <float16[16,32] w, float16[32] b> { y = Gemm(x, w, b) }"
    assert places(targets_of(text, opset=19)) == ["y[2] b, 32 along 1"]


# ---- the whole correction ---------------------------------------------------------------------------------------

NET = """g (float[N,16,8,8] x) => (float[N,16] y)
<float[16,16,3,3] w, float[16] b, float[16,16,3,3] w2, float[16,576] fw, float[16] fb> {
    c = Conv(x, w, b)
    r = Relu(c)
    c2 = Conv<pads=[1,1,1,1]>(r, w2)
    r2 = Relu(c2)
    f = Flatten(r2)
    y = Gemm<transB=1>(f, fw, fb)
}"""


def images(count, *shape, seed=3):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def quantized_model(proto, x):
    source = load(proto)
    plan = qdq_surgeon.plan(source)
    scales = choose(source, plan, calibrate(source, plan, {"x": x}))
    return source, plan, insert(source, plan, scales)


def outputs(proto, feed):
    session = Session(proto, simulate=True)
    return session.run(Batch(feed, len(feed["x"])), session.outputs)[0]


def singles(x):
    return [Batch({"x": x[index : index + 1]}, 1) for index in range(len(x))]


def biased(proto):
    """The Q/DQ model as the correction gets it, with weights that a channel's error is plain in."""
    weights = {t.name: numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    weights["w"][:, 0] += 0.3
    return with_values(proto, **weights)


def test_a_planted_bias_is_taken_back():
    """The Q/DQ model with every bias off by a constant: the correction finds these constants."""
    x = np.abs(images(24, 16, 8, 8))
    source, plan, quantized = quantized_model(model(NET), x)
    off = np.linspace(-0.5, 0.5, 16).astype(np.float32)
    (bias,) = (tensor for tensor in quantized.graph.initializer if tensor.name == "fb")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - off, "fb"))
    done = correct_biases(source, plan, quantized, singles(x))
    assert done.kept
    (found,) = (shift for edge, shift in done.shifts.items() if edge.reader == "y")
    np.testing.assert_allclose(found, off, atol=0.05)
    assert (done.candidates, done.fitted, done.judged) == (3, 16, 8)


def test_a_correction_that_does_not_help_leaves_no_shifts():
    x = images(24, 16, 8, 8)
    source, plan, _ = quantized_model(model(NET), x)
    done = correct_biases(source, plan, source.proto, singles(x))
    assert not done.kept
    assert done.shifts == {}
    assert "not corrected" in str(done)


def test_with_too_few_samples_to_judge_on_it_says_so():
    x = np.abs(images(2, 16, 8, 8))
    done = correct_biases(*quantized_model(model(NET), x), singles(x))
    assert (done.fitted, done.judged) == (2, 0)
    assert "on the samples it was fitted on" in str(done)


def test_what_the_report_counts_is_what_was_done():
    x = np.abs(images(24, 16, 8, 8))
    done = correct_biases(*quantized_model(biased(model(NET)), x), singles(x))
    assert f"{len(done.values)} of 3 biases" in str(done)
    assert f"fitted on {done.fitted} samples" in str(done)
    kept = dataclasses.replace(done, after=done.before)
    assert not kept.kept


def test_the_result_with_shifts_is_nearer_to_the_float_model_on_other_data():
    """Over samples that the correction never saw."""
    x, fresh = np.abs(images(64, 16, 8, 8)), np.abs(images(64, 16, 8, 8, seed=9))
    proto = biased(model(NET))
    errors = {}
    for on in (True, False):
        result = qdq_surgeon.quantize(proto, {"x": x}, method="percentile:99", bias_correction=on, compare=False)
        (expected,), (actual,) = (outputs(each, {"x": fresh}) for each in (proto, result.model))
        errors[on] = float(np.square(expected - actual).sum())
    assert errors[True] < errors[False]


def test_a_bias_that_a_rule_quantizes(tmp_path):
    """A bias behind a pair of its own is shifted in front of it, or left: no reason to refuse the model."""
    rule = tmp_path / "bias.toml"
    rule.write_text(
        '[[rule]]\nname = "all"\nmatch = "Conv(x, w, b)"\nquantize = ["x", "w", "b"]\naxis = { w = 0 }\nbecause = "b"\n'
    )
    text = "g (float[N,16,8,8] x) => (y) <float[16,16,3,3] w, float[16] b> { y = Conv(x, w, b) }"
    x = np.abs(images(24, 16, 8, 8))
    result = qdq_surgeon.quantize(model(text), {"x": x}, placement=rule, method="percentile:90", compare=False)
    assert sum(node.op_type == "DequantizeLinear" for node in result.model.graph.node) == 3


UNJUDGED = {
    "class indices": ("int64", "ArgMax<axis=1, keepdims=0>(c)"),
    "doubles": ("double[N,32]", "Cast<to=11>(c)"),
}


@pytest.mark.parametrize("case", UNJUDGED)
def test_a_model_without_float_outputs_claims_no_sqnr(case):
    kind, last = UNJUDGED[case]
    text = f"""g (float[N,16] x) => ({kind} y) <float[16,32] w, float[32] b> {{
        c = Gemm(x, w, b)
        y = {last}
    }}"""
    result = qdq_surgeon.quantize(model(text), {"x": images(24, 16)}, compare=False)
    assert "120.0 dB" not in str(result.correction)


def test_shifts_are_the_same_whatever_batches_the_samples_come_in():
    x = np.abs(images(32, 16, 8, 8))
    proto = biased(model(NET))
    found = []
    for batch in (1, 8):
        feeds = [{"x": x[index : index + batch]} for index in range(0, 32, batch)]
        result = qdq_surgeon.quantize(proto, feeds, samples=24, compare=False)
        found.append({edge.reader: shift for edge, shift in result.correction.values.items()})
    assert found[0].keys() == found[1].keys()
    for reader, shift in found[0].items():
        np.testing.assert_allclose(shift, found[1][reader], atol=1e-5)


def test_the_plan_decides_what_is_corrected():
    x = np.abs(images(24, 16, 8, 8))
    source, plan, quantized = quantized_model(model(NET), x)
    nothing = dataclasses.replace(plan, sites=())
    assert isinstance(nothing, Plan)
    done = correct_biases(source, nothing, quantized, singles(x))
    assert (done.candidates, done.values) == (0, {})
