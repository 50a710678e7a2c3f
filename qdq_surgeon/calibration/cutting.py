"""Cuts arrays with the samples along axis 0 into batches, a few rows at a time, wherever the arrays lie."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .batches import Batch, Feeds, Input, check_type, fixed_batch, make_batch

log = logging.getLogger("qdq_surgeon")

DYNAMIC_BATCH = 8
"""How many samples are fed at once where the model leaves the batch open."""
HELD_OUT_EVERY = 4
"""One batch in four is kept for the comparison, when there is enough data."""
ENOUGH_SAMPLES = 16
"""With fewer samples than this nothing is held out: calibration needs them all."""


class Rows(Protocol):
    """An array that need not lie in memory: its rows are read in order, a few at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def pieces(self, size: int) -> Iterator[NDArray[Any]]:
        """The rows in pieces of `size`, the last with what is left; the whole array where it has no axis."""
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """The rows of an array in memory, or mapped from a file: pieces are views of it."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def pieces(self, size: int) -> Iterator[NDArray[Any]]:
        if not self.array.ndim:
            yield self.array
            return
        for start in range(0, len(self.array), size):
            yield self.array[start : start + size]


@dataclass(frozen=True)
class _Sample:
    """An array that is one sample, with the batch axis that it lacks."""

    array: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def pieces(self, size: int) -> Iterator[NDArray[Any]]:
        yield next(self.array.pieces(max((1, *self.array.shape))))[None]


def with_batch_axis(rows: Rows, declared: Input) -> Rows:
    """The array itself, or as the one sample that it is where its rank is one lower than declared."""
    return _Sample(rows) if declared.lacks_axis(rows.shape) else rows


@dataclass(frozen=True)
class _Cut:
    """One input's pieces, one per batch: how many, the samples in all of them, and how to read them."""

    number: int
    samples: int
    read: Callable[[], Iterator[NDArray[Any]]]


def cut(arrays: Mapping[str, Rows], inputs: tuple[Input, ...], source: str) -> Feeds:
    """Cut one array per input, with the samples along axis 0, into batches. A single batch of one serves all batches.

    Where the model fixes the batch, the last samples that do not fill one are left out, with a warning. Raises
    DataError for wrong types and shapes and different numbers of samples; while batches are read, for their values.
    """
    cuts = {declared.name: _cut(arrays[declared.name], declared, source) for declared in inputs}
    many = [declared for declared in inputs if cuts[declared.name].number != 1]
    number = _number_of_batches(cuts, arrays, many, source)
    fixed = fixed_batch(many or inputs)
    total = max((cuts[declared.name].samples for declared in inputs if declared.is_open), default=fixed * number)

    def batches() -> Iterator[Batch]:
        with ExitStack() as stack:
            streams = {name: stack.enter_context(closing(_stream(one))) for name, one in cuts.items()}
            for index in range(number):
                feed = {name: next(stream) for name, stream in streams.items()}
                yield make_batch(feed, inputs, f"{source}, batch {index}", fixed)

    return Feeds(batches(), source, total)


def open_batch(samples: int) -> int:
    """How many samples to feed at once: fewer where a batch to hold out would be missing otherwise."""
    return DYNAMIC_BATCH if samples < ENOUGH_SAMPLES else min(DYNAMIC_BATCH, samples // HELD_OUT_EVERY)


def _cut(rows: Rows, declared: Input, source: str) -> _Cut:
    where, shape, rank = f"{source}: '{declared.name}'", rows.shape, declared.rank
    check_type(rows.dtype, declared, where)
    if not shape and rank in (0, None):
        return _Cut(1, 1, lambda: rows.pieces(1))
    if not shape:
        raise DataError(f"{where} is a single number, but the model wants {declared.text}")
    if not shape[0]:
        raise DataError(f"{where} is empty")
    if not _can_cut(shape, declared):
        raise declared.misfit(shape, where)
    if rank is not None and len(shape) == rank + 1:
        return _Cut(shape[0], shape[0] * (shape[1] if rank else 1), lambda: _without_axis(rows))
    size = declared.batch or open_batch(shape[0])
    whole = shape[0] // size * size if declared.batch else shape[0]
    if not whole:
        raise DataError(f"{where} has {shape[0]} samples, but the model's batch is {size}")
    if whole < shape[0]:
        left = shape[0] - whole
        log.warning("%s: the last %d samples do not fill the model's batch of %d and are left out", source, left, size)
    return _Cut(-(-whole // size), whole, lambda: rows.pieces(size))


def _can_cut(shape: tuple[int, ...], declared: Input) -> bool:
    """True where all dimensions behind the first are those of one batch, or of one sample."""
    if declared.shape is None:
        return True
    return declared.fits(shape[1:]) or replace(declared, shape=declared.shape[1:]).fits(shape[1:])


def _without_axis(rows: Rows) -> Iterator[NDArray[Any]]:
    """Every row as a batch of its own."""
    for piece in rows.pieces(1):
        yield piece[0]


def _number_of_batches(cuts: Mapping[str, _Cut], arrays: Mapping[str, Rows], many: Iterable[Input], source: str) -> int:
    numbers = {cuts[declared.name].number for declared in many}
    samples = {
        arrays[declared.name].shape[0]
        for declared in many
        if declared.is_open and len(arrays[declared.name].shape) == declared.rank
    }
    if len(numbers) > 1 or len(samples) > 1:
        sizes = ", ".join(f"{declared.name} {arrays[declared.name].shape[0]}" for declared in many)
        raise DataError(f"{source}: the inputs have different numbers of samples ({sizes})")
    return next(iter(numbers), 1)


def _stream(one: _Cut) -> Generator[NDArray[Any], None, None]:
    """The pieces; a single one again and again."""
    pieces = one.read()
    yield from itertools.repeat(next(pieces)) if one.number == 1 else pieces
