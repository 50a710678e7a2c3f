"""Mixed precision: from a ranking and a target to the ops that stay float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .search import Ops, fewest, noisiest
from .sensitivity import OpNoise
from .target import MixedPrecision, Target


def keep_float(
    target: Target, noises: Sequence[OpNoise], reaches: Callable[[Ops], bool], samples: int
) -> tuple[Ops, MixedPrecision]:
    """Which ops to keep float for the target, and the report. `reaches` tries them, on so many samples."""
    tried: dict[Ops, bool] = {}

    def tries(ops: Ops) -> bool:
        if ops not in tried:
            tried[ops] = reaches(ops)
        return tried[ops]

    chosen = fewest(noises, tries) if target.is_searched else noisiest(noises, target.worst)
    kept = tuple(noise for noise in noises if noise.output in chosen)
    total = sum(noise.macs for noise in noises)
    share = sum(noise.macs for noise in kept) / total if total else None
    reached = not target.is_searched or tries(chosen)
    return chosen, MixedPrecision(target, kept, share, len(tried), samples, reached)
