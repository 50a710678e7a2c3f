"""Which ops to keep float, so that a target is reached with the fewest multiply-accumulates in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from .sensitivity import OpNoise

Ops: TypeAlias = frozenset[str]
"""Ops by their first outputs."""
Reaches: TypeAlias = Callable[[Ops], bool]
"""True where the target is reached with these ops in float."""


def noisiest(ops: Iterable[OpNoise], number: int) -> Ops:
    """The ops with the largest part in the error."""
    return frozenset(op.output for op in sorted(ops, key=lambda op: -op.share)[:number])


def fewest(ops: Sequence[OpNoise], reaches: Reaches) -> Ops:
    """The ops to keep float.

    Two rankings are tried, by error and by error for each multiply-accumulate: of each the shortest beginning that
    reaches the target, without the ops that turn out not to be needed. The cheaper one wins. All ops where nothing
    else reaches it. Which sets reach the target is taken to grow with the set, which holds but for noise.
    """
    known: dict[Ops, bool] = {}

    def enough(chosen: Ops) -> bool:
        if chosen not in known:
            known[chosen] = reaches(chosen)
        return known[chosen]

    if enough(frozenset()):
        return frozenset()
    macs = {op.output: op.macs for op in ops}
    rankings = (lambda op: -op.share, lambda op: -op.share / max(op.macs, 1))
    found = [_pruned(_shortest([op.output for op in sorted(ops, key=key)], enough), macs, enough) for key in rankings]
    return min(found, key=lambda chosen: (sum(macs[op] for op in chosen), len(chosen)))


def _shortest(ranked: Sequence[str], enough: Reaches) -> Ops:
    """The shortest beginning that is enough."""
    low, high = 0, 1
    while high < len(ranked) and not enough(frozenset(ranked[:high])):
        low, high = high, 2 * high
    high = min(high, len(ranked))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(frozenset(ranked[:middle])) else (middle, high)
    return frozenset(ranked[:high])


def _pruned(chosen: Ops, macs: dict[str, int], enough: Reaches) -> Ops:
    """Without the ops that are not needed, the most expensive first."""
    for op in sorted(chosen, key=lambda op: (-macs[op], op)):
        if len(chosen) > 1 and enough(chosen - {op}):
            chosen -= {op}
    return chosen
