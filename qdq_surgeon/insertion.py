"""The only mutator: puts Q/DQ pairs into a copy of a model.

The pairs are built as a fragment with onnx-graphsurgeon and spliced into a copy of the ModelProto. Apart from them
only input slots change; removing the pairs gives the input back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, numpy_helper

from .biases import shift_biases
from .edges import Edge, Plan, Site
from .errors import PlanError
from .existing import PREFIX, graphs_of, is_linear, names_read, replace_items
from .graph import FreshNames, Graph, first_output_of
from .model import Model
from .rules.planner import check_plan
from .scales import Scales

RULE_KEY = PREFIX + "rule"


def insert_pairs(
    model: Model,
    plan: Plan,
    scales: Scales,
    version: str,
    shifts: Mapping[Edge, NDArray[Any]] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> ModelProto:
    """A copy of the model with a Q/DQ pair at every site of the plan that has a scale and a reader left.

    A pair that came with the model stays, and what else shall read its tensor quantized reads it too. `shifts` are
    added to the biases; `weights` take the place of initializers.
    Raises PlanError where plan or scales belong to another model.
    """
    check_plan(model, plan)
    if scales.model_digest != model.digest:
        raise PlanError("the scales belong to another model")
    proto = ModelProto()
    proto.CopyFrom(model.quantized or model.proto)
    names = FreshNames(proto)
    joining = _joining(model, scales.sites(plan))
    pairs = [_pair(site, scales.of(site), model.graph, names) for site in _own(scales.sites(plan), joining)]
    graphs = dict(graphs_of(proto.graph))
    _rewire(graphs, joining | {edge: pair.output for pair in pairs for edge in pair.site.edges})
    for graph in graphs.values() if joining else ():
        _move_forward(graph, set(joining.values()))
    for scope, graph in reversed(graphs.items()):  # bodies first: splicing copies the nodes that hold them
        _splice(graph, [pair for pair in pairs if pair.scope == scope])
    for tensor in proto.graph.initializer:
        if weights and tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    shift_biases(proto, model.graph, shifts or {}, names)
    _record(proto, plan, scales, version)
    return proto


def _joining(model: Model, sites: Iterable[Site]) -> dict[Edge, str]:
    """The edges that will read a pair which came with the model, and what they will read."""
    reads = ((site, read.edge) for site in sites for read in site.added)
    found = ((edge, model.existing_pair(site.tensor, site.axis, edge.scope)) for site, edge in reads)
    return {edge: pair.output for edge, pair in found if pair is not None}


def _own(sites: Iterable[Site], joining: Collection[Edge]) -> Iterator[Site]:
    """The sites with the edges that will read a pair of ours."""
    for site in sites:
        reads = tuple(read for read in site.added if read.edge not in joining)
        if reads:
            yield replace(site, reads=reads)


@dataclass(frozen=True)
class _Pair:
    """A site, its Q and DQ with their constants as a graph of their own, where that goes, what it reads and writes."""

    site: Site
    scope: tuple[str, ...]
    tensor: str
    fragment: GraphProto
    output: str


def _pair(site: Site, scale: NDArray[Any], graph: Graph, names: FreshNames) -> _Pair:
    scope, name = graph.home(site.tensor)
    tensor = gs.Variable(name, dtype=scale.dtype)
    constants = [
        gs.Constant(names.fresh(f"{name}_scale"), scale),
        gs.Constant(names.fresh(f"{name}_zero_point"), np.zeros(scale.shape, np.int8)),
    ]
    quantized = gs.Variable(names.fresh(f"{name}_quantized"), dtype=np.int8)
    dequantized = gs.Variable(names.fresh(f"{name}_dequantized"), dtype=scale.dtype)
    attributes = {} if site.axis is None else {"axis": site.axis}
    nodes = [
        gs.Node(op, names.fresh(f"{name}_{op}"), attributes, [read, *constants], [written])
        for op, read, written in (
            ("QuantizeLinear", tensor, quantized),
            ("DequantizeLinear", quantized, dequantized),
        )
    ]
    fragment = gs.export_onnx(gs.Graph(nodes, inputs=[tensor], outputs=[dequantized], opset=graph.opset)).graph
    rules = ", ".join(dict.fromkeys(read.rule for read in site.reads))
    for node in fragment.node:
        node.metadata_props.add(key=RULE_KEY, value=rules)
    return _Pair(site, scope, name, fragment, dequantized.name)


def _rewire(graphs: Mapping[tuple[str, ...], GraphProto], outputs: Mapping[Edge, str]) -> None:
    """Let every edge read the output of its pair."""
    nodes = {(scope, first_output_of(node)): node for scope, graph in graphs.items() for node in graph.node}
    for edge, output in outputs.items():
        node = nodes[edge.scope, edge.reader]
        if is_linear(node, "DequantizeLinear"):  # in the float model a Relu or a Cast stands for this pair
            while not is_linear(node, "QuantizeLinear"):
                around = ((edge.scope[:depth], node.input[0]) for depth in range(len(edge.scope), -1, -1))
                node = next(nodes[maker] for maker in around if maker in nodes)
        node.input[edge.slot] = output


def _move_forward(graph: GraphProto, outputs: Collection[str]) -> None:
    """Where a node reads one of these outputs before it is made, move what makes it in front of that node."""
    made, first_read = _positions(graph)
    for output in sorted(name for name in outputs if first_read.get(name, len(made)) < made.get(name, -1)):
        made, first_read = _positions(graph)
        reader = first_read[output]
        late: set[int] = set()
        pending = [output]
        while pending:
            index = made.get(pending.pop(), -1)
            if index > reader and index not in late:
                late.add(index)
                pending.extend(names_read(graph.node[index]))
        rest = [index for index in range(reader, len(graph.node)) if index not in late]
        replace_items(graph.node, [graph.node[index] for index in (*range(reader), *sorted(late), *rest)])


def _positions(graph: GraphProto) -> tuple[dict[str, int], dict[str, int]]:
    """Where each tensor is made, and where it is first read."""
    made: dict[str, int] = {}
    first_read: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        made.update(dict.fromkeys(node.output, index))
        for name in names_read(node):
            first_read.setdefault(name, index)
    return made, first_read


def _splice(graph: GraphProto, pairs: list[_Pair]) -> None:
    """Put each pair behind the node that makes its tensor; pairs on inputs and initializers go to the front."""
    waiting: dict[str, list[_Pair]] = {}
    for pair in pairs:
        waiting.setdefault(pair.tensor, []).append(pair)
        graph.initializer.MergeFrom(pair.fragment.initializer)
    made = {output for node in graph.node for output in node.output}
    spliced = GraphProto()
    for pair in pairs:
        if pair.tensor not in made:
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
        "data": "synthetic" if scales.origin.synthetic else "given" if scales.origin.samples else "none",
        "data_digest": scales.origin.digest,
        "samples": str(scales.origin.samples),
    }
    kept = [entry for entry in proto.metadata_props if not entry.key.startswith(PREFIX)]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for key, value in facts.items():
        proto.metadata_props.add(key=PREFIX + key, value=value)
