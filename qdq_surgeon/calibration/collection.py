"""The one pass over the data: every batch through the float model, every tensor into its statistic."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..bfloat16 import widened
from ..errors import DataError
from ..model import Model
from .batches import arrays_of
from .counting import Accumulator
from .feeds import Batch, Feeds
from .sessions import DEFAULT_PROVIDER, Progress
from .split import Split
from .statistics import Origin, Statistic, Statistics
from .taps import Reader, same_values

CHECKPOINT_SECONDS = 20.0


def fingerprint(batch: Batch) -> int:
    """The sum of the SHA-256 of each sample, modulo 2^256: it depends on neither order nor grouping of samples."""
    parts = [batch.part(index, index + 1) for index in range(batch.samples if batch.divisible else 1)]
    return sum(int.from_bytes(_sha256(part), "big") for part in parts) % (1 << 256)


def _sha256(batch: Batch) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(batch.feed):
        for array in map(np.ascontiguousarray, arrays_of(batch.feed[name])):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


class Checkpoint:
    """A file that holds a run in the making, so that an interrupted one can go on.

    `before` is what an interrupted run had counted; `write` is called now and then with more.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.before = Statistics.load(path) if resume and path.exists() else None
        self._due = time.monotonic() + CHECKPOINT_SECONDS

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def write(self, statistics: Statistics) -> None:
        statistics.save(self.path)
        self._due = time.monotonic() + CHECKPOINT_SECONDS


class _Run:
    """What a run has counted so far. Several threads may count at once."""

    def __init__(self, model: Model, tensors: Sequence[str], ranges_only: bool) -> None:
        self._model = model
        self._ranges_only = ranges_only
        self._aliases = same_values(model.graph, tensors)
        self._counted = {name: Accumulator(ranges_only) for name in dict.fromkeys(self._aliases.values())}
        self._lock = threading.Lock()
        self.samples = self.digest = 0

    @property
    def read(self) -> tuple[str, ...]:
        return tuple(self._counted)

    def count(self, piece: Batch, index: int, reader: Reader) -> int:
        """Feed some samples of batch `index`; how many they were."""
        reader.run(piece, lambda name, values: self._counted[name].add(values, index))
        return self.pass_over(piece)

    def pass_over(self, piece: Batch) -> int:
        """Note which samples were counted."""
        mark = fingerprint(piece)
        with self._lock:
            self.digest = (self.digest + mark) % (1 << 256)
            self.samples += piece.samples
        return piece.samples

    def take_up(self, before: Statistics) -> None:
        """Start from what an interrupted run had counted."""
        kinds = {statistic.histogram is None for statistic in before.tensors.values()}
        same = before.model_digest == self._model.digest and before.tensors.keys() == self._aliases.keys()
        if not same or kinds - {self._ranges_only}:
            raise DataError("the checkpoint is of another model or other options: leave --resume out to start anew")
        for alias, name in {alias: name for name, alias in self._aliases.items()}.items():
            self._counted[alias].merge(before.tensors[name])

    def statistics(self, feeds: Feeds) -> Statistics:
        results: dict[str, Statistic] = {name: counted.result() for name, counted in self._counted.items()}
        tensors = {name: results[alias] for name, alias in self._aliases.items()}
        origin = Origin((feeds.source,), f"{self.digest:064x}", self.samples, feeds.synthetic)
        return Statistics(tensors, self._model.digest, origin)


def collect(
    model: Model,
    tensors: Sequence[str],
    split: Split,
    *,
    ranges_only: bool = False,
    provider: str = DEFAULT_PROVIDER,
    memory: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run the float model once over the calibration part of the data; one statistic per tensor, never an activation.

    `ranges_only` leaves the histograms out. `memory` bytes are the most that the process should take.
    Raises ModelError where onnxruntime refuses the model, DataError where the data do not fit.
    """
    run = _Run(model, tensors, ranges_only)
    numbered = enumerate(split)
    first = next(numbered)  # a split without samples raises
    reader = Reader(_readable(model), run.read, first[1], provider, memory)
    remaining: Iterator[tuple[int, Batch]] = itertools.chain([first], numbered)
    if checkpoint and checkpoint.before:
        run.take_up(checkpoint.before)
        remaining = _skip(run, remaining, checkpoint.before.origin)
    pending: deque[Future[int]] = deque()
    done = run.samples

    def finish(but: int) -> None:
        nonlocal done
        while len(pending) > but:
            done += pending.popleft().result()
            if progress:
                progress("calibrate", done, None if split.most is None else max(done, split.most))

    pool = ThreadPoolExecutor(reader.workers)
    try:
        for index, piece in _pieces(remaining, reader.rows):
            pending.append(pool.submit(run.count, piece, index, reader))
            finish(but=reader.workers)
            if checkpoint and checkpoint.is_due:
                finish(but=0)
                checkpoint.write(run.statistics(split.feeds))
        finish(but=0)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        if checkpoint:
            checkpoint.write(run.statistics(split.feeds))
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return run.statistics(split.feeds)


def _readable(model: Model) -> Model:
    """The model in types that onnxruntime computes in."""
    proto = widened(model.proto)
    return model if proto is model.proto else replace(model, proto=proto, original=proto)


def _pieces(numbered: Iterator[tuple[int, Batch]], rows: int) -> Iterator[tuple[int, Batch]]:
    """The batches cut to what is fed at once, in copies: other threads read them while the next are made."""
    for index, batch in numbered:
        for start in range(0, batch.samples, rows) if batch.divisible else (0,):
            yield index, batch.part(start, start + rows).copied()


def _skip(run: _Run, numbered: Iterator[tuple[int, Batch]], before: Origin) -> Iterator[tuple[int, Batch]]:
    """Pass over the samples that were counted before. Raises DataError where the data are not the same."""
    rest: list[tuple[int, Batch]] = []
    while run.samples < before.samples and not rest:
        following = next(numbered, None)
        if following is None:
            break
        index, batch = following
        left = before.samples - run.samples
        run.pass_over(batch.part(0, left))
        if left < batch.samples:
            rest.append((index, batch.part(left, batch.samples)))
    if f"{run.digest:064x}" != before.digest:
        raise DataError("the data differ from those of the interrupted run: leave --resume out to start anew")
    return itertools.chain(rest, numbered)
