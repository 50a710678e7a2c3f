"""Each finding on statistics that call for it, and on their clean sibling, which must stay silent."""

import re

import numpy as np
import pytest

from qdq_surgeon.calibration.quality import findings
from qdq_surgeon.calibration.statistics import BUCKETS, EPOCHS, FIRST_NON_FINITE, Origin, Statistic, Statistics
from qdq_surgeon.errors import QdqError
from qdq_surgeon.model import load
from tests.graphs import model

CHAIN = """
g (float[N,4] x) => (y) {
   a = Relu(x)
   [logarithm] b = Log(a)
   c = Sqrt(b)
   y = Tanh(c)
}
"""
CONV = """
g (float[N,3,32,32] image) => (y) <float[16,3,3,3] w, float[16] bias = {%s}> {
   c = Conv(image, w, bias)
   y = Relu(c)
}
"""
PIXELS = np.linspace(0, 255, 4096)


def test_good_data_give_no_finding():
    assert found(CHAIN, x=normal(), b=normal(), y=normal()) == {}


def test_no_statistics_give_no_finding():
    assert found(CHAIN, samples=0) == {}


def test_a_tensor_that_the_graph_does_not_hold_does_no_harm():
    assert found(CHAIN, stranger=normal()) == {}


def test_an_unknown_method_is_refused():
    with pytest.raises(QdqError, match="entropie"):
        found(CHAIN, method="entropie", x=normal())


# values


def test_a_tensor_that_never_held_a_finite_number_is_an_error():
    finding = found(CHAIN, x=normal(), b=np.full(9, np.nan), c=np.full(9, np.inf))["never-finite"]
    assert finding.severity == "error"
    assert finding.tensors == ("b", "c")
    assert "'b' and 'c' never held a finite number" in str(finding)
    assert "Log logarithm" in str(finding)


def test_a_tensor_that_was_always_empty_is_no_error():
    findings = found(CHAIN, x=normal(), c=np.zeros((0, 4)))
    assert findings.keys() == {"always-empty"}
    assert findings["always-empty"].severity == "warning"
    assert str(findings["always-empty"]).startswith("'c' had no element in any sample: what reads it stays float")


def test_errors_come_first():
    codes = list(found(CHAIN, x=np.full(9, np.nan), b=np.append(normal(), np.nan), c=np.zeros(9), samples=2))
    assert codes == ["never-finite", "non-finite", "few-samples", "all-zero"]


def test_nan_names_the_first_node_in_graph_order_that_makes_it_and_who_inherits_it():
    values = np.append(normal(997), [np.nan, -np.inf, np.inf])
    finding = found(CHAIN, y=values, c=values, b=values, a=normal())["non-finite"]
    assert finding.severity == "warning"
    assert finding.tensors == ("b", "c", "y")
    assert str(finding) == (
        "3 of 1,000 values of 'b' are NaN or infinite, and 'c' and 'y' behind it inherit them; they first appear at "
        "Log logarithm, which makes 'b': scales ignore them, so find the samples that cause them"
    )


def test_nan_in_an_input_comes_in_with_the_data():
    assert "come in with 'x'" in str(found(CHAIN, x=np.append(normal(), np.nan))["non-finite"])


def test_a_constant_is_not_an_all_zero_tensor():
    both = found(CHAIN, x=normal(), a=np.full(9, 0.5), b=np.zeros(9))
    assert both.keys() == {"constant", "all-zero"}
    assert "'a' (always 0.5) held one single value" in str(both["constant"])
    assert both["all-zero"].tensors == ("b",)


@pytest.mark.parametrize("values", [[3.0], [1.0, -1.0], [0.0, 1.0]])
def test_one_number_alone_and_two_values_are_no_constant(values):
    assert found(CHAIN, a=np.array(values)) == {}


def test_at_most_three_tensors_are_named():
    finding = found(CHAIN, x=np.zeros(9), a=np.zeros(9), b=np.zeros(9), c=np.zeros(9), y=np.zeros(9))["all-zero"]
    assert str(finding).startswith("'x', 'a', 'b' and 2 more never held")
    assert len(finding.tensors) == 5


def test_a_spike_at_the_limit_of_a_clip_is_said_with_its_share_and_range():
    values = np.append(np.full(950, 6.0), np.linspace(1, 5, 50))
    finding = found(CHAIN, x=normal(), a=values)["spike"]
    assert "'a' (95 % near 6, range 6)" in str(finding)


def test_zeros_do_not_count_for_a_spike():
    values = np.concatenate([np.zeros(9000), np.full(95, -1e4), np.linspace(1, 5, 5)])
    assert "'a' (95 % near 1e+04" in str(found(CHAIN, a=values)["spike"])


@pytest.mark.parametrize(
    "values",
    [
        np.append(np.full(800, 6.0), np.linspace(1, 5, 200)),
        np.append(np.zeros(500), np.ones(500)),  # a mask
        np.append(np.full(95, 6.0), np.linspace(1, 5, 4)),  # too few to judge
    ],
)
def test_no_spike(values):
    assert found(CHAIN, a=values) == {}


def test_ranges_alone_are_judged_as_far_as_they_go():
    spiky = np.append(np.full(950, 6.0), np.linspace(1, 5, 50))
    assert found(CHAIN, ranges_only=True, a=spiky) == {}
    assert found(CHAIN, ranges_only=True, a=np.zeros(9)).keys() == {"all-zero"}


# samples


@pytest.mark.parametrize(("samples", "codes"), [(1, {"few-samples"}), (7, {"few-samples"}), (8, set())])
def test_a_handful_of_samples_is_too_few(samples, codes):
    assert found(CHAIN, samples=samples, a=normal()).keys() == codes


def test_few_samples_are_one_finding_whatever_the_method_needs():
    finding = found(CHAIN, samples=3, method="percentile:99.99", a=normal())["few-samples"]
    assert str(finding).startswith("only 3 samples calibrated")


@pytest.mark.parametrize(
    ("method", "enough"), [("percentile", 100_000), ("percentile:99.9", 10_000), ("entropy", 20_480)]
)
def test_a_method_that_needs_more_values_names_the_tensors_that_held_fewer(method, enough):
    assert found(CHAIN, method=method, a=normal(enough)) == {}
    finding = found(CHAIN, method=method, a=normal(enough), b=normal(enough - 1))["few-samples"]
    assert str(finding).startswith(f"{method} needs some {enough:,} values of a tensor, and 'b' ({enough - 1:,}) held")


def test_entropy_leaves_zeros_out():
    assert "few-samples" in found(CHAIN, method="entropy", a=np.append(normal(20_000), np.zeros(20_000)))


@pytest.mark.parametrize("method", [None, "mse", "max", "percentile:100"])
def test_other_methods_take_any_number_of_values(method):
    assert found(CHAIN, method=method, a=normal(10)) == {}


def test_made_up_inputs_are_not_blamed_for_number_and_scale():
    assert found(conv(0.5), samples=2, synthetic=True, image=PIXELS / 1e6) == {}


# growth


def drifting(batches, reach):
    return [reach(index) * normal(seed=index) for index in range(batches)]


@pytest.mark.parametrize("batches", [16, 17, 31, 32, 64])
def test_a_steady_rise_is_growth_however_the_last_epoch_is_filled(batches):
    rise = drifting(batches, lambda index: (index + 1) / batches)
    finding = found(CHAIN, a=rise, b=normal(), c=normal(), y=normal())["growing"]
    assert finding.tensors == ("a",)
    assert "1 range of 4 still widened" in str(finding)
    assert "shuffle" in str(finding)


def test_the_figures_of_growth_are_those_of_the_data():
    ramp = [np.full(9, float(index + 1)) * np.linspace(-1, 1, 9) for index in range(31)]
    finding = found(CHAIN, a=ramp, b=[-2 * values for values in ramp], c=[np.sqrt(values + 40) for values in ramp])
    assert "2 ranges of 3" in str(finding["growing"])
    assert "after the first 7 batches: 'a' (4.43 times) and 'b' (4.43 times)" in str(finding["growing"])


@pytest.mark.parametrize("batches", [8, 16, 31, 64])
def test_values_drawn_alike_do_not_grow(batches):
    alike = {name: drifting(batches, lambda index: 1.0) for name in "abc"}
    assert found(CHAIN, **alike) == {}


def test_one_late_outlier_is_no_growth():
    batches = drifting(63, lambda index: 1.0)
    batches[60] = batches[60] * 50
    assert found(CHAIN, a=batches) == {}


def test_fewer_than_16_batches_are_not_judged():
    assert found(CHAIN, a=drifting(15, lambda index: index + 1.0)) == {}


def test_statistics_without_growth_are_not_judged():
    graph = load(model(CHAIN))
    known = Statistic(-1.0, 1.0, 9, 0, None)
    assert findings(graph, Statistics({"a": known}, graph.digest, Origin(("data",), "0", 100))) == ()


def test_one_of_many_tensors_grows_in_silence_unless_it_is_an_input():
    rise, alike = drifting(31, lambda index: index + 1.0), drifting(31, lambda index: 1.0)
    assert found(CHAIN, x=alike, a=alike, b=rise, c=alike, y=alike) == {}
    assert found(CHAIN, x=rise, a=alike, b=alike, c=alike, y=alike).keys() == {"growing"}


# the scale of the input: constants

NORMALISED = """
g (float[N,3,8,8] image) => (y)
<float[3,1,1] mean = {%s}, float[3,1,1] deviation = {%s}, float[16,3,3,3] w> {
   centred = Sub(image, mean)
   scaled = Div(centred, deviation)
   moved = Identity(scaled)
   y = Conv(moved, w)
}
"""
CAFFE = NORMALISED % ("103.939, 116.779, 123.68", "1, 1, 1")
IMAGENET = NORMALISED % ("0.485, 0.456, 0.406", "0.229, 0.224, 0.225")
BY_255 = NORMALISED % ("0, 0, 0", "255, 255, 255")
TO_ONE = NORMALISED % ("127.5, 127.5, 127.5", "127.5, 127.5, 127.5")


def test_pixels_of_0_to_1_do_not_fit_a_division_by_255():
    finding = found(BY_255, image=PIXELS / 255)["input-range"]
    assert finding.tensors == ("image",)
    assert "'image' reaches 1, but the graph normalises values of 0..255: the data look far too small" in str(finding)


def test_pixels_of_0_to_255_do_not_fit_a_mean_of_imagenet():
    assert "far too large" in str(found(IMAGENET, image=PIXELS)["input-range"])


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (CAFFE, PIXELS, PIXELS / 255),
        (BY_255, PIXELS, PIXELS / 127.5 - 1),
        (TO_ONE, PIXELS, PIXELS / 255),
        (IMAGENET, PIXELS / 255, PIXELS),
        (IMAGENET, PIXELS / 255, PIXELS / 255**2),
    ],
)
@pytest.mark.parametrize("measured", ["image", "centred", "scaled"])
def test_constants_at_the_input_tell_its_range_wherever_it_is_measured(text, right, wrong, measured):
    assert found(text, **{measured: behind(text, right, measured)}) == {}
    assert found(text, **{measured: behind(text, wrong, measured)}).keys() == {"input-range"}


def behind(text, pixels, tensor):
    """The values of a tensor of NORMALISED when all three channels hold the pixels."""
    numbers = text.split("{")[1:3]
    mean, deviation = (np.array([float(n) for n in part.split("}")[0].split(",")])[:, None] for part in numbers)
    image = np.tile(pixels, (3, 1))
    return {"image": image, "centred": image - mean, "scaled": (image - mean) / deviation}[tensor]


@pytest.mark.parametrize(
    "arithmetic",
    [
        "scaled = Mul(image, c)",  # the scale of attention scores, or any other
        "scaled = Add(image, c)",
        "scaled = Sub(c, image)",
        "scaled = Div(c, image)",
        "scaled = Pow(image, c)",
    ],
)
def test_other_arithmetic_at_the_input_says_nothing(arithmetic):
    text = "g (float[N,3,8,8] image) => (y) <float c = {0.02}, float[16,3,3,3] w> { ? y = Conv(scaled, w) }"
    for factor in (1e-4, 1, 1e4):
        assert found(text.replace("?", arithmetic), image=factor * normal()) == {}


def test_a_mean_per_pixel_is_understood_and_one_that_fits_nothing_is_left_alone():
    text = "g (float[N,1,1,2] x) => (y) <float[1,1,1,2] m = {120, 130}, float s = {60}, float[2,1,1,1] w> {%s}"
    assert found(text % "a = Sub(x, m) b = Div(a, s) y = Conv(b, w)", x=PIXELS / 255).keys() == {"input-range"}
    odd = "g (float[N,1,3,2] x) => (y) <float[2] m = {120, 130}, float[3,1] s = {60, 60, 60}, float[2,1,1,1] w> {%s}"
    assert found(odd % "a = Sub(x, m) b = Div(a, s) y = Conv(b, w)", x=PIXELS / 255) == {}


# the scale of the input: what a BatchNormalization was trained on

NORM = """
g (float[N,3,32,32] image) => (y)
<float[4,3,3,3] w, float[4] one = {1, 1, 1, 1}, float[4] zero = {0, 0, 0, 0}, float[4] var = {%s}> {
   c = Conv(image, w)
   [norm] n = BatchNormalization(c, one, zero, zero, var)
   y = Relu(n)
}
"""
TRAINED_ON_ONE = NORM % "0.27, 0.27, 0.27, 0.27"  # 27 weights of deviation 0.1


@pytest.mark.parametrize("factor", [1 / 8, 1, 8])
def test_data_near_those_of_training_fit_the_batch_normalization(factor):
    assert found(TRAINED_ON_ONE, image=factor * normal()) == {}


@pytest.mark.parametrize(("factor", "words"), [(255, "too large"), (1 / 255, "too small")])
def test_data_far_from_those_of_training_do_not(factor, words):
    finding = found(TRAINED_ON_ONE, image=factor * normal())["input-range"]
    assert "BatchNormalization norm was trained on" in str(finding)
    assert words in str(finding)
    assert finding.tensors == ("image",)


def test_a_batch_normalization_of_the_input_itself_is_judged_directly():
    text = """
    g (float[N,4,8,8] x) => (y)
    <float[4] one = {1, 1, 1, 1}, float[4] mean = {120, 120, 120, 120}, float[4] var = {3600, 3600, 3600, 3600}> {
       y = BatchNormalization(x, one, one, mean, var)
    }
    """
    assert found(text, x=PIXELS) == {}
    assert found(text, x=PIXELS / 255).keys() == {"input-range"}


def test_the_bias_of_the_conv_belongs_to_what_the_batch_normalization_sees():
    text = """
    g (float[N,3,32,32] image) => (y)
    <float[2,3,3,3] w, float[2] fifty = {50, 50}, float[2] one = {1, 1}, float[2] var = {0.3, 0.3}> {
       c = Conv(image, w, fifty)
       y = BatchNormalization(c, one, one, fifty, var)
    }
    """
    assert found(text, image=normal()) == {}


# the scale of the input: the first bias


def conv(bias):
    return CONV % ", ".join([str(bias)] * 16)


def test_data_that_drown_in_the_first_bias_are_too_small():
    finding = found(conv(0.5), image=PIXELS / 255**2)["input-range"]
    assert "the bias of Conv c: the data look far too small" in str(finding)


@pytest.mark.parametrize("pixels", [PIXELS / 255, PIXELS / 127.5 - 1])
def test_data_of_the_order_of_the_first_bias_are_right(pixels):
    assert found(conv(0.5), image=pixels) == {}


@pytest.mark.parametrize("bias", [0.0, 1e-6])
def test_a_small_bias_alone_says_nothing(bias):
    assert found(conv(bias), image=PIXELS) == {}


def test_the_bias_may_be_added_behind_a_matmul():
    text = """
    g (float[N,64] x) => (y) <float[64,4] w, float[4] bias = {1, 1, 1, 1}> {
       m = MatMul(x, w)
       y = Add(bias, m)
    }
    """
    assert found(text, x=normal()) == {}
    assert found(text, x=normal() / 255).keys() == {"input-range"}


def test_an_input_of_zeros_has_no_scale():
    assert found(conv(0.5), image=np.zeros(4096)).keys() == {"all-zero"}


@pytest.mark.parametrize(
    ("end", "place"),
    [
        ("z = Clip(c, low, high)", "before Clip z, which saturates"),
        ("z = HardSwish(c)", "before HardSwish z, which saturates"),
        ("p = GlobalAveragePool(c) r = Relu(p) z = Softmax(r)", "before Softmax z, which saturates"),
        ("f = Flatten(c) z = Identity(f)", ""),
        ("z = Clip(c, low, far)", ""),
        ("m = MatMul(c, c) z = Softmax(m)", ""),
    ],
)
def test_large_data_are_told_by_the_bias_together_with_what_they_saturate(end, place):
    weights = "<float[16,3,3,3] w, float[16] b = {%s}, float low = {0}, float high = {6}, float far = {255}>"
    half = ", ".join(["0.5"] * 16)
    text = f"g (float[N,3,8,8] image) => (z) {weights % half} {{ c = Conv(image, w, b) {end} }}"
    assert found(text, image=normal()) == {}
    wrong = found(text, image=255 * normal())
    assert wrong.keys() == ({"input-range"} if place else set())
    assert not place or re.search(f"of about 1[0-9][0-9] {place}", str(wrong["input-range"]))


CLASSIFIER = """
g (float[N,3,8,8] image) => (logits)
<float[16,3,3,3] w, float[16] b = {%s}, float[%d,16] v, float[%d] d> {
   c = Conv(image, w, b)
   r = Relu(c)
   p = GlobalAveragePool(r)
   f = Flatten(p)
   logits = Gemm<transB = 1>(f, v, d)
}
"""


@pytest.mark.parametrize(("classes", "codes"), [(10, {"input-range"}), (4, set())])
def test_large_data_are_told_by_the_outputs_of_a_classifier(classes, codes):
    text = CLASSIFIER % (", ".join(["0.5"] * 16), classes, classes)
    assert found(text, image=normal(), p=np.abs(normal())) == {}
    assert found(text, image=255 * normal(), p=500 * np.abs(normal())).keys() == codes


def test_broken_weights_make_no_trouble():
    proto = model(conv(0.5))
    next(tensor for tensor in proto.graph.initializer if tensor.name == "bias").float_data[:] = [np.nan] * 16
    assert found(proto, image=PIXELS) == {}


def test_a_histogram_is_needed_for_levels_and_not_for_ranges():
    assert found(conv(0.5), ranges_only=True, image=PIXELS / 255**2) == {}
    assert found(BY_255, ranges_only=True, image=PIXELS / 255).keys() == {"input-range"}


def normal(count=4096, seed=0):
    return np.random.default_rng(seed).standard_normal(count)


def found(source, method=None, samples=100, synthetic=False, ranges_only=False, **tensors):
    """The findings by code, for tensors given by their values, or by a list with those of each batch."""
    graph = load(model(source) if isinstance(source, str) else source)
    origin = Origin(("data",), "0", samples, synthetic)
    statistics = {name: statistic(values, ranges_only) for name, values in tensors.items()}
    return {f.code: f for f in findings(graph, Statistics(statistics, graph.digest, origin), method)}


def statistic(values, ranges_only):
    batches = [np.ravel(batch).astype(np.float32) for batch in (values if isinstance(values, list) else [values])]
    whole = np.concatenate(batches)
    finite = whole[np.isfinite(whole)]
    growth = np.zeros(EPOCHS)
    for index, batch in enumerate(batches):
        epoch = (index + 1).bit_length() - 1
        growth[epoch] = max(growth[epoch], np.abs(batch[np.isfinite(batch)]).max(initial=0))
    histogram = np.bincount(np.abs(finite).view(np.uint32) >> np.uint32(16), minlength=BUCKETS)
    assert not histogram[FIRST_NON_FINITE:].any()
    return Statistic(
        float(finite.min(initial=np.inf)),
        float(finite.max(initial=-np.inf)),
        finite.size,
        whole.size - finite.size,
        None if ranges_only else histogram,
        growth,
    )
