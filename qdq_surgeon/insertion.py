"""The only mutator: puts Q/DQ pairs into a copy of a model.

The pairs are built as a fragment with onnx-graphsurgeon and spliced into a copy of the ModelProto. Apart from them
only input slots change; removing the pairs gives the input back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto

from .edges import Plan, Site
from .errors import PlanError
from .model import Model
from .scales import Scales

PREFIX = "qdq_surgeon."
"""The keys of our metadata in model and nodes begin with this."""
RULE_KEY = PREFIX + "rule"


def insert_pairs(model: Model, plan: Plan, scales: Scales, version: str) -> ModelProto:
    """A copy of the model with a Q/DQ pair at every site of the plan that has a scale and a reader left.

    Raises PlanError where plan or scales belong to another model.
    """
    if plan.model_digest != model.digest:
        raise PlanError("the plan belongs to another model: make one for this model with --plan --json")
    if scales.model_digest != model.digest:
        raise PlanError("the scales belong to another model")
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    sites = list(_with_readers(plan, scales))
    names = _Names(proto)
    outputs = {site: names.fresh(f"{site.tensor}_dequantized") for site in sites}
    fragment = _fragment(model, sites, scales, names, outputs)
    _splice(proto.graph, sites, fragment)
    _rewire(proto.graph, outputs)
    _record(proto, plan, scales, version)
    return proto


def _with_readers(plan: Plan, scales: Scales) -> Iterator[Site]:
    """The sites without the edges that went back to float, and without those that nothing reads any more."""
    for site in plan.sites:
        reads = tuple(read for read in site.reads if read.edge not in scales.dropped)
        if reads:
            yield Site(site.tensor, reads, site.weight, site.axis)


def _fragment(
    model: Model, sites: list[Site], scales: Scales, names: _Names, outputs: Mapping[Site, str]
) -> GraphProto:
    """All pairs as one graph: two nodes a site, in the order of `sites`, their constants as initializers."""
    nodes: list[gs.Node] = []
    read: dict[str, gs.Variable] = {}
    written: list[gs.Variable] = []
    for site in sites:
        scale = scales.of(site)
        tensor = read.setdefault(site.tensor, gs.Variable(site.tensor, dtype=scale.dtype))
        constants = [
            gs.Constant(names.fresh(f"{site.tensor}_scale"), scale),
            gs.Constant(names.fresh(f"{site.tensor}_zero_point"), np.zeros(scale.shape, np.int8)),
        ]
        quantized = gs.Variable(names.fresh(f"{site.tensor}_quantized"), dtype=np.int8)
        dequantized = gs.Variable(outputs[site], dtype=scale.dtype)
        attributes = {} if site.axis is None else {"axis": site.axis}
        for op, source, result in (
            ("QuantizeLinear", tensor, quantized),
            ("DequantizeLinear", quantized, dequantized),
        ):
            name = names.fresh(f"{site.tensor}_{op}")
            nodes.append(gs.Node(op, name, attributes, [source, *constants], [result]))
        written.append(dequantized)
    graph = gs.Graph(nodes, inputs=list(read.values()), outputs=written, opset=model.opset)
    fragment: GraphProto = gs.export_onnx(graph).graph
    for site, *pair in zip(sites, fragment.node[::2], fragment.node[1::2], strict=True):
        rules = ", ".join(dict.fromkeys(read.rule for read in site.reads))
        for node in pair:
            node.metadata_props.add(key=RULE_KEY, value=rules)
    return fragment


def _splice(graph: GraphProto, sites: list[Site], fragment: GraphProto) -> None:
    """Put each pair behind the node that makes its tensor; pairs on inputs and initializers go to the front."""
    pairs: dict[str, list[NodeProto]] = {}
    for site, *pair in zip(sites, fragment.node[::2], fragment.node[1::2], strict=True):
        pairs.setdefault(site.tensor, []).extend(pair)
    originals = list(graph.node)
    made = {output for node in originals for output in node.output}
    ordered = [node for tensor, nodes in pairs.items() if tensor not in made for node in nodes]
    for original in originals:
        ordered.append(original)
        ordered += [node for output in original.output for node in pairs.get(output, ())]
    spliced = GraphProto()
    spliced.node.extend(ordered)
    del graph.node[:]
    graph.node.MergeFrom(spliced.node)
    graph.initializer.extend(fragment.initializer)


def _rewire(graph: GraphProto, outputs: Mapping[Site, str]) -> None:
    nodes = {next(filter(None, node.output), ""): node for node in graph.node}
    for site, output in outputs.items():
        for edge in site.edges:
            nodes[edge.reader].input[edge.slot] = output


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
