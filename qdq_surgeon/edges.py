"""The domain types that travel between the rooms. All are frozen; none holds a graph object."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import PlanError

GRAPH_OUTPUT = -1
"""The slot of the edge by which a graph's own output is read."""

PLAN_FORMAT = 1

LEVELS = 127
"""Symmetric INT8: the largest positive level, so scale = T / 127."""

IN_MODEL = "in-model"
"""The rule of the edges that read a pair which came with the model."""


def scoped(scope: tuple[str, ...], name: str) -> str:
    """A tensor's name, unique in the whole model: with the path of control-flow bodies before it."""
    return "/".join((*scope, name)) if name else ""


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """One reading of one tensor: input `slot` of the node whose first output is `reader`.

    `scope` is the path of control-flow bodies, () for the top graph. A graph's own output `y` is the edge
    `Edge((), "y", GRAPH_OUTPUT)`. `op` and `name` are for display and filters, not part of the identity.
    """

    scope: tuple[str, ...]
    reader: str
    slot: int
    op: str = field(default="", compare=False)
    name: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """The reading node's first output, unique in the whole model."""
        return scoped(self.scope, self.reader)

    @property
    def label(self) -> str:
        """The reading node as a person would call it: its op and its name (without one, its first output)."""
        return f"{self.op} {scoped(self.scope, self.name or self.reader)}"

    def __str__(self) -> str:
        return f"graph output {self.reader}" if self.slot == GRAPH_OUTPUT else f"{self.label}[{self.slot}]"


@dataclass(frozen=True, slots=True)
class Read:
    """An edge that reads a Q/DQ pair, and the rule that decided so."""

    edge: Edge
    rule: str


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor with the edges that will read its Q/DQ pair: one pair, one scale per tensor.

    `weight` says that the tensor is constant. `axis` is the channel axis of a per-channel weight (None: per
    tensor). `source` names the tensor whose scale this one reuses, because only data movement lies between.
    `range` is a (low, high) known without data.
    """

    tensor: str
    reads: tuple[Read, ...]
    weight: bool = False
    axis: int | None = None
    source: str | None = None
    range: tuple[float, float] | None = None

    @property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(read.edge for read in self.reads)

    @property
    def added(self) -> tuple[Read, ...]:
        """The reads that did not come with the model."""
        return tuple(read for read in self.reads if read.rule != IN_MODEL)

    @property
    def is_in_model(self) -> bool:
        """True where a pair of this tensor came with the model."""
        return len(self.added) < len(self.reads)

    def __str__(self) -> str:
        first = self.reads[0].rule
        readers = ", ".join(
            str(read.edge) if read.rule == first else f"{read.edge} ({read.rule})" for read in self.reads
        )
        return f"{self.tensor}{self.notes} -> {readers}"

    @property
    def notes(self) -> str:
        """What is special about this pair's scale, in brackets, or nothing."""
        notes = [
            f"axis {self.axis}" if self.axis is not None else "",
            f"scale of {self.source}" if self.source else "",
            f"range {self.range[0]:g}..{self.range[1]:g}" if self.range else "",
        ]
        text = ", ".join(note for note in notes if note)
        return f" ({text})" if text else ""


@dataclass(frozen=True, slots=True)
class Kept:
    """An edge that stays float on purpose, and the rule that decided so."""

    tensor: str
    edge: Edge
    rule: str

    def __str__(self) -> str:
        return f"{self.tensor} -> {self.edge}"


@dataclass(frozen=True, slots=True)
class Miss:
    """A rule whose shape matched at a node while a condition failed, or that lost to an earlier decision.

    `edge` is one edge of the node. `near` is true where the rule would have quantized an edge that stays float.
    """

    rule: str
    edge: Edge
    reason: str
    near: bool

    def __str__(self) -> str:
        return f"{self.edge.label}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Share:
    """Tensors that get one scale, provided that their ranges lie within `limit` of each other (None: always).

    Where they do not, `edges` go back to float: a Concat whose inputs cannot share has no pairs of its own.
    """

    rule: str
    tensors: tuple[str, ...]
    edges: tuple[Edge, ...]
    limit: float | None

    def __str__(self) -> str:
        limit = f" if within a factor of {self.limit:g}" if self.limit else ""
        return f"{', '.join(self.tensors)}{limit}"


@dataclass(frozen=True)
class Plan:
    """What will be quantized, what stays float, and why. Pure names: print it, diff it, save it, apply it.

    `because` maps each rule that decided something to its reason, quoted from the placement file.
    `model_digest` and `placement_digest` tie the plan to its model and its rules.
    """

    placement: str
    placement_digest: str
    model_digest: str
    because: Mapping[str, str] = field(hash=False)
    sites: tuple[Site, ...]
    kept: tuple[Kept, ...] = ()
    shares: tuple[Share, ...] = ()
    misses: tuple[Miss, ...] = ()

    @property
    def adds_pairs(self) -> bool:
        """True where an edge is quantized that was not so in the model."""
        return any(site.added for site in self.sites)

    @property
    def near_misses(self) -> tuple[Miss, ...]:
        return tuple(miss for miss in self.misses if miss.near)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """The plan as text: sites by rule, what shares a scale, what is kept float, near misses."""
        reads = sum(len(site.reads) for site in self.sites)
        given = sum(site.is_in_model for site in self.sites)
        came = f" ({given} in the model)" if given else ""
        yield (
            f"{count(len(self.sites), 'Q/DQ pair')}{came} for {count(reads, 'edge')}; "
            f"{count(len(self.kept), 'edge')} kept float; "
            f"{count(len(self.near_misses), 'near miss', 'near misses')} (placement {self.placement})"
        )
        yield from self._section("quantized", ((site.reads[0].rule, str(site)) for site in self.sites))
        yield from self._section("one scale", ((share.rule, str(share)) for share in self.shares))
        yield from self._section("kept float", ((kept.rule, str(kept)) for kept in self.kept))
        yield from self._section("near misses", ((miss.rule, str(miss)) for miss in self.near_misses))

    def _section(self, title: str, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
        by_rule = defaultdict(list)
        for rule, line in entries:
            by_rule[rule].append(line)
        if by_rule:
            yield from ("", title)
        for rule, lines in by_rule.items():
            yield f"  {rule}: {self.because[rule]}"
            yield from (f"    {line}" for line in lines)

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads back unchanged."""
        return json.dumps({"format": PLAN_FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote. Raises PlanError where the text is not a plan of this format."""
        try:
            raw = json.loads(text)
            for beside in ("comparison", "refinements"):
                raw.pop(beside, None)
            if raw.pop("format") != PLAN_FORMAT:
                raise PlanError(f"the plan has another format than {PLAN_FORMAT}: make it again with --plan --json")
            return _checked(_plan(raw))
        except PlanError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"not a saved plan ({type(error).__name__}: {error}): make one with --plan --json"
            ) from None


def count(number: int, noun: str, plural: str = "") -> str:
    """'1 site', '2 sites'."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _plan(raw: dict[str, Any]) -> Plan:
    sites = tuple(
        Site(
            **{
                **site,
                "reads": tuple(Read(_edge(read["edge"]), read["rule"]) for read in site["reads"]),
                "range": tuple(site["range"]) if site["range"] else None,
            }
        )
        for site in raw.pop("sites")
    )
    kept = tuple(Kept(**{**item, "edge": _edge(item["edge"])}) for item in raw.pop("kept"))
    shares = tuple(
        Share(**{**item, "tensors": tuple(item["tensors"]), "edges": tuple(map(_edge, item["edges"]))})
        for item in raw.pop("shares")
    )
    misses = tuple(Miss(**{**item, "edge": _edge(item["edge"])}) for item in raw.pop("misses"))
    return Plan(**raw, sites=sites, kept=kept, shares=shares, misses=misses)


def _checked(plan: Plan) -> Plan:
    """Refuse what a slip of the hand in a saved plan can make, as far as the plan alone can tell."""
    edges = [edge for site in plan.sites for edge in site.edges]
    edges += [edge for share in plan.shares for edge in share.edges] + [kept.edge for kept in plan.kept]
    rules = {read.rule for site in plan.sites for read in site.reads} | {kept.rule for kept in plan.kept}
    rules |= {share.rule for share in plan.shares} | {miss.rule for miss in plan.misses}
    wrong = [f"the slot of {edge.reader!r} is {edge.slot!r}" for edge in edges if type(edge.slot) is not int]
    wrong += [f"the site of {site.tensor!r} has no readers" for site in plan.sites if not site.reads]
    wrong += [f"the range of {s.tensor!r} is {s.range}" for s in plan.sites if s.range and not _is_range(s.range)]
    wrong += [f"the axis of {s.tensor!r} is {s.axis!r}" for s in plan.sites if type(s.axis) not in (int, type(None))]
    wrong += ["a share has no tensors" for share in plan.shares if not share.tensors]
    wrong += [f"the rule {rule!r} has no reason" for rule in sorted(map(str, rules)) if rule not in plan.because]
    if wrong:
        raise PlanError(f"the saved plan is not sound: {wrong[0]}")
    return plan


def _is_range(bounds: tuple[float, float]) -> bool:
    numbers = all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in bounds)
    return numbers and len(bounds) == 2 and bounds[0] < bounds[1]


def _edge(raw: dict[str, Any]) -> Edge:
    return Edge(**{**raw, "scope": tuple(raw["scope"])})
