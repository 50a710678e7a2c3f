"""Deals one stream of batches out: most to calibration, some to the comparison, in one reading."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import DataError
from .feeds import ENOUGH_SAMPLES, HELD_OUT_EVERY, Batch, Feeds

Shard: TypeAlias = tuple[int, int]
"""(i, n): the i-th of n parts, counted from 1."""

SHELF_SAMPLES = 256
SHELF_BYTES = 128 << 20
"""How much of a stream is kept for the comparison."""


class _Shelf:
    """Keeps copies of batches up to a size."""

    def __init__(self, limit: int = SHELF_BYTES) -> None:
        self.batches: list[Batch] = []
        self.samples = self._bytes = 0
        self._limit = limit

    @property
    def has_room(self) -> bool:
        return self.samples < SHELF_SAMPLES and self._bytes < self._limit

    def add(self, batch: Batch) -> None:
        self.batches.append(batch.copied())
        self.samples += batch.samples
        self._bytes += batch.nbytes


@dataclass
class Split:
    """Deals one stream of batches out: at most `limit` samples to calibration, some (`hold_out`) to the comparison.

    `shard` (i, n) leaves only every n-th batch, from the i-th on. Iterate it once, for the calibration batches.
    Afterwards `samples` counts these, `evaluation` holds the batches for the comparison (none where `keep` is
    False), and `held_out` says that calibration has not seen them.
    """

    feeds: Feeds
    limit: int | None = None
    hold_out: bool = True
    keep: bool = True
    shard: Shard | None = None
    samples: int = 0
    held_out: bool = False
    evaluation: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"{self.limit} samples cannot calibrate: give at least one")
        if self.shard and not 1 <= self.shard[0] <= self.shard[1]:
            raise DataError(f"there is no shard {self.shard[0]} of {self.shard[1]}: shards count from 1")

    @property
    def _batches(self) -> Iterator[Batch]:
        if self.shard is None:
            return self.feeds.batches
        return itertools.islice(self.feeds.batches, self.shard[0] - 1, None, self.shard[1])

    @property
    def _source(self) -> str:
        shard = f" (shard {self.shard[0]}/{self.shard[1]})" if self.shard else ""
        return f"{self.feeds.source}{shard}"

    @property
    def most(self) -> int | None:
        """At most how many samples will calibrate; None where nothing tells."""
        total = self.feeds.total
        if total is not None and self.shard:
            total = -(-total // self.shard[1])
        known = [number for number in (total, self.limit) if number is not None]
        return min(known, default=None)

    def __iter__(self) -> Iterator[Batch]:
        seen, held = _Shelf(SHELF_BYTES if self.keep else 0), _Shelf()
        for index, batch in enumerate(self._batches):
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
            raise DataError(f"{self._source} holds no samples: give at least one")
        self.held_out = bool(held.batches)
        self.evaluation = held.batches or seen.batches

    def for_comparison(self) -> list[Batch]:
        """The batches to compare on; where calibration did not run, all that fit."""
        if self.evaluation:
            return self.evaluation
        shelf = _Shelf()
        for batch in itertools.takewhile(lambda _: shelf.has_room, self.feeds.batches):
            shelf.add(batch)
        if not shelf.samples:
            raise DataError(f"{self.feeds.source} holds no samples: give at least one")
        self.evaluation = shelf.batches
        return self.evaluation

    def _is_enough(self, batch: Batch) -> bool:
        """True where the limit is reached, or where a batch that cannot be cut would exceed it."""
        if self.limit is None or not self.samples:
            return False
        return self.samples + (1 if batch.divisible else batch.samples) > self.limit

    def _used(self, batch: Batch, seen: _Shelf) -> Batch:
        self.samples += batch.samples
        if seen.has_room:
            seen.add(batch)
        return batch
