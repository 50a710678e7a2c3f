"""The only mutator: puts Q/DQ pairs into a copy of a model.

The pairs are built as a fragment with onnx-graphsurgeon and spliced into a copy of the ModelProto. Apart from them
only input slots change; removing the pairs gives the input back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto

from .edges import Plan, Site
from .errors import PlanError
from .model import Model
from .rules.planner import check_plan
from .scales import Scales

PREFIX = "qdq_surgeon."
"""The keys of our metadata in model and nodes begin with this."""
RULE_KEY = PREFIX + "rule"


def insert_pairs(model: Model, plan: Plan, scales: Scales, version: str) -> ModelProto:
    """A copy of the model with a Q/DQ pair at every site of the plan that has a scale and a reader left.

    Raises PlanError where plan or scales belong to another model.
    """
    check_plan(model, plan)
    if scales.model_digest != model.digest:
        raise PlanError("the scales belong to another model")
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    names = _Names(proto)
    pairs = [_pair(site, scales.of(site), names, model.opset) for site in _with_readers(plan, scales)]
    _rewire(proto.graph, pairs)
    _splice(proto.graph, pairs)
    _record(proto, plan, scales, version)
    return proto


@dataclass(frozen=True)
class _Pair:
    """A site, its Q and DQ with their constants as a graph of their own, and what that graph writes."""

    site: Site
    fragment: GraphProto
    output: str


def _with_readers(plan: Plan, scales: Scales) -> Iterator[Site]:
    """The sites without the edges that went back to float, and without those that nothing reads any more."""
    for site in plan.sites:
        reads = tuple(read for read in site.reads if read.edge not in scales.dropped)
        if reads:
            yield replace(site, reads=reads)


def _pair(site: Site, scale: NDArray[Any], names: _Names, opset: int) -> _Pair:
    tensor = gs.Variable(site.tensor, dtype=scale.dtype)
    constants = [
        gs.Constant(names.fresh(f"{site.tensor}_scale"), scale),
        gs.Constant(names.fresh(f"{site.tensor}_zero_point"), np.zeros(scale.shape, np.int8)),
    ]
    quantized = gs.Variable(names.fresh(f"{site.tensor}_quantized"), dtype=np.int8)
    dequantized = gs.Variable(names.fresh(f"{site.tensor}_dequantized"), dtype=scale.dtype)
    attributes = {} if site.axis is None else {"axis": site.axis}
    nodes = [
        gs.Node(op, names.fresh(f"{site.tensor}_{op}"), attributes, [read, *constants], [written])
        for op, read, written in (
            ("QuantizeLinear", tensor, quantized),
            ("DequantizeLinear", quantized, dequantized),
        )
    ]
    graph = gs.Graph(nodes, inputs=[tensor], outputs=[dequantized], opset=opset)
    fragment = gs.export_onnx(graph).graph
    rules = ", ".join(dict.fromkeys(read.rule for read in site.reads))
    for node in fragment.node:
        node.metadata_props.add(key=RULE_KEY, value=rules)
    return _Pair(site, fragment, dequantized.name)


def _rewire(graph: GraphProto, pairs: list[_Pair]) -> None:
    """Let every edge of a site read the pair's output."""
    nodes = {next(filter(None, node.output), ""): node for node in graph.node}
    for pair in pairs:
        for edge in pair.site.edges:
            nodes[edge.reader].input[edge.slot] = pair.output


def _splice(graph: GraphProto, pairs: list[_Pair]) -> None:
    """Put each pair behind the node that makes its tensor; pairs on inputs and initializers go to the front."""
    waiting: dict[str, list[_Pair]] = {}
    for pair in pairs:
        waiting.setdefault(pair.site.tensor, []).append(pair)
        graph.initializer.MergeFrom(pair.fragment.initializer)
    made = {output for node in graph.node for output in node.output}
    spliced = GraphProto()
    for pair in pairs:
        if pair.site.tensor not in made:
            spliced.node.MergeFrom(pair.fragment.node)
    for original in graph.node:
        spliced.node.append(original)
        for pair in (pair for output in original.output for pair in waiting.get(output, ())):
            spliced.node.MergeFrom(pair.fragment.node)
    del graph.node[:]
    graph.node.MergeFrom(spliced.node)


def _record(proto: ModelProto, plan: Plan, scales: Scales, version: str) -> None:
    facts = {
        "version": version,
        "placement": plan.placement,
        "placement_digest": plan.placement_digest,
        "method": scales.method,
        "data": "synthetic" if scales.origin.synthetic else "given",
        "data_digest": scales.origin.digest,
        "samples": str(scales.origin.samples),
    }
    kept = [entry for entry in proto.metadata_props if not entry.key.startswith(PREFIX)]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for key, value in facts.items():
        proto.metadata_props.add(key=PREFIX + key, value=value)


class _Names:
    """Names that are free in the whole model, control-flow bodies included."""

    def __init__(self, proto: ModelProto) -> None:
        self._taken = set(_all_names([proto.graph]))

    def fresh(self, wanted: str) -> str:
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def _all_names(graphs: Iterable[GraphProto]) -> Iterator[str]:
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            yield value.name
        for node in graph.node:
            yield from (node.name, *node.input, *node.output)
            bodies = [body for item in node.attribute for body in (item.g, *item.graphs)]
            yield from _all_names(body for body in bodies if body.ByteSize())
