"""One small statistic per tensor, made in one pass, exact to merge.

The histogram has logarithmic buckets for |x|: the upper 15 bits of a float32 without its sign, that is the exponent
and the first 7 bits of the mantissa. A bucket is 1/128 of an octave wide, no range must be known beforehand, and
counts do not depend on the order or the size of batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 15
FIRST_NON_FINITE = 0x7F80
"""The bucket of infinity; those behind it hold NaN."""
CHUNK = 1 << 16
"""How many elements are counted at once, so that their bits and buckets stay in the cache."""

BUCKET_EDGES: NDArray[np.float64] = (
    (np.arange(FIRST_NON_FINITE, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
)
"""The lower edge of each finite bucket."""


@dataclass(frozen=True, eq=False, slots=True)
class Statistic:
    """What is known of one tensor's values: over the finite ones, except for `non_finite`.

    `histogram[b]` counts the values with |x| in [BUCKET_EDGES[b], BUCKET_EDGES[b + 1]); it has BUCKETS entries,
    of which those from FIRST_NON_FINITE on stay 0. `minimum` and `maximum` are exact (inf and -inf when empty).
    """

    minimum: float
    maximum: float
    count: int
    non_finite: int
    histogram: NDArray[np.int64] = field(repr=False)

    @property
    def amax(self) -> float:
        """The largest |x|; 0 when no finite value was seen."""
        return max(-self.minimum, self.maximum) if self.count else 0.0

    def __or__(self, other: Statistic) -> Statistic:
        """The statistic of both sets of values together. Exact, associative and commutative."""
        return Statistic(
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.count + other.count,
            self.non_finite + other.non_finite,
            self.histogram + other.histogram,
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The data behind a calibration: where from, SHA-256 over what was fed, how many samples, made up or not."""

    data: str
    digest: str
    samples: int
    synthetic: bool = False


@dataclass(frozen=True)
class Statistics:
    """The statistics of a calibration run: tensor name -> Statistic; of which model; from which data."""

    tensors: Mapping[str, Statistic]
    model_digest: str
    origin: Origin

    def __str__(self) -> str:
        lines = [f"{len(self.tensors)} tensors over {self.origin.samples} samples of {self.origin.data}"]
        lines += [f"  {name}: {s.minimum:.6g} .. {s.maximum:.6g}" for name, s in self.tensors.items()]
        return "\n".join(lines)


class Accumulator:
    """Counts arrays into a Statistic."""

    def __init__(self) -> None:
        self._minimum = math.inf
        self._maximum = -math.inf
        self._counts = np.zeros(BUCKETS, np.int64)

    def add(self, array: NDArray[Any]) -> None:
        """Count all elements of a float array of any shape; FP16 and BF16 are widened, which is exact."""
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK]
            buckets = (chunk.view(np.uint32) >> np.uint32(16)) & np.uint32(BUCKETS - 1)
            self._counts += np.bincount(buckets, minlength=BUCKETS)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = flat[np.isfinite(flat)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (math.inf, -math.inf)
        self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)

    def result(self) -> Statistic:
        counts = self._counts.copy()
        non_finite = int(counts[FIRST_NON_FINITE:].sum())
        counts[FIRST_NON_FINITE:] = 0
        return Statistic(self._minimum, self._maximum, int(counts.sum()), non_finite, counts)
