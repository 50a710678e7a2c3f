"""Which ops to keep float, so that a target is reached with the fewest multiply-accumulates in float.

A trial is expensive, and the errors of the ops are known and add up. So the candidates are known before anything is
tried: the sets that take away more of the error than every cheaper set. A bisection along them asks which is enough.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median_high
from typing import NamedTuple, TypeAlias

from .sensitivity import OpNoise

Ops: TypeAlias = frozenset[str]
"""Ops by their first outputs."""
Reaches: TypeAlias = Callable[[Ops], bool]
"""True where the target is reached with these ops in float."""

FEW_CANDIDATES, NEARLY = 256, 1.02
"""Where there are more, those go whose cost is nearly that of one that takes away more."""
STRIDE = 4
"""How much farther along the candidates each trial goes until one is enough: most targets need few ops."""
SINGLY, MOST_TRIALS = 8, 24
"""How many ops of an answer, the most expensive, are left out one by one to see; and how many such trials there are."""


class _Candidate(NamedTuple):
    """A set of ops, as one op more than the `rest`: its cost, and its part in the error."""

    cost: int
    share: float
    op: str = ""
    rest: _Candidate | None = None

    @property
    def ops(self) -> Ops:
        return frozenset(self._names())

    def _names(self) -> Iterator[str]:
        candidate = self
        while candidate.rest is not None:
            yield candidate.op
            candidate = candidate.rest


def noisiest(ops: Iterable[OpNoise], number: int) -> Ops:
    """The ops with the largest part in the error."""
    return frozenset(op.output for op in sorted(ops, key=lambda op: -op.share)[:number])


def fewest(ops: Sequence[OpNoise], reaches: Reaches) -> Ops:
    """The ops to keep float; all of them where nothing else reaches the target.

    The answer is the last one that was seen to reach, if any was. Which candidates reach the target is taken to grow
    with their part in the error, which holds but for noise.
    """
    known: dict[Ops, bool] = {}

    def enough(chosen: Ops) -> bool:
        if chosen not in known:
            known[chosen] = reaches(chosen)
        return known[chosen]

    costs = _costs(ops)
    return _without_needless(ops, _first(_candidates(ops, costs), enough), costs, enough)


def _costs(ops: Sequence[OpNoise]) -> dict[str, int]:
    """Multiply-accumulates. An op without any costs the conversions around it: as much as the usual op with some."""
    usual = median_high([op.macs for op in ops if op.macs] or [1])
    return {op.output: op.macs or usual for op in ops}


def _candidates(ops: Sequence[OpNoise], costs: dict[str, int]) -> list[Ops]:
    """From no op to every op: the sets that take away more of the error than every cheaper one."""
    front = [_Candidate(0, 0.0)]
    for op in sorted(ops, key=lambda op: (-op.share / costs[op.output], op.output)):
        more = [_Candidate(less.cost + costs[op.output], less.share + op.share, op.output, less) for less in front]
        front = list(_unbeaten([*front, *more]))
        front = front if len(front) <= FEW_CANDIDATES else list(_thinned(front))
    every = frozenset(costs)
    found = [candidate.ops for candidate in front]
    return found if found[-1] == every else [*found, every]


def _unbeaten(candidates: Iterable[_Candidate]) -> Iterator[_Candidate]:
    best = -1.0
    for candidate in sorted(candidates, key=lambda candidate: (candidate.cost, -candidate.share)):
        if candidate.share > best:
            best = candidate.share
            yield candidate


def _thinned(front: Sequence[_Candidate]) -> Iterable[_Candidate]:
    """Of those of nearly the same cost the last, which takes away most; always the first of all, which is free."""
    return {round(math.log1p(candidate.cost) / math.log(NEARLY)): candidate for candidate in front}.values()


def _first(candidates: Sequence[Ops], enough: Reaches) -> Ops:
    """The first candidate that is enough; the last where none before it is."""
    low, high = -1, 0
    while high < len(candidates) - 1 and not enough(candidates[high]):
        low, high = high, min(max(1, STRIDE * high), len(candidates) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(candidates[middle]) else (middle, high)
    return candidates[high]


def _without_needless(ops: Sequence[OpNoise], chosen: Ops, costs: dict[str, int], enough: Reaches) -> Ops:
    """Without ops that turn out not to be needed, since shares are estimates: the most expensive ones, then halves."""
    ranked = [op.output for op in sorted(ops, key=lambda op: op.share) if op.output in chosen]
    expensive = sorted(ranked, key=lambda op: -costs[op])[:SINGLY]
    parts = deque([op] for op in expensive)
    parts.append([op for op in ranked if op not in expensive])
    for _ in range(MOST_TRIALS):
        part = parts.popleft() if parts else []
        if part and enough(chosen.difference(part)):
            chosen = chosen.difference(part)
        elif len(part) > 1:
            parts += (part[: len(part) // 2], part[len(part) // 2 :])
    return chosen
