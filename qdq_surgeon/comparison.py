"""Runs the float and the Q/DQ model on the same data and measures how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from .calibration.feeds import Batch
from .calibration.sessions import Progress, Session
from .edges import count
from .errors import DataError, ModelError
from .report.tables import decibels, share, table

SIMULATED = "INT8 (Q/DQ simulated in onnxruntime)"
SIMULATED_HALF = "INT8 and FP16 (simulated in onnxruntime, FP16 overflow not simulated)"


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """One output of the two models over all samples.

    `sqnr` is 10 log10(sum of ref^2 / sum of (ref - int8)^2) in dB (inf where they are equal), `cosine` the cosine
    between both as one long vector (nan where the error has no bound), `max_error` the largest |ref - int8|.
    `agreement` is the share of samples with the same top-1 class, None where the output does not look like class
    scores.
    """

    name: str
    sqnr: float
    cosine: float
    max_error: float
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The float model (or what `reference` says) against what `where` says.

    `held_out`: calibration had not seen these samples (None: unknown).
    """

    outputs: tuple[OutputComparison, ...]
    samples: int
    data: str
    held_out: bool | None
    where: str = SIMULATED
    reference: str = "float"

    @property
    def sqnr(self) -> float:
        """The lowest SQNR of any output, in dB."""
        return min((output.sqnr for output in self.outputs), default=math.inf)

    @property
    def agreement(self) -> float | None:
        """The lowest top-1 agreement of any output that looks like class scores; None where none does."""
        return min((output.agreement for output in self.outputs if output.agreement is not None), default=None)

    def __str__(self) -> str:
        seen = {True: ", not used for calibration", False: ", used for calibration too", None: ""}[self.held_out]
        rows = [
            (o.name, decibels(o.sqnr), f"{o.cosine:.6f}", f"{o.max_error:.4g}", share(o.agreement))
            for o in self.outputs
        ]
        head = f"{self.reference} against {self.where} on {count(self.samples, 'sample')} of {self.data}{seen}"
        return f"{head}\n{table(('output', 'SQNR', 'cosine', 'max error', 'top-1 agreement'), rows)}"


class Runner(Protocol):
    """Something that runs a model: an onnxruntime session, or an engine."""

    @property
    def outputs(self) -> tuple[str, ...]: ...

    def run(self, batch: Batch, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        """The named outputs, once for the batch or once per sample."""


def compare_models(
    reference: ModelProto,
    quantized: ModelProto,
    batches: Iterable[Batch],
    data: str,
    held_out: bool | None,
    progress: Progress | None = None,
    where: str = SIMULATED,
    custom_ops: Iterable[Path] = (),
) -> Comparison:
    """Run both models in onnxruntime over the batches, one at a time, and compare them.

    Raises ModelError where onnxruntime refuses a model or their outputs differ in name or shape,
    DataError where it cannot run it.
    """
    left = Session(reference, custom_ops=custom_ops)
    right = Session(quantized, simulate=True, custom_ops=custom_ops)
    return compare_runners(left, right, batches, data, held_out, progress, where)


def compare_runners(
    reference: Runner,
    other: Runner,
    batches: Iterable[Batch],
    data: str,
    held_out: bool | None,
    progress: Progress | None = None,
    where: str = SIMULATED,
) -> Comparison:
    """Compare every output that is a tensor of numbers; `where` says what the second runner is.

    Raises ModelError where their outputs differ in name or shape, DataError where there are no samples.
    """
    names = reference.outputs
    if set(names) != set(other.outputs):
        raise ModelError(f"the models have different outputs: {', '.join(names)} and {', '.join(other.outputs)}")
    measured = {name: _Measured(name) for name in names}
    done = 0
    for batch in batches:
        pairs = zip(reference.run(batch, names), other.run(batch, names), strict=True)
        for expected, actual in pairs:
            for name, left, right in zip(names, expected, actual, strict=True):
                measured[name].add(left, right)
        done += batch.samples
        if progress:
            progress("compare", done, None)
    if not done:
        raise DataError(f"{data} holds no samples: give at least one")
    return Comparison(tuple(m.result() for m in measured.values() if m.numbers), done, data, held_out, where)


class _Measured:
    """Running sums over one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.numbers = False
        self._signal = self._noise = self._product = self._power = self._error = 0.0
        self._same = self._rows = 0
        self._scores = True

    def add(self, expected: Any, actual: Any) -> None:
        if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "biufV":
            return
        if expected.shape != actual.shape:
            shapes = f"{list(expected.shape)} and {list(actual.shape)}"
            raise ModelError(f"the models' outputs '{self.name}' have different shapes: {shapes}")
        self.numbers = True
        left, right = expected.astype(np.float64), actual.astype(np.float64)
        self._scores = self._scores and expected.dtype.kind in "fV" and _looks_like_scores(expected.shape)
        if self._scores:
            self._same += int(np.sum(_top1(left) == _top1(right)))
            self._rows += len(left)
        self._sum(left, right)

    def _sum(self, left: NDArray[np.float64], right: NDArray[np.float64]) -> None:
        """Add up what is finite in both; where only one is, or infinities differ, the error has no bound."""
        finite = np.isfinite(left) & np.isfinite(right)
        if not finite.all():
            same = (left == right) | (np.isnan(left) & np.isnan(right))
            bound = 0.0 if (finite | same).all() else math.inf
            self._noise += bound
            self._error = max(self._error, bound)
            left, right = left[finite], right[finite]
        error = left - right
        self._signal += float(np.sum(left * left))
        self._power += float(np.sum(right * right))
        self._product += float(np.sum(left * right))
        self._noise += float(np.sum(error * error))
        self._error = max(self._error, float(np.max(np.abs(error), initial=0)))

    def result(self) -> OutputComparison:
        return OutputComparison(
            self.name,
            sqnr=_decibels(self._signal, self._noise),
            cosine=self._cosine(),
            max_error=self._error,
            agreement=self._same / self._rows if self._scores and self._rows else None,
        )

    def _cosine(self) -> float:
        if not math.isfinite(self._noise):
            return math.nan
        norms = math.sqrt(self._signal * self._power)
        return self._product / norms if norms else float(self._signal == self._power)


def _looks_like_scores(shape: Sequence[int]) -> bool:
    """(samples, classes) with at least two classes, maybe with further dimensions of 1."""
    return len(shape) >= 2 and shape[1] >= 2 and all(size == 1 for size in shape[2:])


def _top1(scores: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(scores.reshape(len(scores), -1).argmax(1))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
