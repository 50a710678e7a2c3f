"""Plan + statistics -> scales. Pure NumPy.

An activation's scale comes from its statistic and a range method; a weight's from its values. Tensors between which
only data moves, and tensors that a rule lets share, get one scale from their statistics together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .calibration.ranges import DEFAULT_METHOD, RangeMethod, range_method
from .calibration.statistics import Origin, Statistic, Statistics
from .edges import IN_MODEL, LEVELS, Edge, Plan, Site
from .errors import DataError, ModelError, PlanError
from .graph import HALF_TYPES, Graph
from .model import Model
from .rules.commuting import moved_from
from .rules.planner import check_plan

SMALLEST_NORMAL: dict[int, float] = {
    TensorProto.FLOAT: 2.0**-126,
    TensorProto.BFLOAT16: 2.0**-126,
    TensorProto.FLOAT16: 2.0**-14,
}
"""Scales stay above these: TensorRT flushes or rejects what lies below."""


@dataclass(frozen=True)
class Scales:
    """The scale of every site, by (tensor, axis): shape () or (channels,), in the tensor's own float type.

    `dropped` holds the edges that go back to float because their tensors cannot share a scale, with the reason.
    """

    method: str
    origin: Origin
    model_digest: str
    values: Mapping[tuple[str, int | None], NDArray[Any]]
    dropped: Mapping[Edge, str] = field(default_factory=dict)

    def of(self, site: Site) -> NDArray[Any]:
        """The scale of a site. Raises PlanError where there is none: the scales are those of another plan."""
        if (site.tensor, site.axis) not in self.values:
            raise PlanError(f"the scales lack the tensor '{site.tensor}': choose them with this plan")
        return self.values[site.tensor, site.axis]

    def sites(self, plan: Plan) -> Iterator[Site]:
        """The sites that get a pair: without the edges that went back to float, and with a reader left."""
        for site in plan.sites:
            reads = tuple(read for read in site.reads if read.edge not in self.dropped)
            if reads:
                yield replace(site, reads=reads)

    def __str__(self) -> str:
        lines = [f"{len(self.values)} scales by {self.method} from {self.origin.samples} samples of {self.origin.data}"]
        for (tensor, axis), scale in self.values.items():
            channels = f" for {scale.size} channels" if axis is not None else ""
            lines.append(f"  {tensor}: {float(scale.min()):.6g}{channels}")
        lines += [f"  {edge} stays float: {reason}" for edge, reason in self.dropped.items()]
        return "\n".join(lines)


def tensors_to_calibrate(plan: Plan) -> tuple[str, ...]:
    """The activations whose statistics `choose_scales` needs: one for each run of data movement of unknown range."""
    chains = Chains(plan)
    activations = [site for site in plan.sites if not site.weight]
    known = {chains.tops[site.tensor] for site in activations if site.range}
    unknown = (site for site in activations if not site.is_in_model and chains.tops[site.tensor] not in known)
    return tuple(dict.fromkeys(chains.bases[site.tensor] for site in unknown))


def every_activation(plan: Plan) -> tuple[str, ...]:
    """Every activation of the plan: with their statistics, scales can be chosen for any part of the plan."""
    return tuple(dict.fromkeys(site.tensor for site in plan.sites if not site.weight))


def choose_scales(model: Model, plan: Plan, statistics: Statistics, method: str = DEFAULT_METHOD) -> Scales:
    """Choose a scale for every site of the plan.

    What reads a tensor that never held a value goes back to float. Raises PlanError where the statistics are of
    another model or lack a tensor, DataError where a tensor held nothing but NaN and infinity, ModelError where a
    weight holds one of these.
    """
    check_plan(model, plan)
    if statistics.model_digest != model.digest:
        raise PlanError("the statistics belong to another model: calibrate this one")
    threshold = range_method(method)
    found = _statistics_of(model.graph, plan, statistics)
    idle = frozenset(base for base, statistic in found.items() if statistic.is_empty)
    groups = _Groups(plan, found, threshold)
    dropped = _edges_without_range(model.graph, plan, idle) | _edges_out_of_reach(model, plan)
    dropped |= dict(groups.drop_what_cannot_share())
    amax: dict[str, float] = groups.thresholds()
    values: dict[tuple[str, int | None], NDArray[Any]] = {}
    for site in plan.sites:
        if all(edge in dropped for edge in site.edges):
            continue
        scale = _scale_in_model(model, site) if site.is_in_model else _scale(model.graph, site, amax)
        if scale is not None:
            scale.setflags(write=False)
            values[site.tensor, site.axis] = scale
    return Scales(method, statistics.origin, model.digest, values, dropped)


def _scale(graph: Graph, site: Site, amax: Mapping[str, float]) -> NDArray[Any]:
    limits = _weight_amax(graph, site) if site.weight else np.asarray(amax[site.tensor])
    return to_scale(limits, graph.element_type(site.tensor) or TensorProto.FLOAT)


def _statistics_of(graph: Graph, plan: Plan, statistics: Statistics) -> dict[str, Statistic]:
    """The statistic of each tensor to calibrate: its own, or that of the nearest tensor whose values it holds.

    A plan with more ops in float may have a pair behind a MaxPool and none before it, where there was one.
    """
    found = {}
    for base in tensors_to_calibrate(plan):
        name: str | None = base
        while name is not None and name not in statistics.tensors:
            name = moved_from(name, graph)
        if name is None:
            raise PlanError(f"the statistics lack the tensor '{base}': calibrate with this plan")
        found[base] = statistics.tensors[name]
    return found


def _edges_without_range(graph: Graph, plan: Plan, idle: frozenset[str]) -> dict[Edge, str]:
    """The edges that stay float for want of a range, with all others of the same nodes: none is half quantized."""
    bases = Chains(plan).bases
    reads = [(base, read) for site in plan.sites if (base := bases.get(site.tensor)) in idle for read in site.added]
    skipped = (read.edge for base, read in reads if base and graph.home(base)[0])
    empty = (read.edge for base, read in reads if base and not graph.home(base)[0])
    return _whole_nodes(plan, empty, "what it reads was empty in every calibration sample") | _whole_nodes(
        plan, skipped, "calibration never ran this part of the graph"
    )


def _edges_out_of_reach(model: Model, plan: Plan) -> dict[Edge, str]:
    """The edges whose tensor came with a pair that they cannot read, and whose scale is none for a pair of ours."""
    sites = (site for site in plan.sites if site.is_in_model and _scale_in_model(model, site) is None)
    reads = ((site, read.edge) for site in sites for read in site.added)
    edges = (edge for site, edge in reads if model.existing_pair(site.tensor, site.axis, edge.scope) is None)
    return _whole_nodes(plan, edges, "the pair that its tensor came with stands in another body")


def _whole_nodes(plan: Plan, edges: Iterable[Edge], reason: str) -> dict[Edge, str]:
    nodes = {edge.key for edge in edges}
    return {read.edge: reason for site in plan.sites for read in site.added if read.edge.key in nodes}


def _scale_in_model(model: Model, site: Site) -> NDArray[Any] | None:
    """The scale of the pair that the site's tensor came with; None where a pair of ours could not have it."""
    scope = next(read.edge.scope for read in site.reads if read.rule == IN_MODEL)
    pair = model.existing_pair(site.tensor, site.axis, scope)
    if pair is None or pair.scale is None or not pair.is_symmetric_int8:
        return None
    return pair.scale.reshape(-1 if site.axis is not None else ()).copy()


def to_scale(amax: NDArray[Any], element_type: int) -> NDArray[Any]:
    """amax / 127 in the float type of the data: rounded up in half precision, normal, and 1 where amax is 0."""
    exact = np.where(amax > 0, np.maximum(amax / LEVELS, SMALLEST_NORMAL[element_type]), 1.0)
    scale = np.asarray(exact.astype(helper.tensor_dtype_to_np_dtype(element_type)))
    if element_type not in HALF_TYPES:
        return scale
    below = scale.astype(np.float64) < exact
    return np.asarray((scale.view(np.uint16) + below.astype(np.uint16)).view(scale.dtype))


class Chains:
    """Which tensors hold the same values: each site follows its source, up to a tensor without one."""

    def __init__(self, plan: Plan) -> None:
        self._sources = {site.tensor: site.source for site in plan.sites if not site.weight}
        self.tops: dict[str, str] = {}
        self.bases: dict[str, str] = {}
        for tensor in self._sources:
            chain = list(self._chain(tensor))
            self.tops[tensor] = chain[-1]
            self.bases[tensor] = next(name for name in reversed(chain) if name in self._sources)

    def _chain(self, tensor: str) -> Iterator[str]:
        name: str | None = tensor
        while name is not None:
            yield name
            name = self._sources.get(name)


class _Groups:
    """Union-find over the tops of the chains; each group will have one scale."""

    def __init__(self, plan: Plan, statistics: Mapping[str, Statistic], threshold: RangeMethod) -> None:
        self._plan = plan
        self._threshold = threshold
        self._chains = Chains(plan)
        self._parents: dict[str, str] = {}
        self._statistics: dict[str, list[Statistic]] = defaultdict(list)
        self._reaches: dict[str, float] = {}
        self._known = {site.tensor: max(map(abs, site.range)) for site in plan.sites if site.range}
        came = [site.tensor for site in plan.sites if site.is_in_model and not site.weight]
        self._given = {tensor: self._known[tensor] for tensor in came if tensor in self._known}
        self._apart = {tensor for tensor in came if tensor not in self._known}
        for base, statistic in statistics.items():
            if statistic.is_empty:
                continue
            if not statistic.count:
                raise DataError(f"'{base}' never held a finite number during calibration: check data and model")
            self._statistics[self._chains.tops[base]].append(statistic)

    def drop_what_cannot_share(self) -> Iterator[tuple[Edge, str]]:
        """Join what may share, in the order of the plan; yield the edges of what is too far apart."""
        spans: dict[str, tuple[float, float]] = {}
        for share in self._plan.shares:
            tops = sorted({self._find(self._chains.tops.get(tensor, tensor)) for tensor in share.tensors})
            given = {self._given[top] for top in tops if top in self._given}
            if len(given) > 1 or self._apart.intersection(share.tensors):
                yield from ((edge, _reason_apart(given)) for edge in share.edges)
                continue
            found = [spans.get(top) or (self._reach(top),) * 2 for top in tops if self._reach(top) > 0]
            low, high = (min(low for low, _ in found), max(high for _, high in found)) if found else (1.0, 1.0)
            if share.limit is not None and high > low * share.limit:
                reason = f"the ranges to share differ by a factor of {high / low:.3g}, more than {share.limit:g}"
                yield from ((edge, reason) for edge in share.edges)
                continue
            self._parents.update(dict.fromkeys(tops[1:], tops[0]))
            spans[tops[0]] = (low, high)
            self._given.update(dict.fromkeys(tops[:1] if given else (), max(given, default=0.0)))

    def thresholds(self) -> dict[str, float]:
        """Every activation site's threshold: the known range of its group, else that of its statistics together."""
        members: dict[str, list[str]] = defaultdict(list)
        known: dict[str, float] = {}
        for top in self._statistics:
            members[self._find(top)].append(top)
        for tensor, reach in self._known.items():
            root = self._find(self._chains.tops[tensor])
            known[root] = max(known.get(root, 0.0), reach)
        known |= {root: reach for root, reach in self._given.items() if root in known}
        chosen = {root: self._together(tops) for root, tops in members.items() if root not in known} | known
        roots = {tensor: self._find(top) for tensor, top in self._chains.tops.items()}
        return {tensor: chosen[root] for tensor, root in roots.items() if root in chosen}

    def _together(self, tops: list[str]) -> float:
        if len(tops) == 1:
            return self._reach(tops[0])
        return self._threshold(reduce(or_, (statistic for top in tops for statistic in self._statistics[top])))

    def _reach(self, top: str) -> float:
        """How far one chain's values reach on their own; 0 where none of its tensors was calibrated."""
        if top not in self._reaches:
            found = self._statistics.get(top)
            known = [reach for tensor, reach in self._known.items() if self._chains.tops[tensor] == top]
            self._reaches[top] = max(known) if known else self._threshold(reduce(or_, found)) if found else 0.0
        return self._reaches[top]

    def _find(self, tensor: str) -> str:
        root = tensor
        while root in self._parents:
            root = self._parents[root]
        while tensor != root:
            self._parents[tensor], tensor = root, self._parents[tensor]
        return root


def _reason_apart(given: set[float]) -> str:
    if len(given) > 1:
        scales = ", ".join(f"{reach / LEVELS:.6g}" for reach in sorted(given))
        return f"the pairs that came with the model do not share a scale: {scales}"
    return "a pair that came with the model is not symmetric INT8, so no other tensor can share its scale"


def _weight_amax(graph: Graph, site: Site) -> NDArray[Any]:
    value = np.abs(graph.value(site.tensor).astype(np.float32))
    if not np.isfinite(value).all():
        raise ModelError(f"the weight '{site.tensor}' holds NaN or infinity: the model is broken")
    axes = tuple(axis for axis in range(value.ndim) if axis != site.axis)
    return np.asarray(value.max(axis=axes if site.axis is not None else None, initial=0), np.float64)
