"""The only mutator: puts Q/DQ pairs into a copy of a model.

The pairs are built as a fragment with onnx-graphsurgeon and spliced into a copy of the ModelProto. Apart from them
only input slots change; removing the pairs gives the input back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .edges import Plan, Site
from .errors import ModelError, PlanError
from .graph import QDQ_OPS, Graph, bodies, first_output_of
from .model import FreshNames, Model
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
    names = FreshNames(proto)
    pairs = [_pair(site, scales.of(site), model.graph, names) for site in scales.sites(plan)]
    graphs = dict(_graphs(proto.graph))
    _rewire(graphs, pairs)
    for scope, graph in reversed(graphs.items()):  # bodies first: splicing copies the nodes that hold them
        _splice(graph, [pair for pair in pairs if pair.scope == scope])
    _record(proto, plan, scales, version)
    return proto


def _graphs(graph: GraphProto, scope: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], GraphProto]]:
    """A graph and the bodies in it, each with its scope."""
    yield scope, graph
    for node in graph.node:
        for name, body in bodies(node):
            yield from _graphs(body, (*scope, f"{first_output_of(node)}.{name}"))


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


def _rewire(graphs: Mapping[tuple[str, ...], GraphProto], pairs: list[_Pair]) -> None:
    """Let every edge of a site read the pair's output."""
    nodes = {(scope, first_output_of(node)): node for scope, graph in graphs.items() for node in graph.node}
    for pair in pairs:
        for edge in pair.site.edges:
            nodes[edge.scope, edge.reader].input[edge.slot] = pair.output


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


def strip_pairs(quantized: ModelProto, readers: Collection[str] | None = None) -> ModelProto:
    """A copy of a Q/DQ model, from any producer, without its pairs: the float model that it stands for.

    What read a DequantizeLinear reads what was quantized; a weight stored as integers becomes the float initializer
    that its DequantizeLinear makes. `readers` (first outputs of nodes) leaves the pairs that only others read.
    A Q and a DQ with other nodes between stay. Where a producer let saturation stand for a Relu, that Relu is gone.
    Raises ModelError for stored weights with a scale per block.
    """
    view = Graph(quantized, deep=True)
    proto = ModelProto()
    proto.CopyFrom(quantized)
    for scope, graph in reversed(list(_graphs(proto.graph))):
        _strip(graph, scope, view, readers)
    _replace(proto.metadata_props, [entry for entry in proto.metadata_props if not entry.key.startswith(PREFIX)])
    return proto


def _strip(graph: GraphProto, scope: tuple[str, ...], view: Graph, readers: Collection[str] | None) -> None:
    sources: dict[str, str] = {}
    casts: dict[str, NodeProto] = {}
    weights: list[TensorProto] = []
    for node in (node for node in graph.node if node.op_type == "DequantizeLinear"):
        stored = view.key(scope, node.input[0])
        maker = view.producer(stored)
        output = node.output[0]
        if maker is not None and maker.op == "QuantizeLinear":
            sources[output] = maker.proto.input[0]
            types = [view.element_type(name) for name in (maker.inputs[1], view.key(scope, node.input[1]))]
            if types[0] != types[1]:  # the pair leads from one float type to another
                casts[output] = helper.make_node("Cast", [sources.pop(output)], [output], to=types[1])
        elif view.is_constant(stored):
            sources[output] = output
            weights.append(_dequantized(node, scope, view))
    _redirect([graph], {name: _origin(name, sources) for name in sources})
    for cast in casts.values():
        cast.input[0] = _origin(cast.input[0], sources)
    kept = [casts.get(node.output[0], node) if node.output else node for node in graph.node]
    kept = [node for node in kept if node.op_type != "DequantizeLinear" or node.output[0] not in sources]
    for output in (output.name for output in graph.output if sources.get(output.name, output.name) != output.name):
        kept.append(NodeProto(op_type="Identity", input=[_origin(output, sources)], output=[output]))
    read = _names_used(kept, graph)
    ours = {name for node in graph.node if node.op_type in QDQ_OPS for name in node.input}
    _replace(graph.node, [node for node in kept if node.op_type != "QuantizeLinear" or node.output[0] in read])
    read = _names_used(graph.node, graph)
    initializers = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in ours]
    _replace(graph.initializer, [*initializers, *weights])


def _names_used(nodes: Iterable[NodeProto], graph: GraphProto) -> set[str]:
    return {name for node in nodes for name in _names_read(node)} | {output.name for output in graph.output}


def _dequantized(node: NodeProto, scope: tuple[str, ...], view: Graph) -> TensorProto:
    """The float weight that a DQ makes from stored integers: (value - zero point) * scale along its axis."""
    if any(item.name == "block_size" and item.i for item in node.attribute):
        raise ModelError(f"the weight '{node.input[0]}' has a scale per block, which is not an INT8 Q/DQ model")
    value, scale, *rest = (view.value(view.key(scope, name)) for name in node.input if name)
    axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
    shape = (
        [-1 if index == axis % value.ndim else 1 for index in range(value.ndim)] if scale.size > 1 else [1] * value.ndim
    )
    zero = rest[0].astype(np.float32).reshape(shape) if rest else np.float32(0)
    real = (value.astype(np.float32) - zero) * scale.reshape(shape)
    return numpy_helper.from_array(np.asarray(real, scale.dtype).reshape(value.shape), node.output[0])


def _origin(name: str, sources: Mapping[str, str]) -> str:
    while name in sources and sources[name] != name:
        name = sources[name]
    return name


def _redirect(graphs: Iterable[GraphProto], names: Mapping[str, str]) -> None:
    for graph in graphs:
        for node in graph.node:
            for slot, name in enumerate(node.input):
                if name in names:
                    node.input[slot] = names[name]
            _redirect((body for _, body in bodies(node)), names)


def _names_read(node: NodeProto) -> Iterator[str]:
    yield from node.input
    for _, body in bodies(node):
        yield from (name for inner in body.node for name in _names_read(inner))
        yield from (output.name for output in body.output)


def _replace(field: Any, items: list[Any]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)
