"""Counts are exact, by numba as by NumPy, and do not depend on how the values were cut, ordered or stored."""

import importlib.util
import math
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest

from qdq_surgeon.calibration import counting
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


def test_the_largest_value_is_noted_for_each_epoch_of_batches():
    """Batch 0, batches 1 and 2, 3 to 6, 7 to 14 and so on."""
    accumulator = Accumulator()
    for batch in range(8):
        accumulator.add(np.float32([batch, -2 * batch]), batch)
    assert accumulator.result().growth[:5].tolist() == [0, 4, 12, 14, 0]


def test_ranges_alone_have_no_histogram():
    values = random().standard_normal(1000).astype(np.float32)
    accumulator = Accumulator(ranges_only=True)
    accumulator.add(np.append(values, np.float32(np.inf)))
    statistic = accumulator.result()
    assert figures(statistic) == (values.min(), values.max(), 1000, 1)
    assert statistic.histogram is None


def test_zero_has_one_sign_in_every_order():
    """-0 and 0 are equal, and which is smaller depends on who asks first; equal statistics have equal bytes."""
    for order in ([0.0], [-0.0]), ([-0.0], [0.0]), ([-0.0, 0.0], []):
        statistic = counted(*(np.float32(values) for values in order))
        assert not np.signbit([statistic.minimum, statistic.maximum]).any()


@pytest.mark.parametrize("ranges_only", [False, True])
def test_what_was_counted_before_can_be_taken_up(ranges_only):
    values = [random(seed).standard_normal(500).astype(np.float32) for seed in range(3)]
    whole, resumed, before = (Accumulator(ranges_only) for _ in range(3))
    for batch, array in enumerate(values):
        whole.add(array, batch)
    before.add(values[0], 0)
    resumed.merge(before.result())
    for batch, array in enumerate(values[1:], 1):
        resumed.add(array, batch)
    assert_equal(resumed.result(), whole.result())


def test_several_threads_may_add_at_once():
    values = [random(seed).standard_normal(100_000).astype(np.float32) for seed in range(8)]
    accumulator = Accumulator()
    threads = [threading.Thread(target=accumulator.add, args=(array, batch)) for batch, array in enumerate(values)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_counted(accumulator.result(), np.concatenate(values))


# ---- numba and NumPy -------------------------------------------------------------------------------------------------

numba_only = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@numba_only
def test_numba_and_numpy_count_all_buckets_of_all_float32_alike():
    """All upper halves of a float32, each with the smallest and the largest lower half: every edge from both sides."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([upper, upper | 0xFFFF, upper | 0x1234])
    by_numba, by_numpy = tables_of(bits, "numba"), tables_of(bits, "numpy")
    np.testing.assert_array_equal(by_numba, by_numpy)
    np.testing.assert_array_equal(by_numba, np.full(1 << 15, 6))


@numba_only
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 1001, CHUNK, CHUNK + 1, 2 * CHUNK - 1])
def test_numba_and_numpy_count_any_number_of_values(size):
    bits = random(size).integers(0, 1 << 32, size, np.uint32)
    by_numba, by_numpy = (added(bits.view(np.float32), way) for way in ("numba", "numpy"))
    assert_equal(by_numba, by_numpy)
    assert by_numba.count + by_numba.non_finite == size


STORED = {
    "read-only": lambda a: np.frombuffer(a.tobytes(), np.float32),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(np.float32),
    "every other": lambda a: np.repeat(a, 2)[::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "big-endian": lambda a: a.astype(">f4"),
    "broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "column-major": lambda a: np.asfortranarray(a.reshape(10, -1)),
    "float64": lambda a: a.astype(np.float64),
}


@pytest.mark.parametrize("way", ["numpy", pytest.param("numba", marks=numba_only)])
@pytest.mark.parametrize("stored", STORED)
def test_arrays_may_be_stored_in_any_way(stored, way):
    array = STORED[stored](random().standard_normal(4 * 10 * 777).astype(np.float32))
    assert_counted(added(array, way), array.astype(np.float32))


def test_no_bit_pattern_makes_numpy_warn():
    """Signaling NaN among them."""
    bits = np.concatenate([np.arange(0x7F80_0000, 0x7F81_0000), np.arange(0xFFBF_0000, 0xFFC1_0000)]).astype(np.uint32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistic = counted(bits.view(np.float32), np.float32([1]))
    assert figures(statistic) == (1, 1, 1, bits.size)


def test_without_numba_numpy_counts(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    counting.compiled.cache_clear()
    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(counting, "COMPILED_FROM", 0)
    try:
        assert counting.compiled() is None
        values = random().standard_normal(1000).astype(np.float32)
        assert_counted(counted(values), values)
    finally:
        counting.compiled.cache_clear()


@numba_only
def test_numba_starts_when_there_is_much_to_count(monkeypatch):
    monkeypatch.setattr(counting._Tally, "elements", 0)
    monkeypatch.setattr(counting, "COMPILED_FROM", 100)
    assert [counting._kernel_for(60) is not None for _ in range(3)] == [False, True, True]


def test_ranges_alone_do_not_start_numba(monkeypatch):
    def start():
        raise AssertionError("numba was started")

    monkeypatch.setattr(counting, "compiled", start)
    monkeypatch.setattr(counting, "COMPILED_FROM", 0)
    Accumulator(ranges_only=True).add(np.ones(10, np.float32))


def added(array, way):
    """The statistic of one array, counted by numba or by NumPy."""
    accumulator = Accumulator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "COMPILED_FROM", 0 if way == "numba" else math.inf)
        accumulator.add(array)
    return accumulator.result()


def tables_of(bits, way):
    """The counts of all buckets, those of NaN and infinity included."""
    if way == "numpy":
        return counting._bincount(bits.view(np.float32))
    tables = np.zeros((4, BUCKETS), np.int64)
    counting.compiled()(bits, tables)
    return tables.sum(axis=0)


def random(seed=0):
    return np.random.default_rng(seed)


def counted(*pieces):
    accumulator = Accumulator()
    for piece in pieces:
        accumulator.add(piece)
    return accumulator.result()


def figures(statistic):
    return statistic.minimum, statistic.maximum, statistic.count, statistic.non_finite


def assert_equal(one, other):
    """All figures of two statistics, bit for bit."""
    assert repr(figures(one)) == repr(figures(other))
    np.testing.assert_array_equal(one.histogram, other.histogram)
    np.testing.assert_array_equal(one.growth, other.growth)


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
