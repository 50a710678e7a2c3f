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
    Afterwards `samples` counts these, and `seen` holds the first of them (none where `keep` is False).
    """

    feeds: Feeds
    limit: int | None = None
    hold_out: bool = True
    keep: bool = True
    shard: Shard | None = None
    samples: int = 0
    _held: _Shelf = field(default_factory=_Shelf)

    def __post_init__(self) -> None:
        self._seen = _Shelf(SHELF_BYTES if self.keep else 0)
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

    @property
    def seen(self) -> list[Batch]:
        return self._seen.batches

    @property
    def held_out(self) -> bool:
        """True where calibration has not seen what `for_comparison` gives."""
        return bool(self._held.batches)

    def __iter__(self) -> Iterator[Batch]:
        held = self._held
        for index, batch in enumerate(self._batches):
            enough = self._is_enough(batch)
            in_turn = self.limit is None and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if self.hold_out and held.has_room and (enough or in_turn):
                held.add(batch)
            elif enough:
                break
            else:
                yield self._used(batch if self.limit is None else batch.part(0, self.limit - self.samples))
        if self.limit is None and self.samples + held.samples < ENOUGH_SAMPLES:
            self._held = _Shelf()
            yield from (self._used(batch) for batch in held.batches)
        if not self.samples:
            raise DataError(f"{self._source} holds no samples: give at least one")

    def deal(self) -> None:
        """Deal out as much as is kept, where no calibration runs."""
        for _ in self:
            if not self._seen.has_room and (self._held.batches or not self.hold_out):
                break

    def for_comparison(self) -> list[Batch]:
        """The batches to compare on; where nothing was dealt out, all that fit."""
        if not self._held.batches and not self._seen.batches:
            for batch in itertools.takewhile(lambda _: self._seen.has_room, self.feeds.batches):
                self._seen.add(batch)
            if not self._seen.samples:
                raise DataError(f"{self.feeds.source} holds no samples: give at least one")
        return self._held.batches or self._seen.batches

    def _is_enough(self, batch: Batch) -> bool:
        """True where the limit is reached, or where a batch that cannot be cut would exceed it."""
        if self.limit is None or not self.samples:
            return False
        return self.samples + (1 if batch.divisible else batch.samples) > self.limit

    def _used(self, batch: Batch) -> Batch:
        self.samples += batch.samples
        if self._seen.has_room:
            self._seen.add(batch)
        return batch
