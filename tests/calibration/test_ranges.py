"""Each range method against a reference that NumPy computes from all raw values."""

import numpy as np
import pytest

from qdq_surgeon.calibration.counting import Accumulator
from qdq_surgeon.calibration.ranges import range_method
from qdq_surgeon.errors import QdqError

BUCKET = 2**-7
METHODS = ("max", "mse", "entropy", "percentile:99.9")
DISTRIBUTIONS = ("normal", "laplace", "relu", "uniform", "outlier", "exponential", "student", "shifted", "tiny")


def values_of(name, count=20_000):
    random = np.random.default_rng(7)
    normal = random.standard_normal(count)
    return {
        "normal": normal,
        "laplace": random.laplace(size=count),
        "relu": np.maximum(normal, 0),
        "uniform": random.uniform(-1, 1, count),
        "outlier": np.append(normal, 60.0),
        "exponential": random.exponential(size=count),
        "student": random.standard_t(2.5, count),
        "shifted": normal + 5,
        "tiny": normal * 1e-20,
    }[name].astype(np.float32)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_max_is_the_largest_absolute_value(name):
    values = values_of(name)
    assert threshold("max", values) == np.abs(values).max()


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("name", sorted(set(DISTRIBUTIONS) - {"relu"}))
def test_percentile_is_that_of_numpy_within_one_bucket(name, percent):
    values = values_of(name)
    low, high = (np.percentile(np.abs(values), percent, method=method) for method in ("lower", "higher"))
    assert low * (1 - BUCKET) <= threshold(f"percentile:{percent}", values) <= high * (1 + BUCKET)


def test_percentile_counts_zeros_as_values():
    values = values_of("relu")
    expected = np.percentile(np.abs(values), 75)
    assert threshold("percentile:75", values) == pytest.approx(expected, rel=BUCKET)


def test_a_percentile_that_falls_among_the_zeros_keeps_the_full_range():
    values = np.append(np.zeros(10_000, np.float32), np.float32(3))
    assert threshold("percentile:99.9", values) == 3


def test_percentile_alone_means_99_99():
    values = values_of("laplace")
    assert threshold("percentile", values) == threshold("percentile:99.99", values)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_loses_at_most_one_percent_to_brute_force(name):
    values = values_of(name).astype(np.float64)
    candidates = np.abs(values).max() * 2.0 ** (-np.arange(0, 8, 1 / 64))
    best = min(rounding_error(values, candidate) for candidate in candidates)
    assert rounding_error(values, threshold("mse", values)) <= 1.01 * best


def test_mse_of_uniform_data_saturates_half_a_level():
    """127 steps, and half a step that rounds down to the last level."""
    values = np.linspace(-1, 1, 100_001)
    assert threshold("mse", values) == pytest.approx(127 / 127.5, rel=BUCKET / 2)


def test_mse_keeps_one_outlier_that_is_worth_more_than_the_rest():
    values = np.append(values_of("normal") * 1e-3, np.float32(10))
    assert threshold("mse", values) == pytest.approx(10, rel=BUCKET)


@pytest.mark.parametrize("name", ["normal", "laplace", "uniform", "exponential", "shifted"])
def test_entropy_comes_close_to_the_least_divergence_of_the_naive_algorithm(name):
    values = values_of(name, 200_000)
    amax = np.abs(values).max()
    bins, _ = np.histogram(np.abs(values), 2048, (0, amax))
    divergences = {width: naive_divergence(bins, width) for width in range(128, 2049, 8)}
    ours = round(threshold("entropy", values) / amax * 2048)
    assert divergences[ours] <= 1.2 * min(divergences.values())


def test_entropy_clips_one_far_outlier():
    values = np.append(values_of("normal"), np.float32(60))
    assert np.percentile(np.abs(values), 95) < threshold("entropy", values) < 10


def test_entropy_ignores_zeros():
    values = values_of("laplace")
    with_zeros = np.append(values, np.zeros(5 * values.size, np.float32))
    assert threshold("entropy", with_zeros) == threshold("entropy", values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_threshold_exceeds_the_largest_value(name, method):
    values = values_of(name)
    assert 0 < threshold(method, values) <= np.abs(values).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 4.0, 2.0**30])
def test_thresholds_scale_with_the_values(method, factor):
    values = values_of("laplace")
    expected = factor * threshold(method, values)
    assert threshold(method, factor * values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "tolerance"), [("max", 1e-6), ("mse", 0.02), ("percentile:99.9", BUCKET), ("entropy", 0.15)]
)
@pytest.mark.parametrize("factor", [3.0, 0.1, 1e6])
def test_thresholds_scale_with_the_values_by_any_factor(method, tolerance, factor):
    """Nearly so: the buckets cut the values anew, and the divergence is flat around its minimum."""
    values = values_of("normal", 200_000)
    expected = factor * threshold(method, values)
    assert threshold(method, factor * values) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_sign_of_the_values_does_not_matter(method):
    values = values_of("shifted")
    assert threshold(method, -values) == threshold(method, values)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_threshold_zero(method):
    assert threshold(method, np.zeros(100, np.float32)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1.0, -1.7, 3.3e-38, 6.02e23])
def test_a_constant_tensor_keeps_its_value(method, value):
    values = np.full(100, value, np.float32)
    assert threshold(method, values) == pytest.approx(abs(value), rel=BUCKET)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maximum", "'max'"),
        ("mean-squared", "Methods: max, mse, entropy, percentile:P"),
        ("msee", "'mse'"),
        ("entropie", "'entropy'"),
        ("percentil:99", "'percentile'"),
        ("mse:3", "mse:3"),
        ("", "Methods"),
    ],
)
def test_an_unknown_method_is_refused_with_the_nearest_name(text, message):
    with pytest.raises(QdqError, match="unknown method") as error:
        range_method(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text", ["percentile:0", "percentile:-1", "percentile:100.1", "percentile:nan", "percentile:p"]
)
def test_a_percentile_outside_its_range_is_refused(text):
    with pytest.raises(QdqError, match="above 0 and at most 100"):
        range_method(text)


def threshold(method, values):
    accumulator = Accumulator()
    accumulator.add(np.asarray(values))
    return range_method(method)(accumulator.result())


def rounding_error(values, reach):
    scale = reach / 127
    return float(np.sum((values - scale * np.clip(np.rint(values / scale), -128, 127)) ** 2))


def naive_divergence(bins, width):
    """One candidate of S. Migacz's algorithm, as on his slides, in plain loops."""
    p = bins[:width].astype(float)
    q = np.zeros(width)
    for level in range(128):
        part = slice(level * width // 128, (level + 1) * width // 128)
        filled = bins[part] > 0
        q[part][filled] = bins[part].sum() / max(filled.sum(), 1)
    p[-1] += bins[width:].sum()
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
