"""One small statistic per tensor, exact to merge, and the file that keeps them.

The histogram has logarithmic buckets for |x|: the upper 15 bits of a float32 without its sign, that is the exponent
and the first 7 bits of the mantissa. A bucket is 1/128 of an octave wide, no range must be known beforehand, and
counts do not depend on the order or the size of batches.
"""

from __future__ import annotations

import functools
import io
import json
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, PlanError
from ..storage import write_atomically

BUCKETS = 1 << 15
FIRST_NON_FINITE = 0x7F80
"""The bucket of infinity; those behind it hold NaN."""
EPOCHS = 40
FORMAT = 1

BUCKET_EDGES: NDArray[np.float64] = (
    (np.arange(FIRST_NON_FINITE, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
)
"""The lower edge of each finite bucket."""


@dataclass(frozen=True, eq=False, slots=True)
class Statistic:
    """What is known of one tensor's values: over the finite ones, except for `non_finite`.

    `histogram[b]` counts the values with |x| in [BUCKET_EDGES[b], BUCKET_EDGES[b + 1]); it has BUCKETS entries, of
    which those from FIRST_NON_FINITE on stay 0. It is None where only ranges were asked for.
    `minimum` and `maximum` are exact (inf and -inf when empty). `growth[k]`, of EPOCHS entries, is the largest |x|
    among the batches 2^k - 1 to 2^(k+1) - 2 of a run: it tells whether more data still widened the range.
    """

    minimum: float
    maximum: float
    count: int
    non_finite: int
    histogram: NDArray[np.int64] | None = field(repr=False)
    growth: NDArray[np.float64] = field(repr=False, default_factory=lambda: np.zeros(EPOCHS))

    @property
    def amax(self) -> float:
        """The largest |x|; 0 when no finite value was seen."""
        return max(-self.minimum, self.maximum) if self.count else 0.0

    @property
    def is_empty(self) -> bool:
        """True where no value at all was seen."""
        return not (self.count or self.non_finite)

    def __or__(self, other: Statistic) -> Statistic:
        """The statistic of both sets of values together. Exact, associative and commutative."""
        known = self.histogram is not None and other.histogram is not None
        return Statistic(
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.count + other.count,
            self.non_finite + other.non_finite,
            self.histogram + other.histogram if known else None,  # type: ignore[operator]
            np.maximum(self.growth, other.growth),
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The data behind a calibration: where from, a digest of what was fed, how many samples, made up or not.

    The digest is the sum of the SHA-256 of every sample, modulo 2^256: it depends on neither order nor grouping.
    """

    sources: tuple[str, ...]
    digest: str
    samples: int
    synthetic: bool = False

    @property
    def data(self) -> str:
        return " + ".join(self.sources)

    def __or__(self, other: Origin) -> Origin:
        total = (int(self.digest or "0", 16) + int(other.digest or "0", 16)) % (1 << 256)
        return Origin(
            tuple(sorted({*self.sources, *other.sources})),
            f"{total:064x}",
            self.samples + other.samples,
            self.synthetic or other.synthetic,
        )


@dataclass(frozen=True)
class Statistics:
    """The statistics of a calibration run: tensor name -> Statistic; of which model; from which data."""

    tensors: Mapping[str, Statistic]
    model_digest: str
    origin: Origin

    def __or__(self, other: Statistics) -> Statistics:
        """Both runs together: exact, in any order and grouping.

        Raises PlanError where they do not belong together, DataError for the same data twice.
        """
        if self.model_digest != other.model_digest:
            raise PlanError("these statistics belong to different models: merge those of one model")
        missing = sorted(self.tensors.keys() ^ other.tensors.keys())
        if missing:
            raise PlanError(f"some of these statistics lack '{missing[0]}': calibrate all with one placement")
        kinds = {statistic.histogram is None for part in (self, other) for statistic in part.tensors.values()}
        if len(kinds) > 1:
            raise PlanError("some of these statistics hold ranges only, others histograms too: merge those of one kind")
        _check_once([self, other])
        merged = {name: statistic | other.tensors[name] for name, statistic in self.tensors.items()}
        return Statistics(merged, self.model_digest, self.origin | other.origin)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz, whole or not at all. Equal statistics give equal bytes."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        names = sorted(self.tensors)
        rows = [self.tensors[name] for name in names]
        spans = [_span(row.histogram) for row in rows]
        counts = [
            row.histogram[low:high] for row, (low, high) in zip(rows, spans, strict=True) if row.histogram is not None
        ]
        about = {"format": FORMAT, "model": self.model_digest, **asdict(self.origin)}
        file = io.BytesIO()
        np.savez_compressed(
            file,
            about=np.array(json.dumps(about)),
            names=np.array(json.dumps(names)),
            minimum=np.array([row.minimum for row in rows], np.float64),
            maximum=np.array([row.maximum for row in rows], np.float64),
            count=np.array([row.count for row in rows], np.int64),
            non_finite=np.array([row.non_finite for row in rows], np.int64),
            growth=np.array([row.growth for row in rows], np.float64).reshape(len(rows), EPOCHS),
            spans=np.array(spans, np.int64).reshape(len(rows), 2),
            histograms=np.concatenate([np.zeros(0, np.int64), *counts]),
        )
        return file.getvalue()

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote. Raises DataError for any other file."""
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file of statistics")
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as archive:
                return _unpacked({name: archive[name] for name in archive.files})
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:
            raise DataError(f"{path} holds no statistics: make them with `qdq-surgeon calibrate -o`") from error

    def __str__(self) -> str:
        lines = [f"{len(self.tensors)} tensors over {self.origin.samples} samples of {self.origin.data}"]
        lines += [f"  {name}: {s.minimum:.6g} .. {s.maximum:.6g}" for name, s in self.tensors.items()]
        return "\n".join(lines)


def merged(parts: list[Statistics]) -> Statistics:
    """All of them together. Raises PlanError where two do not belong together, DataError for the same data twice."""
    _check_once(parts)
    return functools.reduce(operator.or_, parts)


def _check_once(parts: list[Statistics]) -> None:
    digests = [part.origin.digest for part in parts]
    doubled = next((part for part in parts if part.origin.digest and digests.count(part.origin.digest) > 1), None)
    if doubled:
        raise DataError(f"the same samples of {doubled.origin.data} are there twice: merge each part once")


def _span(histogram: NDArray[np.int64] | None) -> tuple[int, int]:
    """From the first filled bucket to behind the last; (-1, -1) where there is no histogram."""
    if histogram is None:
        return -1, -1
    filled = np.flatnonzero(histogram)
    return (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 0)


def _unpacked(arrays: Mapping[str, NDArray[np.generic]]) -> Statistics:
    about = json.loads(str(arrays["about"]))
    if about.pop("format") != FORMAT:
        raise DataError("another version of qdq-surgeon wrote these statistics: calibrate again")
    model, sources = about.pop("model"), tuple(about.pop("sources"))
    columns = [arrays[name].tolist() for name in ("minimum", "maximum", "count", "non_finite", "spans")]
    names, growth, filled = json.loads(str(arrays["names"])), arrays["growth"], arrays["histograms"]
    tensors, start = {}, 0
    for index, (name, minimum, maximum, count, non_finite, (low, high)) in enumerate(zip(names, *columns, strict=True)):
        histogram = None if low < 0 else np.zeros(BUCKETS, np.int64)
        if histogram is not None:
            histogram[low:high] = filled[start : start + high - low]
            start += high - low
        tensors[name] = Statistic(minimum, maximum, count, non_finite, histogram, growth[index].astype(np.float64))
    return Statistics(tensors, model, Origin(sources, **about))
