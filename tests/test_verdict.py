"""The comparison's verdict in words: loud where a model lost its accuracy, silent where it did not."""

import dataclasses
import math

import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.comparison import Comparison, OutputComparison, _Measured
from qdq_surgeon.refinement.trace import TensorError
from tests.graphs import model


def output(name="y", sqnr=40.0, agreement=None, channels=1, lost=0):
    return OutputComparison(name, sqnr, 1.0, 0.0, agreement, channels, lost)


def comparison(*outputs, samples=100, errors=()):
    return Comparison(outputs, samples, "data.npz", True, errors=errors)


@pytest.mark.parametrize(
    ("found", "samples"),
    [
        (output(), 100),
        (output(sqnr=5.0), 100),
        (output(sqnr=math.inf, agreement=1.0), 100),
        (output(agreement=0.8), 100),
        (output(agreement=0.0), 2),  # two samples tell nothing
        (output(agreement=0.5), 4),  # two others of four
        (output(channels=10, lost=5), 100),
        (output(sqnr=-0.0 + 5.1, agreement=0.95, channels=10, lost=1), 100),
    ],
)
def test_silent(found, samples):
    given = comparison(found, samples=samples)
    assert given.verdict == ""
    assert "LOST" not in str(given)


@pytest.mark.parametrize(
    ("found", "samples", "words"),
    [
        (output(agreement=0.79), 100, "'y' chooses another class for 21% of the samples"),
        (output(agreement=0.25), 4, "'y' chooses another class for 75% of the samples"),
        (output(sqnr=4.9), 100, "'y' has an SQNR of 4.9 dB"),
        (output(sqnr=4.9), 1, "'y' has an SQNR of 4.9 dB"),
        (output(sqnr=-math.inf), 100, "'y' has an SQNR of -inf dB"),
        (output(channels=85, lost=81), 100, "81 of the 85 channels of 'y' are mostly noise"),
    ],
)
def test_loud(found, samples, words):
    given = comparison(found, samples=samples)
    assert given.verdict.startswith(f"THIS MODEL LOST ITS ACCURACY: {words}.")
    assert "--float-worst 3" in given.verdict
    assert given.verdict in str(given)


def test_the_worst_outputs_come_first_and_the_rest_is_counted():
    given = comparison(*(output(f"y{index}", sqnr=4.0 - index) for index in range(5)), output("good"))
    assert "'y4' has an SQNR of 0.0 dB; 'y3' has" in given.verdict
    assert "'y2'" in given.verdict
    assert "'y1'" not in given.verdict
    assert "; and 2 more outputs." in given.verdict
    assert "good" not in given.verdict


def test_one_more_output():
    given = comparison(*(output(f"y{index}", sqnr=0) for index in range(4)))
    assert "; and 1 more output." in given.verdict


def test_it_names_the_first_jump():
    errors = (TensorError("Conv a", "a", 30, 120, 0.001), TensorError("Conv b", "b", 3, 30, 0.5))
    assert "The error first jumps at Conv b (30.0 -> 3.0 dB)." in comparison(output(sqnr=3), errors=errors).verdict


def test_without_a_jump_it_names_none():
    errors = (TensorError("Conv a", "a", 30, 120, 0.001),)
    assert "jump" not in comparison(output(sqnr=3), errors=errors).verdict


def test_every_comparison_names_the_three_worst_ops():
    errors = tuple(TensorError(f"Conv {n}", n, 30, 40, added) for n, added in zip("abcd", (1, 4, 3, 2), strict=True))
    text = str(comparison(output(), errors=errors))
    assert "most error is added at (on calibration samples): Conv b (40.0 -> 30.0 dB), Conv c" in text
    assert "Conv a" not in text


# ---- on models --------------------------------------------------------------------------------------------------

DETECTOR = """g (float[N,16,32,32] x) => (float[N,16,32,32] y)
<float[4,16,1,1] boxes, float[12,16,1,1] scores, float many = {2000}, float few = {0.1}> {
    b = Conv(x, boxes)
    large = Mul(b, many)
    c = Conv(x, scores)
    s = Mul(c, few)
    y = Concat<axis=1>(large, s)
}"""

ROUNDED = DETECTOR.replace(
    "y = Concat<axis=1>(large, s)", "t = Concat<axis=1>(large, s)\n r = Round(t)\n y = Identity(r)"
)


def images(count, grid=32):
    return np.random.default_rng(0).standard_normal((count, 16, grid, grid)).astype(np.float32)


def test_class_scores_lost_behind_boxes_are_lost_channels():
    """Like YOLOX: scores of a tenth, rounded with a step for boxes of hundreds; SQNR as one vector is high."""
    given = qdq_surgeon.compare(model(DETECTOR), model(ROUNDED), {"x": images(8)})
    (found,) = given.outputs
    assert found.sqnr > 40
    assert (found.channels, found.lost) == (16, 12)
    assert "12 of the 16 channels of 'y' are mostly noise" in given.verdict


def test_channels_are_those_of_a_raw_head_on_a_small_grid():
    """YOLO's heads are (1, 255, 13, 13)."""
    pair = (model(text.replace("32,32]", "8,8]")) for text in (DETECTOR, ROUNDED))
    (found,) = qdq_surgeon.compare(*pair, {"x": images(8, 8)}).outputs
    assert (found.channels, found.lost) == (16, 12)


def test_a_good_model_has_no_lost_channels():
    (found,) = qdq_surgeon.compare(model(DETECTOR), model(DETECTOR), {"x": images(8)}).outputs
    assert (found.channels, found.lost) == (16, 0)


def test_channels_are_counted_over_all_batches():
    whole = qdq_surgeon.compare(model(DETECTOR), model(ROUNDED), {"x": images(8)}).outputs
    parts = qdq_surgeon.compare(model(DETECTOR), model(ROUNDED), [{"x": images(8)[i : i + 2]} for i in (0, 2, 4, 6)])
    assert [(o.channels, o.lost) for o in parts.outputs] == [(o.channels, o.lost) for o in whole]


CLASSIFIER = """g (float[N,16] x) => (float[N,10] y) <float[16,64] w, float[64,64] v, float[64,10] u> {
    c = MatMul(x, w)
    r = Relu(c)
    d = MatMul(r, v)
    s = Relu(d)
    y = MatMul(s, u)
}"""


def rows(count):
    return np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)


def lost_model():
    """One input of 16 is a thousand times as large, and counts for a thousandth."""
    proto = model(CLASSIFIER)
    x = rows(80)
    x[:, 0] *= 1000
    for tensor in proto.graph.initializer:
        if tensor.name == "w":
            values = np.frombuffer(tensor.raw_data, np.float32).reshape(16, 64).copy()
            values[0] /= 1000
            tensor.raw_data = values.tobytes()
    return proto, x


def test_a_model_that_lost_its_accuracy_says_so_and_where():
    proto, x = lost_model()
    verdict = qdq_surgeon.quantize(proto, {"x": x}, method="max").comparison.verdict
    assert "THIS MODEL LOST ITS ACCURACY" in verdict
    assert "The error first jumps at MatMul c (" in verdict


def test_a_model_that_kept_it_does_not():
    assert qdq_surgeon.quantize(model(CLASSIFIER), {"x": rows(80)}).comparison.verdict == ""


def test_it_is_loud_without_bias_correction_too():
    proto, x = lost_model()
    given = qdq_surgeon.quantize(proto, {"x": x}, method="max", bias_correction=False).comparison
    assert "The error first jumps at MatMul c (" in given.verdict


def test_a_comparison_has_a_record_of_it():
    given = qdq_surgeon.quantize(model(CLASSIFIER), {"x": rows(80)}).comparison
    assert [error.output for error in given.errors] == ["c", "d"]  # y is too small for INT8
    assert dataclasses.asdict(given)["errors"][0]["op"] == "MatMul c"


def test_infinity_in_the_same_place_of_outputs_with_channels():
    """Masked scores (samples, queries, keys) are -inf in both."""
    text = "g (float[N,4,8] x) => (y) { r = Relu(x)\n y = Log(r) }"
    x = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)
    given = qdq_surgeon.compare(model(text), model(text), {"x": x})
    assert (given.outputs[0].sqnr, given.verdict) == (math.inf, "")


def test_a_mask_that_int8_loses_is_loud():
    text = "g (float[N,1] x) => (y) {{ r = {}(x)\n y = Log(r) }}"
    x = -np.abs(np.random.default_rng(0).standard_normal((6, 1))).astype(np.float32)
    given = qdq_surgeon.compare(model(text.format("Relu")), model(text.format("Sigmoid")), {"x": x})
    assert "SQNR of -inf dB" in given.verdict


# ---- channels that carry nothing --------------------------------------------------------------------------------


def lost_of(expected, actual):
    measured = _Measured("y")
    measured.add(expected.astype(np.float32), actual.astype(np.float32))
    return measured.result().lost


def test_silent_channels_are_not_lost():
    """A feature map of which most channels are zero, a little off everywhere."""
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((4, 16, 8, 8))
    expected[:, 6:] = 0
    assert lost_of(expected, expected + 1e-6 * rng.standard_normal(expected.shape)) == 0


def test_classes_that_are_hardly_there_are_not_lost():
    """A map of probabilities in which 18 of 21 classes do not occur."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 21, 16, 16))
    logits[:, 3:] -= 12
    noisy = logits + 0.8 * rng.standard_normal(logits.shape)
    expected, actual = (np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in (logits, noisy))
    assert lost_of(expected, actual) < 3


def test_channels_that_fell_silent_are_lost_however_small_they_were():
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((4, 16, 8, 8))
    expected[:, :4] *= 1e4
    actual = expected.copy()
    actual[:, 4:] = 0
    assert lost_of(expected, actual) == 12
