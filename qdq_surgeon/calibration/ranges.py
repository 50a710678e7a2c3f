"""Range methods: a statistic -> the threshold T at which values saturate. The scale is T / 127.

All methods read the same statistic, so another one never needs another run of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..edges import LEVELS
from ..errors import QdqError, nearest
from .statistics import BUCKET_EDGES, FIRST_NON_FINITE, Statistic

DEFAULT_METHOD = "mse"
DEFAULT_PERCENTILE = 99.99

_OCTAVES = 8
_COARSE, _FINE = 16, 128  # candidates per octave
_ENTROPY_BINS = 2048
_ENTROPY_LEVELS = 128
_ENTROPY_STEP = 8

Array: TypeAlias = NDArray[np.float64]
RangeMethod: TypeAlias = Callable[[Statistic], float]


@dataclass(frozen=True, slots=True)
class _Buckets:
    """The buckets that hold anything: edges (the last one cut at the exact maximum) and counts."""

    low: Array
    high: Array
    count: Array


def range_method(text: str) -> RangeMethod:
    """The method called `max`, `mse`, `entropy`, `percentile` or `percentile:P` with 0 < P <= 100.

    Raises QdqError for any other name.
    """
    name, _, parameter = text.partition(":")
    plain = {"max": maximum, "mse": mse, "entropy": entropy}
    if name == "percentile":
        try:
            percent = float(parameter or DEFAULT_PERCENTILE)
        except ValueError:
            percent = -1.0
        if not 0 < percent <= 100:
            raise QdqError(f"method {text!r}: write percentile:P with a number P above 0 and at most 100")
        return partial(percentile, percent=percent)
    if name not in plain or parameter:
        raise QdqError(
            f"unknown method {text!r}.{nearest(name, [*plain, 'percentile'])} Methods: max, mse, entropy, percentile:P"
        )
    return plain[name]


def maximum(statistic: Statistic) -> float:
    """T = the largest |x|: nothing saturates."""
    return statistic.amax


def percentile(statistic: Statistic, percent: float = DEFAULT_PERCENTILE) -> float:
    """T below which `percent` % of all |x| lie, interpolated within its bucket."""
    if not statistic.amax:
        return 0.0
    buckets = _filled(statistic)
    total = np.cumsum(buckets.count)
    wanted = percent / 100 * total[-1]
    index = min(int(np.searchsorted(total, wanted)), len(total) - 1)
    if not buckets.low[index]:  # among the zeros: no range at all
        return statistic.amax
    share = 1 - (total[index] - wanted) / buckets.count[index]
    return float(buckets.low[index] + share * (buckets.high[index] - buckets.low[index]))


def mse(statistic: Statistic) -> float:
    """T that minimises the expected squared error of rounding and saturation under the histogram.

    Within a bucket values count as uniform, for which the error of rounding to multiples of the scale has a closed
    form. The search goes from the largest |x| down 8 octaves, then finer around the best.
    """
    if not statistic.amax:
        return 0.0
    buckets = _filled(statistic)
    coarse = statistic.amax * 2.0 ** (-np.arange(_OCTAVES * _COARSE) / _COARSE)
    best = coarse[int(np.argmin(expected_squared_error(buckets, coarse)))]
    around = best * 2.0 ** (np.arange(_FINE // _COARSE, -_FINE // _COARSE - 1, -1) / _FINE)
    fine = around[around <= statistic.amax]
    return float(fine[int(np.argmin(expected_squared_error(buckets, fine)))])


def entropy(statistic: Statistic) -> float:
    """T with the least Kullback-Leibler divergence between the values and their 128 levels.

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017, on 2048 bins of |x|. Zeros are left out: every
    scale represents them exactly.
    """
    if not statistic.amax:
        return 0.0
    bins = _linear_bins(_filled(statistic), statistic.amax)
    widths = range(_ENTROPY_LEVELS, _ENTROPY_BINS + 1, _ENTROPY_STEP)
    divergences = [_divergence(bins, width) for width in widths]
    best = widths[len(widths) - 1 - int(np.argmin(divergences[::-1]))]
    return best / _ENTROPY_BINS * statistic.amax


def expected_squared_error(buckets: _Buckets, thresholds: Array) -> Array:
    """The sum over all values of (x - quantized x)^2, for saturation at each of the thresholds."""
    scale = thresholds[:, None] / LEVELS
    low, high = buckets.low / scale, buckets.high / scale
    width = high - low
    exact = width <= 0
    mean = (_error_integral(high) - _error_integral(low)) / np.where(exact, 1, width)
    point = (low - np.minimum(np.rint(low), LEVELS)) ** 2
    return np.asarray(np.where(exact, point, mean) @ buckets.count * scale[:, 0] ** 2)


def _error_integral(u: Array) -> Array:
    """The integral from 0 to u of (v - level(v))^2, in units of the scale; levels end at 127."""
    level = np.minimum(np.floor(u + 0.5), LEVELS)
    error = u - level
    return level / 12 + error * error * error / 3  # a power would take ten times as long


def _filled(statistic: Statistic) -> _Buckets:
    if statistic.histogram is None:
        raise QdqError("these statistics hold ranges only, for the method max: calibrate again for another")
    index = np.flatnonzero(statistic.histogram[:FIRST_NON_FINITE])
    upper = np.append(BUCKET_EDGES, np.inf)[index + 1]
    low = BUCKET_EDGES[index]
    return _Buckets(low, np.minimum(upper, statistic.amax), statistic.histogram[index].astype(np.float64))


def _linear_bins(buckets: _Buckets, amax: float) -> Array:
    """Counts in 2048 equal bins over (0, amax], each bucket spread evenly over its width; zeros left out."""
    filled = buckets.high > 0
    low, high, count = buckets.low[filled], buckets.high[filled], buckets.count[filled]
    if low[0] == 0:
        low, high, count = low[1:], high[1:], count[1:]
    edges = np.concatenate([[0.0], np.stack([low, high], 1).reshape(-1)])
    steps = np.concatenate([[0.0], np.stack([np.zeros_like(count), count], 1).reshape(-1)])
    cumulative = np.interp(np.linspace(0, amax, _ENTROPY_BINS + 1), edges, np.cumsum(steps))
    cumulative[-1] = count.sum()
    return np.diff(cumulative)


def _divergence(bins: Array, width: int) -> float:
    inside = bins[:width]
    clipped = inside.copy()
    clipped[-1] += bins[width:].sum()
    starts = np.arange(_ENTROPY_LEVELS) * width // _ENTROPY_LEVELS
    filled = (inside > 0).astype(np.float64)
    sums, counts = np.add.reduceat(inside, starts), np.add.reduceat(filled, starts)
    lengths = np.diff(np.append(starts, width))
    level = np.repeat(sums / np.maximum(counts, 1), lengths) * filled
    if not level.sum() > 0:
        return float("inf")
    p, q = clipped / clipped.sum(), level / level.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))
