"""Counts arrays into a Statistic: min and max by NumPy, the histogram by numba where it is installed, else by NumPy.

Both give the same counts, bit for bit. numba takes about a fifth of the time for an element, but up to a second
to start, so it counts where there is much to count.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from .statistics import BUCKETS, EPOCHS, FIRST_NON_FINITE, Statistic

CHUNK = 1 << 16
"""How many elements are counted at once, so that they stay in the cache."""
COMPILED_FROM = 1 << 27
"""From how many counted elements on the time to start numba is won back."""
_LANES = 4  # tables that take turns, so that equal neighbours (the zeros of a Relu) do not wait for each other


class Accumulator:
    """One tensor's Statistic in the making. Several threads may add at once."""

    def __init__(self, ranges_only: bool = False) -> None:
        self._lock = threading.Lock()
        self._minimum, self._maximum = math.inf, -math.inf
        self._count = self._non_finite = 0
        self._growth = np.zeros(EPOCHS)
        self._tables = None if ranges_only else np.zeros((_LANES, BUCKETS), np.int64)

    def add(self, array: NDArray[Any], batch: int = 0) -> None:
        """Count all elements of a float array of any shape; FP16 and BF16 are widened, which is exact.

        `batch` is the position of the batch in its run.
        """
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        kernel = _kernel_for(flat.size) if self._tables is not None else None
        for start in range(0, flat.size, CHUNK):
            self._add(flat[start : start + CHUNK], (batch + 1).bit_length() - 1, kernel)

    def _add(self, chunk: NDArray[np.float32], epoch: int, kernel: Kernel | None) -> None:
        low, high, finite = float(chunk.min()), float(chunk.max()), chunk.size
        if not (math.isfinite(low) and math.isfinite(high)):
            kept = chunk[np.isfinite(chunk)]
            low, high, finite = (
                *((float(kept.min()), float(kept.max())) if kept.size else (math.inf, -math.inf)),
                kept.size,
            )
        counted = kernel is None and self._tables is not None and _bincount(chunk)
        with self._lock:  # plus 0, because which of 0 and -0 is smaller depends on the order
            self._minimum, self._maximum = min(self._minimum, low) + 0.0, max(self._maximum, high) + 0.0
            self._count += finite
            self._non_finite += chunk.size - finite
            self._growth[epoch] = max(self._growth[epoch], -low, high)
            if kernel:
                kernel(chunk.view(np.uint32), self._tables)
            elif self._tables is not None:
                self._tables[0] += counted

    def merge(self, statistic: Statistic) -> None:
        """Count what was counted before."""
        with self._lock:
            self._minimum = min(self._minimum, statistic.minimum)
            self._maximum = max(self._maximum, statistic.maximum)
            self._count += statistic.count
            self._non_finite += statistic.non_finite
            np.maximum(self._growth, statistic.growth, out=self._growth)
            if self._tables is not None and statistic.histogram is not None:
                self._tables[0] += statistic.histogram

    def result(self) -> Statistic:
        with self._lock:
            histogram = None if self._tables is None else self._tables.sum(axis=0)
            if histogram is not None:
                histogram[FIRST_NON_FINITE:] = 0
            return Statistic(
                self._minimum, self._maximum, self._count, self._non_finite, histogram, self._growth.copy()
            )


class Kernel(Protocol):
    """Adds the buckets of float32 bits to the tables of an Accumulator."""

    def __call__(self, bits: NDArray[np.uint32], tables: NDArray[np.int64] | None) -> None: ...


def _bincount(chunk: NDArray[np.float32]) -> NDArray[np.int64]:
    buckets = (chunk.view(np.uint32) >> np.uint32(16)) & np.uint32(BUCKETS - 1)
    return np.bincount(buckets, minlength=BUCKETS)


class _Tally:
    """How many elements this process has counted."""

    elements = 0


def _kernel_for(elements: int) -> Kernel | None:
    """The compiled kernel, once enough has been counted to win back its start; None before, and without numba."""
    _Tally.elements += elements
    return compiled() if _Tally.elements >= COMPILED_FROM else None


@functools.cache
def compiled() -> Kernel | None:
    """The counting loop compiled by numba; None where numba is not installed."""
    try:
        numba: Any = importlib.import_module("numba")
    except ImportError:
        return None

    bits_type = numba.types.Array(numba.uint32, 1, "C", readonly=True, aligned=False)

    def count(bits: Any, tables: Any) -> None:
        whole = bits.size // 4 * 4
        for i in range(0, whole, 4):
            tables[0, (bits[i] >> 16) & 0x7FFF] += 1
            tables[1, (bits[i + 1] >> 16) & 0x7FFF] += 1
            tables[2, (bits[i + 2] >> 16) & 0x7FFF] += 1
            tables[3, (bits[i + 3] >> 16) & 0x7FFF] += 1
        for i in range(whole, bits.size):
            tables[0, (bits[i] >> 16) & 0x7FFF] += 1

    signature = numba.void(bits_type, numba.int64[:, ::1])
    try:
        return cast(Kernel, numba.njit(signature, nogil=True, cache=True)(count))
    except RuntimeError:  # no folder to keep the compiled loop in
        return cast(Kernel, numba.njit(signature, nogil=True)(count))
