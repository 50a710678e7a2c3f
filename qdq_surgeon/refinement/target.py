"""What the INT8 model must reach, by keeping ops in float, and what that took."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..edges import count
from ..errors import QdqError
from .sensitivity import OpNoise


@dataclass(frozen=True)
class Target:
    """Keep the `worst` ops in float; or as many as it takes to reach all of these numbers that are not None.

    `sqnr` in dB and `agreement` from 0 to 1 are those of the worst output, as the comparison gives them.
    Raises QdqError for a target that is no number.
    """

    worst: int = 0
    sqnr: float | None = None
    agreement: float | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        for number in (self.sqnr, self.agreement, self.score):
            if number is not None and not math.isfinite(number):
                raise QdqError(f"a target must be a finite number, not {number:g}")

    @property
    def is_searched(self) -> bool:
        return any(number is not None for number in (self.sqnr, self.agreement, self.score))

    def __bool__(self) -> bool:
        return self.is_searched or self.worst > 0

    def is_reached(self, sqnr: float, agreement: float | None, score: float | None) -> bool:
        """True where no number is below its target, and there is one for each."""
        pairs = ((self.sqnr, sqnr), (self.agreement, agreement), (self.score, score))
        return all(wanted is None or (found is not None and found >= wanted) for wanted, found in pairs)

    def missed_by(self, sqnr: float, agreement: float | None, score: float | None) -> str:
        """The numbers that are below their targets, in words; empty where none is."""
        found = (("SQNR", self.sqnr, sqnr), ("agreement", self.agreement, agreement), ("score", self.score, score))
        below = ((name, wanted, number) for name, wanted, number in found if wanted is not None and number is not None)
        return ", ".join(
            f"{name} {number:.4g} instead of {wanted:g}" for name, wanted, number in below if number < wanted
        )

    def __str__(self) -> str:
        wanted = (("SQNR", self.sqnr, " dB"), ("agreement", self.agreement, ""), ("score", self.score, ""))
        return ", ".join(f"{name} {number:g}{unit}" for name, number, unit in wanted if number is not None)


@dataclass(frozen=True)
class MixedPrecision:
    """The ops that stay float for a target, and what that gives up.

    `share_of_macs` is their share of the multiply-accumulates of all quantized ops (None: unknown). `trials` models
    were tried on `samples` samples, on which `reached` says that the target is met.
    """

    target: Target
    ops: tuple[OpNoise, ...]
    share_of_macs: float | None
    trials: int
    samples: int
    reached: bool

    def __str__(self) -> str:
        if not self.ops and not self.target.is_searched:
            return "no op kept float: none adds to the error"
        if not self.ops:
            return f"{self.target} reached with every planned op in INT8 ({count(self.samples, 'calibration sample')})"
        macs = "unknown MACs" if self.share_of_macs is None else f"{self.share_of_macs:.1%} of the MACs"
        lines = [f"{count(len(self.ops), 'op')} kept float, {macs}{self._why}:"]
        lines += [f"  {op.op}: {op.share:.1%} of the error" for op in self.ops]
        return "\n".join(lines)

    @property
    def _why(self) -> str:
        if not self.target.is_searched:
            return ", the worst by error"
        verb = "to reach" if self.reached else "WITHOUT reaching"
        return f", {verb} {self.target} on {count(self.samples, 'calibration sample')} ({count(self.trials, 'trial')})"
