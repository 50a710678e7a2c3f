"""Rules x graph -> Plan. Pure: no data, no runtime, and the same answer for any stored order of the nodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..edges import GRAPH_OUTPUT, IN_MODEL, Edge, Kept, Miss, Plan, Read, Share, Site
from ..errors import PlanError
from ..graph import DATA_FREE_OPS, MIN_OPSET, Graph, Node
from ..model import Model
from .commuting import commutes, moved_from
from .patterns import Bound, Match, match_input, match_node, root_ops
from .placement import Condition, Placement, Rule, Selector
from .predicates import Subject, sentence

FILTER_RULE = "filter"
TARGET_RULE = "target"
OUTPUT_RULE = "graph-output"
FOREIGN_RULE = "in-model-type"
BUILT_IN = {
    FILTER_RULE: "Your filter keeps this node in float.",
    TARGET_RULE: "This node stays in float because of the error that it adds: for a target, or as one of the worst.",
    OUTPUT_RULE: "A graph's own outputs keep their type.",
    IN_MODEL: "The model came with this pair.",
    FOREIGN_RULE: "Another input of this op came with a pair that is not 8-bit, so it makes no INT8 op.",
}


@dataclass(frozen=True, slots=True)
class _Decision:
    """What was decided about one edge."""

    rule: str
    quantized: bool
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class _Missed:
    rule: Rule
    node: Node
    reason: str
    wanted: tuple[Edge, ...]


def make_plan(
    model: Model, placement: Placement, out: frozenset[str] = frozenset(), floats: frozenset[str] = frozenset()
) -> Plan:
    """Apply the rules to a model; `out` are the first outputs of the nodes that the user's filters keep float.

    `floats` are those of the nodes that stay float for a target.
    Pairs that the model came with are decided before any rule or filter.
    Nodes are visited consumers first; within a node, rules in file order; the first rule that speaks of an edge
    decides it. Rules with a condition on other readers' decisions are tried after all others.
    """
    planner = _Planner(model, dict.fromkeys(floats, TARGET_RULE) | dict.fromkeys(out, FILTER_RULE))
    for late in (False, True):
        rules = _Index(rule for rule in placement.rules if rule.late is late)
        for node in reversed(model.graph.nodes):
            for rule in rules.of(node.op):
                planner.visit(rule, node, match_node(rule.pattern, node, model.graph, rule.any_order))
        for tensor in model.graph.inputs:
            for rule in rules.anywhere:
                planner.visit(rule, None, match_input(rule.pattern, tensor, model.graph))
    return planner.plan(model, placement)


def check_plan(model: Model, plan: Plan) -> None:
    """Raise PlanError unless the plan belongs to the model and every site's edges read its tensor there."""
    if plan.model_digest != model.digest:
        raise PlanError("the plan belongs to another model: make one for this model with --plan --json")
    _check_existing(model, plan)
    seen: set[Edge] = set()
    for site in plan.sites:
        _check_site(model.graph, site)
        for edge in site.edges:
            node = model.graph.reading_node(edge)
            if node is None or not 0 <= edge.slot < len(node.inputs) or node.inputs[edge.slot] != site.tensor:
                raise PlanError(f"the plan lets {edge} read '{site.tensor}', which it does not do in this model")
            if edge in seen:
                raise PlanError(f"the plan has two pairs for {edge}")
            seen.add(edge)


def _check_existing(model: Model, plan: Plan) -> None:
    given = {edge for pair in model.existing for edge in pair.edges}
    planned = {read.edge for site in plan.sites for read in site.reads if read.rule == IN_MODEL}
    for edge in sorted(given ^ planned):
        raise PlanError(f"the plan and the model do not agree whether {edge} reads a pair that came with the model")


def _check_site(graph: Graph, site: Site) -> None:
    if site.weight is not graph.is_constant(site.tensor):
        raise PlanError(f"the plan takes '{site.tensor}' for {'a weight' if site.weight else 'an activation'}")
    if site.axis is not None and site.added and not (site.weight and 0 <= site.axis < _rank(site.tensor, graph)):
        raise PlanError(f"the plan gives '{site.tensor}' the channel axis {site.axis}, which it does not have")
    if site.source is not None and not graph.position(site.source) < graph.position(site.tensor):
        raise PlanError(f"the plan lets '{site.tensor}' reuse the scale of '{site.source}', which is not upstream")


def _rank(tensor: str, graph: Graph) -> int:
    shape = graph.shape(tensor)
    return len(shape) if shape is not None else graph.value(tensor).ndim


class _Index:
    """Rules by the op at their top, in file order."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.anywhere = list(rules)
        self._roots = [(rule, root_ops(rule.pattern)) for rule in self.anywhere]
        self._by_op: dict[str, list[Rule]] = {}

    def of(self, op: str) -> list[Rule]:
        if op not in self._by_op:
            self._by_op[op] = [rule for rule, ops in self._roots if ops is None or op in ops]
        return self._by_op[op]


class _Planner:
    """The decisions so far. It is the View that predicates read. `out`: by which rule what nodes stay float."""

    def __init__(self, model: Model, out: Mapping[str, str]) -> None:
        self.graph = model.graph
        self._out = out
        self._reaches: dict[str, float | None] = {}
        for pair in model.existing:
            self._reaches[pair.tensor] = self._reaches.get(pair.tensor) or pair.reach
        self._decided: dict[Edge, _Decision] = {
            edge: _Decision(IN_MODEL, True, pair.axis) for pair in model.existing for edge in pair.edges
        }
        self._closed = {edge for pair in model.existing if not pair.is_open for edge in pair.edges}
        self._foreign = {edge for pair in model.existing if pair.is_foreign for edge in pair.edges}
        for edge in self._foreign:
            self._leave_alone(self.graph.reading_node(edge))
        self._ranges: dict[str, tuple[float, float]] = {
            tensor: (-reach, reach)
            for tensor, reach in self._reaches.items()
            if reach and not self.graph.is_constant(tensor)
        }
        self._shares: list[Share] = []
        self._missed: list[_Missed] = []

    def _leave_alone(self, node: Node | None) -> None:
        for edge in node.edges if node else ():
            self._decided.setdefault(edge, _Decision(FOREIGN_RULE, quantized=False))

    def is_quantized(self, edge: Edge) -> bool:
        decision = self._decided.get(edge)
        return decision is not None and decision.quantized and edge not in self._foreign

    def visit(self, rule: Rule, node: Node | None, matches: Iterator[Match]) -> None:
        """Apply the first match whose conditions hold; where none does, remember the one that came closest."""
        closest: tuple[int, str, tuple[Edge, ...]] = (-1, "", ())  # conditions held, reason, wanted edges
        for match in matches:
            held, reason = self._check(rule, match)
            if not reason:
                self._apply(rule, node, match)
                return
            if held > closest[0]:
                closest = (held, reason, self._edges(rule.quantize, match))
        if node is not None and closest[1]:
            self._missed.append(_Missed(rule, node, closest[1], closest[2]))

    def _check(self, rule: Rule, match: Match) -> tuple[int, str]:
        for held, condition in enumerate(rule.where):
            for subjects in self._subjects(condition, match):
                if bool(condition.holds(self, *subjects)) is condition.negated:
                    return held, _failed(condition, subjects)
        return len(rule.where), ""

    def _subjects(self, condition: Condition, match: Match) -> Iterator[tuple[Subject, ...]]:
        """One tuple for each combination of the tensors that the condition's names stand for."""
        tensors = (_bound(match, name).tensors for name in condition.names)
        for combination in itertools.product(*tensors):
            yield tuple(Subject(tensor, self.graph.producer(tensor)) for tensor in combination)

    def _apply(self, rule: Rule, node: Node | None, match: Match) -> None:
        for edge in self._edges(rule.keep_float, match):
            self._decided.setdefault(edge, _Decision(rule.name, quantized=False))
        wanted = self._edges(rule.quantize, match)
        axes = {edge: axis for name, axis in rule.axis.items() for edge in _bound(match, name).edges}
        reason = self._refused(rule, match, wanted, axes)
        if reason:
            if node is not None:
                self._missed.append(_Missed(rule, node, reason, wanted))
            return
        captured = self._edges(tuple(selector for selector in rule.quantize if not selector.outputs), match)
        keys = [node.first_output] if node is not None else []
        vetoes = [self._out[key] for key in (*keys, *(edge.key for edge in captured)) if key in self._out]
        for edge in wanted:
            veto = self._out.get(edge.key) or (vetoes[0] if vetoes and edge in captured else None)
            decision = _Decision(veto, False) if veto else _Decision(rule.name, True, self._axis(edge, axes))
            self._decided.setdefault(edge, decision)
        if vetoes:
            return
        for name, bounds in rule.range.items():
            for tensor in _bound(match, name).tensors:
                if tensor not in self._reaches:
                    self._ranges.setdefault(tensor, bounds)
        if rule.share:
            tensors = tuple(dict.fromkeys(t for s in rule.share for t in _bound(match, s.name).tensors))
            own = tuple(edge for edge in self._edges(rule.share, match) if self._rule_of(edge) == rule.name)
            if not self._reaches.keys() >= set(tensors):
                self._shares.append(Share(rule.name, tensors, own, rule.share_within))

    def _rule_of(self, edge: Edge) -> str | None:
        decision = self._decided.get(edge)
        return decision.rule if decision else None

    def _refused(self, rule: Rule, match: Match, wanted: tuple[Edge, ...], axes: Mapping[Edge, int]) -> str:
        """Why an atomic match cannot be applied, or ''."""
        for edge in wanted:
            tensor = self._tensor(edge)
            if not self.graph.is_float(tensor):
                return f"'{tensor}' is not an FP32, FP16 or BF16 tensor"
            if edge not in axes:
                continue
            if not self.graph.is_constant(tensor):
                return f"'{tensor}' is not constant, so it cannot have a scale per channel"
            if not -_rank(tensor, self.graph) <= axes[edge] < _rank(tensor, self.graph):
                return f"'{tensor}' has no axis {axes[edge]}"
        for edge in (*wanted, *self._edges(rule.share, match)):
            earlier = self._decided.get(edge)
            if earlier is None or (
                earlier.quantized
                and (edge not in wanted or earlier.rule == IN_MODEL or earlier.axis == self._axis(edge, axes))
            ):
                continue
            what = "quantized along another axis" if earlier.quantized else "kept float"
            return f"'{self._tensor(edge)}' into {edge} is already {what} by {earlier.rule}"
        return ""

    def _edges(self, selectors: tuple[Selector, ...], match: Match) -> tuple[Edge, ...]:
        edges: dict[Edge, None] = {}
        for selector in selectors:
            bound = _bound(match, selector.name)
            if not selector.outputs:
                edges.update(dict.fromkeys(bound.edges))
                continue
            for tensor in bound.tensors:
                edges.update(dict.fromkeys(edge for edge in self.graph.readers(tensor) if self._can_read_pair(edge)))
        return tuple(edges)

    def _can_read_pair(self, edge: Edge) -> bool:
        node = self.graph.reading_node(edge)
        return node is not None and not node.results and node.op not in DATA_FREE_OPS

    def _axis(self, edge: Edge, axes: Mapping[Edge, int]) -> int | None:
        """The channel axis of an edge's weight, counted from 0; None for per tensor (always so below opset 13)."""
        if edge not in axes or self.graph.opset < MIN_OPSET:
            return None
        return axes[edge] % _rank(self._tensor(edge), self.graph)

    def _tensor(self, edge: Edge) -> str:
        node = self.graph.reading_node(edge)
        return node.inputs[edge.slot] if node else edge.key

    def plan(self, model: Model, placement: Placement) -> Plan:
        reads: dict[tuple[str, int | None, bool], list[Read]] = {}  # a pair that nobody can join is a site of its own
        kept: list[Kept] = []
        for node in self.graph.nodes:
            for tensor, edge in zip(node.inputs, node.edges, strict=True):
                decision = self._decided.get(edge)
                if decision is None:
                    continue
                if decision.quantized:
                    site = (tensor, decision.axis, edge in self._closed)
                    reads.setdefault(site, []).append(Read(edge, decision.rule))
                elif self.graph.is_float(tensor):
                    kept.append(Kept(tensor, edge, decision.rule))
        self._find_ranges_below({tensor: decided for (tensor, *_), decided in reads.items()})
        outputs = [name for name in self.graph.outputs if self.graph.is_float(name)]
        kept += [Kept(name, Edge((), name, GRAPH_OUTPUT), OUTPUT_RULE) for name in outputs]
        pairs = {tensor for tensor, *_ in reads} | {tensor for share in self._shares for tensor in share.tensors}
        sites = tuple(
            Site(
                tensor,
                tuple(sorted(decided, key=lambda read: read.rule != IN_MODEL)),
                weight=self.graph.is_constant(tensor),
                axis=axis,
                source=self._source(tensor, pairs),
                range=self._ranges.get(tensor) if not closed else None,
            )
            for (tensor, axis, closed), decided in reads.items()
        )
        misses = tuple(self._misses())
        used = {read.rule for site in sites for read in site.reads} | {item.rule for item in kept}
        used |= {share.rule for share in self._shares} | {miss.rule for miss in misses}
        texts = {rule.name: rule.because for rule in placement.rules} | BUILT_IN
        because = {name: text for name, text in texts.items() if name in used}
        return Plan(
            placement.name,
            placement.digest,
            model.digest,
            because,
            sites,
            tuple(kept),
            tuple(reversed(self._shares)),
            misses,
        )

    def _source(self, tensor: str, pairs: set[str]) -> str | None:
        if self.graph.is_constant(tensor) or tensor in self._reaches:
            return None
        source = moved_from(tensor, self.graph)
        while source is not None and source not in pairs:
            source = moved_from(source, self.graph)
        return source if self._reaches.get(source or "", 1.0) else None

    def _find_ranges_below(self, reads: Mapping[str, list[Read]]) -> None:
        """A tensor that only moves to pairs which came with the model takes their scale, where they have but one."""
        for tensor, decided in reads.items():
            if self._reaches and tensor not in self._reaches and not self.graph.is_constant(tensor):
                found = {reach for read in decided for reach in self._reaches_below(read.edge)}
                reach = found.pop() if len(found) == 1 else None
                if reach:
                    self._ranges[tensor] = (-reach, reach)

    def _reaches_below(self, edge: Edge) -> Iterator[float | None]:
        node = self.graph.reading_node(edge)
        if node is None or edge.slot or not commutes(node, self.graph):
            yield None
            return
        for output in filter(None, node.outputs):
            if output in self._reaches:
                yield self._reaches[output]
                continue
            for reader in self.graph.readers(output):
                yield from self._reaches_below(reader)

    def _misses(self) -> Iterator[Miss]:
        """In the order of the nodes, each with the one edge of its node that a report can point to."""
        for missed in sorted(self._missed, key=lambda missed: self.graph.position(missed.node.first_output)):
            near = any(edge not in self._decided and self.graph.is_float(self._tensor(edge)) for edge in missed.wanted)
            yield Miss(missed.rule.name, missed.node.own_edge, missed.reason, near)


def _bound(match: Match, name: str) -> Bound:
    return match.get(name, Bound(()))


def _failed(condition: Condition, subjects: tuple[Subject, ...]) -> str:
    who = [f"{name} '{subject.tensor}'" for name, subject in zip(condition.names, subjects, strict=True)]
    verb = "is" if condition.negated else "is not"
    return f"{' '.join([who[0], verb, condition.predicate, *who[1:]])} ({sentence(condition.holds)})"
