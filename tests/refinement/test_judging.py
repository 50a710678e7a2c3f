"""The one number to choose by, against NumPy; and what it is measured on."""

import math

import numpy as np
import pytest

from qdq_surgeon.model import load
from qdq_surgeon.refinement.judging import BEST, channel_axis, decibels, judged, relative_error
from qdq_surgeon.refinement.lockstep import Both
from tests.graphs import model


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def both(expected, actual, name="y"):
    return Both(name, [np.asarray(a) for a in expected], [np.asarray(a) for a in actual])


def power(array):
    return float(np.square(np.asarray(array, np.float64)).sum())


# ---- the relative error -----------------------------------------------------------------------------------------


def test_class_scores_are_one_channel_and_each_sample_is_centred():
    expected = 5 + noise(8, 1, 10)
    actual = expected + 0.1 * noise(8, 1, 10, seed=1) + 100  # the same for all classes: no decision changes
    centred = [side - side.mean(2, keepdims=True) for side in (expected, actual)]
    error = power(centred[0] - centred[1]) / power(centred[0])
    assert relative_error([both(expected, actual)]) == pytest.approx(error)


def test_class_scores_with_dimensions_of_1_behind_them():
    expected, added = noise(8, 1, 10, 1, 1), np.full((8, 1, 10, 1, 1), 3.0)
    assert relative_error([both(expected, expected + added)]) == pytest.approx(0, abs=1e-12)


def test_a_number_per_sample_is_not_centred():
    expected, actual = noise(8, 1, 1), noise(8, 1, 1, seed=1)
    error = min(1, power(expected - actual) / power(expected))
    assert relative_error([both(expected, actual)]) == pytest.approx(error)
    half = relative_error([both(expected, expected / 2)])
    assert half == pytest.approx(0.25)


def test_images_are_judged_channel_by_channel():
    expected = noise(6, 1, 4, 8, 8) * np.array([1, 10, 100, 1000])[:, None, None]
    factors = np.array([0.1, 0.2, 0.3, 0.4])[:, None, None]
    actual = expected * (1 + factors)
    assert relative_error([both(expected, actual)]) == pytest.approx(np.mean(np.square([0.1, 0.2, 0.3, 0.4])))


def test_class_scores_lost_behind_large_boxes_are_seen():
    """A detector: (boxes, 4 coordinates of hundreds + 8 scores below 1) of which one scale for all leaves no score."""
    boxes, scores = 300 + 100 * noise(5, 1, 100, 4), 0.5 * np.abs(noise(5, 1, 100, 8, seed=1))
    expected = np.concatenate([boxes, scores], -1)
    scale = np.abs(expected).max() / 127
    actual = np.rint(expected / scale) * scale
    assert 10 * math.log10(power(expected) / power(expected - actual)) > 40  # as one vector all looks well
    assert relative_error([both(expected, actual)]) > 0.6
    channels = np.square(expected - actual).sum((0, 1, 2)) / np.square(expected).sum((0, 1, 2))
    assert channels[4:].min() > 0.9
    assert relative_error([both(expected, actual)]) == pytest.approx(np.minimum(channels, 1).mean())


def test_outputs_count_equally_whatever_their_size():
    large, small = 1e6 * noise(4, 1, 50), noise(4, 1, 5, seed=1)
    alone = relative_error([both(small, 0.9 * small)])
    assert relative_error([both(large, large, "a"), both(small, 0.9 * small, "b")]) == pytest.approx(alone / 2)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_it_lies_between_0_and_1():
    x = noise(4, 1, 10)
    assert relative_error([both(x, x)]) == 0
    assert relative_error([both(x, 100 * x)]) == 1
    assert relative_error([both(0 * x, 0 * x)]) == 0
    assert relative_error([both(0 * x, x)]) == 1
    assert relative_error([both(x, np.full_like(x, np.nan))]) == 1
    assert relative_error([both(x, np.full_like(x, np.inf))]) == 1
    assert relative_error([]) == 0


def test_noise_in_silence_warns_of_nothing():
    x = noise(4, 1, 10)
    assert relative_error([both(0 * x, x)]) == 1


@pytest.mark.parametrize("shape", [(15,), (1,), (2, 5)])
def test_results_of_another_shape_are_lost(shape):
    """As many boxes as the data say: in INT8 one more or fewer."""
    assert relative_error([both([np.ones(16)], [np.ones(shape)])]) == 1


def test_silent_channels_are_left_out():
    """A channel of zeros in both tells nothing; noise on one is a lost channel."""
    expected = noise(4, 1, 4, 8, 8)
    expected[:, :, 2:] = 0
    actual = 1.1 * expected
    assert relative_error([both(expected, actual)]) == pytest.approx(0.01)
    actual[:, :, 3] = 1e-9
    assert relative_error([both(expected, actual)]) == pytest.approx((0.01 + 0.01 + 1) / 3)


def test_some_of_the_samples():
    expected = noise(6, 1, 10)
    actual = expected.copy()
    actual[:3] *= 2
    pair = both(expected, actual)
    assert relative_error([pair], slice(3, None)) == 0
    assert relative_error([pair], slice(0, 3)) == pytest.approx(1)


def test_half_precision_is_summed_in_doubles():
    expected = (1000 * noise(4, 1, 10)).astype(np.float16)
    actual = (expected * np.float16(0.5)).astype(np.float16)
    assert relative_error([both(expected, actual)]) == pytest.approx(0.25, rel=1e-2)


def test_infinity_in_the_same_place_of_both_is_no_error():
    """Masked scores are -inf, and `compare` counts them as equal."""
    expected = noise(4, 1, 3, 10)
    expected[..., 5:] = -np.inf
    actual = expected + 0.1
    mean = np.mean([power(np.full(20, 0.1)) / power(expected[:, 0, row, :5]) for row in range(3)])
    assert relative_error([both(expected, actual)]) == pytest.approx(mean)


@pytest.mark.parametrize(("error", "sqnr"), [(0, BEST), (1, 0), (0.1, 10), (0.001, 30), (1e-30, BEST)])
def test_decibels(error, sqnr):
    assert decibels(error) == pytest.approx(sqnr)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 10), None),
        ((1, 10, 1, 1), None),
        ((1,), None),
        ((), None),
        ((1, 3, 64, 64), 1),
        ((1, 64, 64, 3), 3),
        ((1, 100, 85), 2),
        ((1, 85, 8400), 1),
        ((1, 2000, 3000), None),
        pytest.param(
            (1, 255, 13, 13),
            1,
        ),
    ],
)
def test_the_axis_of_different_things(shape, axis):
    assert channel_axis([shape]) == axis


def test_an_axis_that_differs_between_samples_holds_no_channels():
    assert channel_axis([(1, 5, 85), (1, 100, 85)]) == 2
    assert channel_axis([(1, 5, 85), (1, 100, 80)]) is None


# ---- what is judged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("y = Relu(c)", ("y",)),
        ("y = Softmax<axis=1>(c)", ("c",)),
        ("y = LogSoftmax<axis=1>(c)", ("c",)),
        ("y = Sigmoid(c)", ("c",)),
        ("s = Softmax<axis=1>(c)\n y = Reshape(s, flat)", ("c",)),
        ("s = Sigmoid(c)\n t = Transpose<perm=[1,0]>(s)\n y = Flatten(t)", ("c",)),
        ("s = Softmax<axis=1>(c)\n y = Mul(s, s)", ("y",)),
        ("y = Identity(c)", ("y",)),
    ],
)
def test_logits_are_judged_where_a_squashing_op_is_last(tail, expected):
    text = f"g (float[N,16] x) => (y) <float[16,32] w, int64[2] flat = {{-1, 32}}> {{ c = MatMul(x, w)\n {tail} }}"
    assert judged(load(model(text)).graph) == expected


def test_one_tensor_behind_two_outputs_is_judged_once():
    text = "g (float[N,16] x) => (y, c) <float[16,32] w> { c = MatMul(x, w)\n y = Softmax<axis=1>(c) }"
    assert judged(load(model(text)).graph) == ("c",)


def test_whole_numbers_and_constants_are_not_judged():
    text = """g (float[N,16] x) => (y, i, k) <float[16,32] w, float[4] k0> {
        y = MatMul(x, w)
        i = ArgMax<axis=1>(y)
        k = Sin(k0)
    }"""
    assert judged(load(model(text)).graph) == ("y",)


def test_a_softmax_of_a_graph_input_is_judged_itself():
    text = "g (float[N,16] x) => (y) { y = Softmax<axis=1>(x) }"
    assert judged(load(model(text)).graph) == ("y",)


@pytest.mark.parametrize(
    "tail",
    [pytest.param(tail) for tail in ("y = ArgMax<axis=1>(c)", "t, y = TopK<axis=1>(c, five)", "y = Cast<to=11>(c)")]
    + ["y = Cast<to=10>(c)"],
)
def test_behind_whole_numbers_and_other_float_types_something_is_judged(tail):
    text = f"g (float[N,16] x) => (y) <float[16,32] w, int64[1] five = {{5}}> {{ c = MatMul(x, w)\n {tail} }}"
    assert judged(load(model(text)).graph) != ()
