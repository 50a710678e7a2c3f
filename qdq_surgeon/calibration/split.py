"""Deals one stream of batches out: most to calibration, some to the comparison, in one reading."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import DataError
from .feeds import ENOUGH_SAMPLES, HELD_OUT_EVERY, Batch, Feeds

SHELF_SAMPLES = 256
SHELF_BYTES = 256 << 20
"""How much of a stream is kept for the comparison."""


class _Shelf:
    """Keeps copies of batches up to a size: whoever gave an array may fill it anew for the next batch."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.samples = self._bytes = 0

    @property
    def has_room(self) -> bool:
        return self.samples < SHELF_SAMPLES and self._bytes < SHELF_BYTES

    def add(self, batch: Batch) -> None:
        self.batches.append(replace(batch, feed={name: array.copy() for name, array in batch.feed.items()}))
        self.samples += batch.samples
        self._bytes += batch.nbytes


@dataclass
class Split:
    """Deals one stream of batches out: at most `limit` samples to calibration, some (`hold_out`) to the comparison.

    Iterate it once, for the calibration batches. Afterwards `samples` and `digest` describe these, `evaluation`
    holds the batches for the comparison, and `held_out` says that calibration has not seen them.
    """

    feeds: Feeds
    limit: int | None = None
    hold_out: bool = True
    samples: int = 0
    held_out: bool = False
    evaluation: list[Batch] = field(default_factory=list)
    _hash: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"{self.limit} samples cannot calibrate: give at least one")

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())

    @property
    def most(self) -> int | None:
        """At most how many samples will calibrate; None where nothing tells."""
        known = [number for number in (self.feeds.total, self.limit) if number is not None]
        return min(known, default=None)

    def __iter__(self) -> Iterator[Batch]:
        seen, held = _Shelf(), _Shelf()
        for index, batch in enumerate(self.feeds.batches):
            enough = self._is_enough(batch)
            in_turn = self.limit is None and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if self.hold_out and held.has_room and (enough or in_turn):
                held.add(batch)
            elif enough:
                break
            else:
                yield self._used(batch if self.limit is None else batch.part(0, self.limit - self.samples), seen)
        if self.limit is None and self.samples + held.samples < ENOUGH_SAMPLES:
            yield from (self._used(batch, seen) for batch in held.batches)
            held = _Shelf()
        if not self.samples:
            raise DataError(f"{self.feeds.source} holds no samples: give at least one")
        self.held_out = bool(held.batches)
        self.evaluation = held.batches or seen.batches

    def for_comparison(self) -> tuple[list[Batch], bool]:
        """The batches to compare on, and whether calibration has not seen them: where it did not run, all that fit."""
        if self.evaluation:
            return self.evaluation, self.held_out
        shelf = _Shelf()
        for batch in itertools.takewhile(lambda _: shelf.has_room, self.feeds.batches):
            shelf.add(batch)
        if not shelf.samples:
            raise DataError(f"{self.feeds.source} holds no samples: give at least one")
        self.evaluation, self.held_out = shelf.batches, True
        return self.evaluation, self.held_out

    def _is_enough(self, batch: Batch) -> bool:
        """True where the limit is reached, or where a batch that cannot be cut would exceed it."""
        if self.limit is None or not self.samples:
            return False
        return self.samples + (1 if batch.divisible else batch.samples) > self.limit

    def _used(self, batch: Batch, seen: _Shelf) -> Batch:
        self.samples += batch.samples
        for name in sorted(batch.feed):
            array = batch.feed[name]
            self._hash.update(f"{name} {array.dtype} {array.shape}".encode())
            self._hash.update(np.ascontiguousarray(array).view(np.uint8).data)
        if seen.has_room:
            seen.add(batch)
        return batch
