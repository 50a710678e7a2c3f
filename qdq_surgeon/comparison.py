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
from .refinement.judging import channel_axis, powers
from .refinement.trace import TensorError, first_jump, worst
from .report.tables import decibels, share, table

SIMULATED = "INT8 (Q/DQ simulated in onnxruntime)"
LOST_AGREEMENT = 0.8
LOST_SQNR = 5.0
FEW = 3
LOST_CHANNEL = 0.5
"""A channel is lost where the power of its noise is more than this share of its signal's."""
SILENT, FELL_SILENT = 1e-3, 0.1
"""Beside the loudest channel's power a channel is silent below this share; it fell silent where less of it is left."""
LOST_ADVICE = (
    "Keep the worst layers float (--float-worst 3, --target-sqnr DB) or look closer (qdq-surgeon sensitivity)."
)
SIMULATED_HALF = "INT8 and FP16 (simulated in onnxruntime, FP16 overflow not simulated)"


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """One output of the two models over all samples.

    `sqnr` is 10 log10(sum of ref^2 / sum of (ref - int8)^2) in dB (inf where they are equal), `cosine` the cosine
    between both as one long vector (nan where the error has no bound), `max_error` the largest |ref - int8|.
    `agreement` is the share of samples with the same top-1 class, None where the output does not look like class
    scores. `lost` of its `channels` hold more than half as much noise as signal (channels: see `channel_axis`; one
    where there is no such axis).
    """

    name: str
    sqnr: float
    cosine: float
    max_error: float
    agreement: float | None
    channels: int = 1
    lost: int = 0

    def trouble(self, samples: int) -> str:
        """What is wrong with it in words, where it is lost; empty where it is not."""
        others = 0.0 if self.agreement is None else samples * (1 - self.agreement)
        if others >= FEW and others > samples * (1 - LOST_AGREEMENT):
            return f"'{self.name}' chooses another class for {others / samples:.0%} of the samples"
        if self.sqnr < LOST_SQNR:
            return f"'{self.name}' has an SQNR of {self.sqnr:.1f} dB"
        if self.lost > self.channels / 2:
            return f"{self.lost} of the {self.channels} channels of '{self.name}' are mostly noise"
        return ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The float model (or what `reference` says) against what `where` says.

    `held_out`: calibration had not seen these samples (None: unknown). `errors` are those of the ops, where they were
    traced; `scores` those of the reference and of the other by the user's own measure.
    """

    outputs: tuple[OutputComparison, ...]
    samples: int
    data: str
    held_out: bool | None
    where: str = SIMULATED
    reference: str = "float"
    errors: tuple[TensorError, ...] = ()
    scores: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """In words that this model lost its accuracy, in which outputs, and where; empty where it did not."""
        found = [output.trouble(self.samples) for output in sorted(self.outputs, key=lambda output: output.sqnr)]
        troubles = [text for text in found if text]
        if not troubles:
            return ""
        jump = first_jump(self.errors)
        where = f" The error first jumps at {jump}." if jump else ""
        rest = f"; and {count(len(troubles) - FEW, 'more output')}" if len(troubles) > FEW else ""
        return f"THIS MODEL LOST ITS ACCURACY: {'; '.join(troubles[:FEW])}{rest}.{where} {LOST_ADVICE}"

    @property
    def sqnr(self) -> float:
        """The lowest SQNR of any output, in dB."""
        return min((output.sqnr for output in self.outputs), default=math.inf)

    @property
    def agreement(self) -> float | None:
        """The lowest top-1 agreement of any output that looks like class scores; None where none does."""
        return min((output.agreement for output in self.outputs if output.agreement is not None), default=None)

    @property
    def figures(self) -> str:
        """All but the verdict."""
        seen = {True: ", not used for calibration", False: ", used for calibration too", None: ""}[self.held_out]
        rows = [
            (o.name, decibels(o.sqnr), f"{o.cosine:.6f}", f"{o.max_error:.4g}", share(o.agreement))
            for o in self.outputs
        ]
        lines = []
        if self.scores:
            lines.append(f"score: {self.reference} {self.scores[0]:.6g}, INT8 {self.scores[1]:.6g}")
        if self.errors:
            ops = ", ".join(map(str, worst(self.errors))) or "no op"
            lines.append(f"most error is added at (on calibration samples): {ops}")
        head = f"{self.reference} against {self.where} on {count(self.samples, 'sample')} of {self.data}{seen}"
        shown = table(("output", "SQNR", "cosine", "max error", "top-1 agreement"), rows)
        return "\n".join((head, shown, *lines))

    def __str__(self) -> str:
        return f"{self.figures}\n{self.verdict}".rstrip()


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
        self._channels: dict[int, NDArray[np.float64]] = {}

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
        self._sum_channels(left, right)

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

    def _sum_channels(self, left: NDArray[np.float64], right: NDArray[np.float64]) -> None:
        """Signal and noise of each channel, for every number of channels that the samples come with."""
        axis = channel_axis([left.shape])
        if axis is None:
            return
        found = np.stack([*powers(left, right, axis), powers(right, right, axis)[0]])
        self._channels[left.shape[axis]] = self._channels.get(left.shape[axis], 0.0) + found

    def result(self) -> OutputComparison:
        found = self._channels.popitem()[1] if len(self._channels) == 1 else np.zeros((3, 1))
        return OutputComparison(
            self.name,
            sqnr=_decibels(self._signal, self._noise),
            cosine=self._cosine(),
            max_error=self._error,
            agreement=self._same / self._rows if self._scores and self._rows else None,
            channels=found.shape[1],
            lost=_lost(*found),
        )

    def _cosine(self) -> float:
        if not math.isfinite(self._noise):
            return math.nan
        norms = math.sqrt(self._signal * self._power)
        return self._product / norms if norms else float(self._signal == self._power)


def _lost(signal: NDArray[np.float64], noise: NDArray[np.float64], power: NDArray[np.float64]) -> int:
    """How many channels are mostly noise, of those not nearly silent beside the loudest, and those that fell silent."""
    matter = (signal > SILENT * signal.max()) | ((signal > 0) & (power < FELL_SILENT * signal))
    return int(np.sum(matter & (noise > LOST_CHANNEL * signal)))


def _looks_like_scores(shape: Sequence[int]) -> bool:
    """(samples, classes) with at least two classes, or an image of one pixel; (samples, anchors, 1) is a detector's."""
    return len(shape) in (2, 4, 5) and shape[1] >= 2 and all(size == 1 for size in shape[2:])


def _top1(scores: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(scores.reshape(scores.shape[:2]).argmax(1))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
