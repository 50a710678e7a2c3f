"""The range method chosen by trying: the best on some samples, if it is as good as the default on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from ..calibration.feeds import Batch
from ..calibration.ranges import DEFAULT_METHOD
from ..calibration.sessions import Progress
from ..edges import count
from ..model import Model
from .judging import decibels, judged, number_of, parted, relative_error
from .lockstep import walk

AUTO = "auto"
CANDIDATES = (DEFAULT_METHOD, "max", "percentile:99.999", "percentile:99.99", "entropy")


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """The method chosen, the `best` of those tried on `tried` samples, and what it and the default gave on others.

    `judged` is the number of the others; 0: the same ones.
    """

    method: str
    best: str
    tried: int
    judged: int
    sqnr: float
    default_sqnr: float

    def __str__(self) -> str:
        found = f"range method {self.best}: the best of {len(CANDIDATES)} on {count(self.tried, 'sample')}"
        if self.best == DEFAULT_METHOD:
            return found
        against = f"{self.sqnr:.1f} dB against {self.default_sqnr:.1f} dB by {DEFAULT_METHOD}"
        kept = "" if self.method == self.best else f", so {DEFAULT_METHOD} is kept"
        others = count(self.judged, "other") if self.judged else "the same"
        return f"{found}; {against} on {others}{kept}"


def best_method(
    model: Model,
    build: Callable[[str], ModelProto],
    samples: Sequence[Batch],
    progress: Progress | None = None,
) -> MethodChoice:
    """Try every method; `build` makes the Q/DQ model with it."""
    results = judged(model.graph)
    chosen_on, judging = parted(samples)
    errors: dict[str, float] = {}
    for method in CANDIDATES:
        errors[method] = relative_error(walk(model, build(method), chosen_on, results))
        if progress:
            progress(AUTO, len(errors), len(CANDIDATES))
    best = min(errors, key=lambda method: errors[method])
    ours, default = (relative_error(walk(model, build(method), judging, results)) for method in (best, DEFAULT_METHOD))
    return MethodChoice(
        best if ours <= default else DEFAULT_METHOD,
        best,
        number_of(chosen_on),
        number_of(samples) - number_of(chosen_on),
        decibels(ours),
        decibels(default),
    )
