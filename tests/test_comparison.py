"""The figures of a comparison against their closed forms in NumPy."""

import math

import numpy as np
import pytest
from onnx import numpy_helper

import qdq_surgeon
from qdq_surgeon.errors import DataError, QdqError
from tests.graphs import model

IDENTITY = "g (float[N,10] x) => (y) { y = Identity(x) }"
ROUGH = "g (float[N,10] x) => (y) { t = Round(x)\n y = Identity(t) }"
"""The same output, rounded to whole numbers."""


def data(count=20, width=10, seed=0):
    return (3 * np.random.default_rng(seed).standard_normal((count, width))).astype(np.float32)


def test_figures_equal_their_closed_forms():
    x = data()
    ref, test = x.astype(np.float64), np.rint(x).astype(np.float64)
    (output,) = compared(IDENTITY, ROUGH, x).outputs
    assert output.name == "y"
    assert output.sqnr == pytest.approx(10 * math.log10((ref**2).sum() / ((ref - test) ** 2).sum()))
    assert output.cosine == pytest.approx((ref * test).sum() / np.linalg.norm(ref) / np.linalg.norm(test))
    assert output.max_error == pytest.approx(np.abs(ref - test).max())
    assert output.agreement == np.mean(ref.argmax(1) == test.argmax(1))
    assert 0 < output.agreement < 1


def test_a_constant_factor_has_a_known_sqnr_and_a_cosine_of_1():
    """An error of a tenth of the signal is 20 dB."""
    (output,) = compared(
        IDENTITY, "g (float[N,10] x) => (y) { k = Constant<value_float=0.9>()\n y = Mul(x, k) }", data()
    ).outputs
    assert output.sqnr == pytest.approx(20, rel=1e-5)
    assert output.cosine == pytest.approx(1)
    assert output.agreement == 1


def test_opposite_outputs_have_a_cosine_of_minus_1():
    (output,) = compared(IDENTITY, "g (float[N,10] x) => (y) { y = Neg(x) }", data()).outputs
    assert output.cosine == pytest.approx(-1)
    assert output.sqnr == pytest.approx(-10 * math.log10(4))


def test_equal_models_are_exact():
    comparison = compared(IDENTITY, IDENTITY, data())
    (output,) = comparison.outputs
    assert (output.sqnr, output.cosine, output.max_error, output.agreement) == (math.inf, pytest.approx(1), 0, 1)
    assert "exact" in str(comparison)


def test_outputs_of_nothing_but_zeros_are_exact():
    (output,) = compared(IDENTITY, IDENTITY, np.zeros((4, 10), np.float32)).outputs
    assert (output.sqnr, output.cosine, output.max_error) == (math.inf, 1, 0)


def test_noise_on_an_output_of_zeros_is_infinitely_bad():
    noisy = "g (float[N,10] x) => (y) { k = Constant<value_float=1.0>()\n y = Add(x, k) }"
    (output,) = compared(IDENTITY, noisy, np.zeros((4, 10), np.float32)).outputs
    assert (output.sqnr, output.cosine, output.max_error) == (-math.inf, 0, 1)


def test_infinity_in_the_same_place_of_both_outputs_is_no_error():
    """Masked scores are -inf."""
    masking = "g (float[N,10] x) => (y) { y = Log(x) }"
    comparison = compared(masking, masking, np.abs(data()) * (data(seed=1) > 0))
    assert (comparison.sqnr, comparison.outputs[0].max_error) == (math.inf, 0)


def test_a_nan_that_the_float_model_does_not_have_is_an_error_without_bound():
    (output,) = compared(IDENTITY, "g (float[N,10] x) => (y) { y = Sqrt(x) }", data()).outputs
    assert not output.sqnr > 0
    assert not math.isfinite(output.max_error)


def test_an_output_of_nothing_but_nan_has_no_cosine():
    comparison = compared(IDENTITY, "g (float[N,10] x) => (y) { y = Sqrt(x) }", -1 - np.abs(data()))
    (output,) = comparison.outputs
    assert output.sqnr == -math.inf
    assert math.isnan(output.cosine)
    assert str(comparison).splitlines()[2].split()[1:4] == ["-inf", "dB", "nan"]


@pytest.mark.parametrize(
    ("shape", "like_scores"),
    [
        ((6, 10), True),
        ((6, 10, 1, 1), True),
        ((6, 2), True),
        ((6, 1), False),
        ((6,), False),
        ((6, 10, 1), False),
        ((6, 10, 4), False),
        ((6, 3, 8, 8), False),
    ],
)
def test_agreement_is_measured_where_the_output_looks_like_class_scores(shape, like_scores):
    text = f"g (float[{','.join(map(str, ('N', *shape[1:])))}] x) => (y) {{ y = Identity(x) }}"
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    comparison = compared(text, text, x)
    assert comparison.agreement == (1 if like_scores else None)
    assert comparison.outputs[0].agreement == comparison.agreement


@pytest.mark.parametrize("cut", [1, 3, 7, 20])
def test_batches_of_any_size_give_the_same_figures(cut):
    x = data()
    whole = compared(IDENTITY, ROUGH, x)
    pieces = compared(IDENTITY, ROUGH, [{"x": x[i : i + cut]} for i in range(0, 20, cut)])
    assert (pieces.samples, pieces.agreement) == (20, whole.agreement)
    for figure in ("sqnr", "cosine", "max_error"):
        assert getattr(pieces.outputs[0], figure) == pytest.approx(getattr(whole.outputs[0], figure))


def test_integer_outputs_are_compared_and_have_no_agreement():
    """Which class is the largest: [samples, 2] of whole numbers, but no scores."""
    top2 = "g (float[N,10] x) => (v, i) {{ k = Constant<value_ints=[2]>()\n {}v, i = TopK(t, k) }}"
    x = data()
    order = {
        "float": np.argsort(-x, 1, kind="stable")[:, :2],
        "rough": np.argsort(-np.rint(x), 1, kind="stable")[:, :2],
    }
    outputs = compared(top2.format("t = Identity(x)\n "), top2.format("t = Round(x)\n "), x).outputs
    values, indices = outputs
    assert (values.name, indices.name) == ("v", "i")
    assert indices.agreement is None
    assert indices.max_error == np.abs(order["float"] - order["rough"]).max()


def test_the_worst_output_counts():
    text = "g (float[N,10] x) => (good, bad) {{ good = Identity(x)\n bad = {}(x) }}"
    comparison = compared(text.format("Identity"), text.format("Round"), data())
    by_name = {output.name: output for output in comparison.outputs}
    assert by_name["good"].sqnr == math.inf
    assert comparison.sqnr == by_name["bad"].sqnr < 40
    assert comparison.agreement == by_name["bad"].agreement


def test_pairs_round_exactly_where_they_stand():
    """An integer kernel of onnxruntime in their place would give other numbers."""
    qdq = """g (float[N,10] x) => (y) <float s = {0.1}, float t = {0.0079}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        p = Softmax(d)
        r = QuantizeLinear(p, t, z)
        y = DequantizeLinear(r, t, z)
    }"""
    x = data(200).astype(np.float64)
    expected = rounded(softmax(rounded(x, 0.1)), 0.0079)
    (output,) = compared("g (float[N,10] x) => (y) { y = Softmax(x) }", qdq, data(200)).outputs
    assert output.sqnr == pytest.approx(decibels(softmax(x), expected), abs=1e-3)


def test_a_float_weight_and_bias_behind_rounded_data_stay_float():
    """onnxruntime would like to store both as integers."""
    qdq = """g (float[N,10] x) => (y) <float s = {0.1}, float t = {0.03}, int8 z = {0}, float[16,1,3] w, float[16] b> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        one = Constant<value_ints=[1]>()
        u = Unsqueeze(d, one)
        c = Conv(u, w, b)
        r = QuantizeLinear(c, t, z)
        y = DequantizeLinear(r, t, z)
    }"""
    floats = """g (float[N,10] x) => (y) <float[16,1,3] w, float[16] b> {
        one = Constant<value_ints=[1]>()
        u = Unsqueeze(x, one)
        y = Conv(u, w, b)
    }"""
    w, b = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in model(floats).graph.initializer)
    x = data(200).astype(np.float64)
    expected = rounded(convolved(rounded(x, 0.1), w, b), 0.03)
    (output,) = compared(floats, qdq, data(200)).outputs
    assert output.sqnr == pytest.approx(decibels(convolved(x, w, b), expected), abs=1e-3)


def test_a_model_that_runs_one_sample_at_a_time_is_compared_on_all():
    text = "g (float[N,4] x) => (y) <int64[2] shape = {1, 4}> { y = Reshape(x, shape) }"
    x = data(10, 4)
    comparison = compared(text, text.replace("y = Reshape(x, shape)", "t = Round(x)\n y = Reshape(t, shape)"), x)
    assert comparison.samples == 10
    assert comparison.outputs[0].max_error == pytest.approx(np.abs(x - np.rint(x)).max())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("g (float[N,10] x) => (z) { z = Identity(x) }", id="another output"),
        pytest.param("g (float[N,10] z) => (y) { y = Identity(z) }", id="another input"),
        pytest.param("g (float[N,10] x) => (y) <float[10,4] w> { y = MatMul(x, w) }", id="another shape"),
        pytest.param("g (float[N,10] x) => (y) <float[10,1] w> { y = MatMul(x, w) }", id="a shape that broadcasts"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(other):
    with pytest.raises(QdqError) as error:
        compared(IDENTITY, other, data())
    assert "\n" not in str(error.value)


def test_data_that_the_model_cannot_take_are_refused():
    with pytest.raises(DataError, match="has no 'x'"):
        compared(IDENTITY, IDENTITY, {"z": data()})


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="holds no samples: give at least one"):
        compared(IDENTITY, IDENTITY, iter([]))


def test_the_text_names_outputs_figures_and_data():
    text = str(compared(IDENTITY, ROUGH, data()))
    for word in ("y", "SQNR", "dB", "cosine", "max error", "top-1 agreement", "20 samples"):
        assert word in text


def rounded(values, scale):
    return scale * np.clip(np.rint(values / scale), -128, 127)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def convolved(x, weight, bias):
    """One channel in, kernel of 3."""
    windows = np.lib.stride_tricks.sliding_window_view(x, 3, axis=1)
    return np.einsum("nlk,ck->ncl", windows, weight[:, 0]) + bias[:, None]


def decibels(reference, other):
    return 10 * math.log10((reference**2).sum() / ((reference - other) ** 2).sum())


def compared(reference, other, x):
    given = {"x": x} if isinstance(x, np.ndarray) else x
    return qdq_surgeon.compare(model(reference), model(other), given)
