"""The accumulator against NumPy: counts are exact, and do not depend on how the values were cut or ordered."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qdq_surgeon.calibration.counting import CHUNK, Accumulator
from qdq_surgeon.calibration.statistics import BUCKET_EDGES, BUCKETS


def test_a_bucket_edge_is_a_float32_with_seven_bits_of_mantissa():
    np.testing.assert_array_equal(BUCKET_EDGES, edges_by_formula())


@pytest.mark.parametrize("kind", ["normal", "small integers", "powers of two", "all octaves", "one sign"])
def test_all_figures_equal_those_of_numpy(kind):
    values = {
        "normal": random().standard_normal(10_001),
        "small integers": random().integers(-9, 9, 1000),
        "powers of two": 2.0 ** np.arange(-149, 128),
        "all octaves": random().standard_normal(10_000) * 2.0 ** random().integers(-140, 120, 10_000),
        "one sign": -np.abs(random().standard_normal(1000)) - 1,
    }[kind].astype(np.float32)
    assert_counted(counted(values), values)


def test_the_figures_do_not_depend_on_how_the_values_are_cut_and_ordered():
    values = random().laplace(size=3000).astype(np.float32)
    for size in (1, 7, 8, 1024, 3000):
        pieces = np.array_split(random(size).permutation(values), -(-values.size // size))
        assert_counted(counted(*pieces), values)


def test_an_array_longer_than_a_chunk_is_counted_whole():
    values = random().standard_normal(2 * CHUNK + 3).astype(np.float32)
    assert_counted(counted(values), values)


floats = arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@settings(deadline=None, max_examples=60)
@given(floats, floats, floats)
def test_merging_is_associative_commutative_and_equal_to_one_pass(a, b, c):
    x, y, z = counted(a), counted(b), counted(c)
    whole = counted(np.concatenate([a, b, c]))
    for merged in (x | y | z, x | (y | z), z | y | x):
        assert figures(merged) == figures(whole)
        np.testing.assert_array_equal(merged.histogram, whole.histogram)


def test_nan_and_infinity_are_counted_and_left_out():
    finite = np.array([-2.0, 0.5, 3.0], np.float32)
    statistic = counted(np.concatenate([finite, np.array([np.nan, np.inf, -np.inf, -np.nan], np.float32)]))
    assert_counted(statistic, finite, non_finite=4)


def test_a_tensor_of_nothing_but_nan_has_no_range():
    statistic = counted(np.full(5, np.nan, np.float32))
    assert figures(statistic) == (math.inf, -math.inf, 0, 5)
    assert statistic.amax == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_without_loss(dtype):
    values = (random().standard_normal(500) * 10).astype(dtype)
    assert_counted(counted(values), values.astype(np.float32))


def test_fp16_subnormals_and_infinity_are_read_as_such():
    values = np.array([2.0**-24, -(2.0**-20), 65504, np.inf], np.float16)
    assert_counted(counted(values), values[:3].astype(np.float32), non_finite=1)


def test_float32_subnormals_keep_their_own_buckets():
    values = np.array([2.0**-149, 2.0**-133, -(2.0**-127), 1.5 * 2.0**-127], np.float32)
    statistic = counted(values)
    assert_counted(statistic, values)
    assert np.count_nonzero(statistic.histogram) == 4


def test_zeros_of_both_signs_fall_into_the_first_bucket():
    statistic = counted(np.array([0.0, -0.0, 0.0], np.float32))
    assert (statistic.histogram[0], statistic.count, statistic.amax) == (3, 3, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_an_empty_array_counts_nothing(shape):
    statistic = counted(np.zeros(shape, np.float32))
    assert figures(statistic) == (math.inf, -math.inf, 0, 0)
    assert statistic.histogram.sum() == 0


def test_an_empty_array_changes_nothing():
    values = np.array([1.0, 2.0], np.float32)
    assert_counted(counted(values, np.zeros((0, 2), np.float32), values), np.tile(values, 2))


def test_a_single_number_counts_once():
    assert figures(counted(np.array(-3.5, np.float32))) == (-3.5, -3.5, 1, 0)


def test_the_layout_in_memory_does_not_matter():
    values = random().standard_normal((6, 8, 10)).astype(np.float32)
    for view in (values.T, values[::2, ::-1], values[:, 1:5, ::3], np.asfortranarray(values)):
        assert_counted(counted(view), view)


def test_a_result_does_not_change_when_more_is_added():
    accumulator = Accumulator()
    accumulator.add(np.ones(3, np.float32))
    early = accumulator.result()
    accumulator.add(np.full(4, 2.0, np.float32))
    assert_counted(early, np.ones(3, np.float32))


def random(seed=0):
    return np.random.default_rng(seed)


def counted(*pieces):
    accumulator = Accumulator()
    for piece in pieces:
        accumulator.add(piece)
    return accumulator.result()


def figures(statistic):
    return statistic.minimum, statistic.maximum, statistic.count, statistic.non_finite


def assert_counted(statistic, values, non_finite=0):
    """All figures of a statistic, computed again from the finite values."""
    assert figures(statistic) == (values.min(), values.max(), values.size, non_finite)
    assert statistic.amax == np.abs(values).max()
    buckets = np.searchsorted(edges_by_formula(), np.abs(values).astype(np.float64), side="right") - 1
    np.testing.assert_array_equal(statistic.histogram, np.bincount(buckets.reshape(-1), minlength=BUCKETS))


def edges_by_formula():
    exponent, mantissa = np.divmod(np.arange(255 * 128), 128)
    subnormal = mantissa / 128 * 2.0**-126
    return np.where(exponent == 0, subnormal, (1 + mantissa / 128) * 2.0 ** (exponent - 127.0))
