"""Models that come with Q/DQ pairs, from any producer: what these pairs are, and the float model without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .biases import restore_biases
from .edges import LEVELS, Edge, count, scoped
from .graph import QDQ_OPS, FreshNames, Graph, Node, all_nodes, bodies, first_output_of
from .rules.commuting import MOVES

PREFIX = "qdq_surgeon."
"""The keys of our metadata in model and nodes begin with this."""

QDQ_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""The domains whose QuantizeLinear and DequantizeLinear mean the same."""
DEFAULT_AXIS = 1
RELU_BEFORE_Q = frozenset({"Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Sub", "Sum"})
"""The ops behind which producers drop a Relu where the pair cannot hold a negative value."""


@dataclass(frozen=True, eq=False)
class ExistingPair:
    """A pair that came with the model, as the float model sees it.

    `tensor` is what it quantizes there, `edges` are those that read it. `output` is the tensor that its
    DequantizeLinear makes in the model as given, within `scope`. `scale` and `zero_point` are None where they are
    not known; `axis` is the channel axis, `type` the TensorProto.DataType of the integers.
    """

    tensor: str
    edges: tuple[Edge, ...]
    output: str
    scope: tuple[str, ...]
    scale: NDArray[Any] | None = None
    zero_point: NDArray[Any] | None = field(default=None)
    axis: int | None = None
    type: int | None = None

    @property
    def is_symmetric_int8(self) -> bool:
        """True for what TensorRT takes, and what one of our own pairs could hold."""
        zero = self.zero_point
        return self.scale is not None and self.type == TensorProto.INT8 and (zero is None or not zero.any())

    @property
    def reach(self) -> float | None:
        """The largest value of a symmetric INT8 pair with one scale, None for other pairs."""
        if not self.is_symmetric_int8 or self.scale is None or self.scale.size != 1:
            return None
        return LEVELS * float(self.scale.reshape(()))

    def is_seen_from(self, scope: tuple[str, ...]) -> bool:
        """True where a node of that scope can read the pair."""
        return scope[: len(self.scope)] == self.scope

    def __str__(self) -> str:
        """All that makes it this pair, for a digest."""
        values = [None if value is None else value.tobytes() for value in (self.scale, self.zero_point)]
        return f"{self.tensor}|{self.edges}|{self.output}|{self.scope}|{values}|{self.axis}|{self.type}"


def is_linear(node: NodeProto, *ops: str) -> bool:
    """True for a QuantizeLinear or DequantizeLinear (or the one of them that is named)."""
    return node.op_type in (ops or QDQ_OPS) and node.domain in QDQ_DOMAINS


def parted(quantized: ModelProto) -> tuple[ModelProto, tuple[ExistingPair, ...]]:
    """The float model that a Q/DQ model stands for, and its pairs; the model itself, and none, where it has none."""
    if not any(map(is_linear, all_nodes(quantized.graph))):
        return quantized, ()
    floats = strip_pairs(quantized)
    return floats, tuple(_pairs(Graph(quantized, deep=True), Graph(floats, deep=True)))


def _pairs(given: Graph, floats: Graph) -> Iterator[ExistingPair]:
    """Each DequantizeLinear with the edges that read it, as far as they lead to an output."""
    reads: dict[tuple[str, str], list[Edge]] = {}
    made_by: dict[Edge, Node] = {}
    for node in floats.nodes:
        here = given.producer(node.first_output)
        if here is None or is_linear(node.proto):
            continue
        names = here.inputs if not is_linear(here.proto) else here.outputs if node.op == "Identity" else ()
        for edge, tensor, name in zip(node.edges, node.inputs, names, strict=False):
            maker = given.producer(name)
            above = floats.producer(tensor) if floats.is_constant(tensor) else None
            if maker is not None and is_linear(maker.proto, "DequantizeLinear"):
                made_by[edge] = maker
            elif above is not None and above.op in MOVES and above.edges[0] in made_by:
                made_by[edge] = above  # a weight that was quantized before it was moved
            else:
                continue
            reads.setdefault((tensor, name), []).append(edge)
    for (tensor, name), edges in reads.items():
        maker = made_by[edges[0]]
        scope, output = given.home(name)
        known = _constants(maker, given) if is_linear(maker.proto) else {}
        yield ExistingPair(tensor, tuple(edges), output, scope, **known)


def _constants(dequantize: Node, given: Graph) -> dict[str, Any]:
    """Scale, zero point, axis and type, as far as they are known and the Q of the pair has the same."""
    values = [given.known_value(name) for name in dequantize.inputs[1:]]
    maker = given.producer(dequantize.inputs[0])
    kind = given.element_type(dequantize.inputs[0])
    if maker is not None and is_linear(maker.proto):
        theirs = [given.known_value(name) for name in maker.inputs[1:]]
        if not _are_same(values, theirs):
            return {}
        kind = kind or int(maker.attribute("output_dtype") or 0) or TensorProto.UINT8
    scale, zero = values[0], values[1] if len(values) > 1 else None
    if scale is None or scale.ndim > 1 or (zero is None and len(dequantize.inputs) > 2 and dequantize.inputs[2]):
        return {}
    if zero is not None:
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
    rank = len(given.shape(dequantize.outputs[0]) or given.shape(dequantize.inputs[0]) or ())
    axis = _axis(dequantize.proto) % max(rank, 1) if scale.size > 1 else None
    return {"scale": scale, "zero_point": zero, "axis": axis, "type": kind}


def _are_same(ours: list[NDArray[Any] | None], theirs: list[NDArray[Any] | None]) -> bool:
    """True for equal scales and equal zero points; none is as good as zeros."""
    for index in range(max(len(ours), len(theirs))):
        left, right = (values[index] if index < len(values) else None for values in (ours, theirs))
        left, right = (np.zeros(1) if value is None else value for value in (left, right))
        if not np.array_equal(*np.broadcast_arrays(left, right) if left.size == right.size else (left, right)):
            return False
    return True


def _axis(node: NodeProto) -> int:
    return next((item.i for item in node.attribute if item.name == "axis"), DEFAULT_AXIS)


def notes_on(pairs: Iterable[ExistingPair]) -> Iterator[str]:
    """What a user should know about the pairs that came with the model."""
    pairs = list(pairs)
    biases = [pair for pair in pairs if pair.type == TensorProto.INT32]
    others = [pair for pair in pairs if not pair.is_symmetric_int8 and pair.type not in (None, TensorProto.INT32)]
    yield f"the model comes with {count(len(pairs), 'pair')}, which stay as they are"
    if biases:
        yield f"{count(len(biases), 'bias', 'biases')} stored as INT32: TensorRT wants them in float (lint --fix mends)"
    if others:
        yield f"{count(len(others), 'pair')} of the model not symmetric INT8, which TensorRT wants (see lint)"


# ---- the float model -------------------------------------------------------------------------------------------------


def strip_pairs(quantized: ModelProto, readers: Collection[str] | None = None) -> ModelProto:
    """A copy of a Q/DQ model, from any producer, without its pairs: the float model that it stands for.

    What read a DequantizeLinear reads what was quantized; a weight stored as integers becomes the float initializer
    that its DequantizeLinear makes. A pair between two float types becomes a Cast, and one that cannot hold negative
    values, where it stands for a Relu, becomes that Relu. `readers` (first outputs of nodes, with their scopes):
    only these become float. Biases that had been corrected are again what they were.
    A Q and a DQ with other nodes between, or whose scales are computed or per block, stay.
    """
    view = Graph(quantized, deep=True)
    proto = ModelProto()
    proto.CopyFrom(quantized)
    names = FreshNames(proto)
    restore_biases(proto.graph, readers)
    for scope, graph in reversed(list(graphs_of(proto.graph))):
        _Stripper(view, scope, graph, readers, names).strip()
    if not any(map(is_linear, all_nodes(proto.graph))):
        replace_items(
            proto.metadata_props, [entry for entry in proto.metadata_props if not entry.key.startswith(PREFIX)]
        )
    return proto


def count_pairs(proto: ModelProto) -> int:
    """The DequantizeLinear nodes of a model."""
    return sum(is_linear(node, "DequantizeLinear") for node in all_nodes(proto.graph))


def graphs_of(graph: GraphProto, scope: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], GraphProto]]:
    """A graph and the bodies in it, each with its scope."""
    yield scope, graph
    for node in graph.node:
        for name, body in bodies(node):
            yield from graphs_of(body, (*scope, f"{first_output_of(node)}.{name}"))


class _Stripper:
    """Takes the pairs whose DequantizeLinear stands in one graph out of it."""

    def __init__(
        self,
        view: Graph,
        scope: tuple[str, ...],
        graph: GraphProto,
        readers: Collection[str] | None,
        names: FreshNames,
    ) -> None:
        self._view = view
        self._scope = scope
        self._graph = graph
        self._readers = readers
        self._names = names
        self._sources: dict[str, str] = {}  # what is read instead of each DequantizeLinear's output
        self._stand_ins: dict[str, NodeProto] = {}
        self._weights: list[TensorProto] = []

    def strip(self) -> None:
        for node in self._graph.node:
            if is_linear(node, "DequantizeLinear"):
                self._find_source(node)
        if not self._sources:
            self._drop_unread()
            return
        _redirect(
            self._graph, self._scope, {name: _origin(name, self._sources) for name in self._sources}, self._readers
        )
        self._put_in_stand_ins()
        self._keep_outputs()
        self._drop_unread()

    def _find_source(self, node: NodeProto) -> None:
        view, output = self._view, node.output[0]
        stored = self._key(node.input[0])
        maker = view.producer(stored)
        if maker is not None and is_linear(maker.proto, "QuantizeLinear"):
            self._sources[output] = maker.proto.input[0]
            stand_in = self._stand_in(node, maker)
            if stand_in is not None:
                self._stand_ins[output] = stand_in
                self._sources[output] = stand_in.output[0]
        elif view.is_constant(stored) and (values := self._dequantized(node)) is not None:
            self._sources[output] = self._float_name(output)
            self._weights.append(numpy_helper.from_array(values, self._sources[output]))

    def _key(self, name: str) -> str:
        return self._view.key(self._scope, name)

    def _float_name(self, output: str) -> str:
        """What takes the place of a DQ's output has its name, unless that must stay for other readers."""
        edges = self._view.readers(self._key(output))
        if self._readers is None or all(edge.slot >= 0 and edge.key in self._readers for edge in edges):
            return output
        return self._names.fresh(f"{output}_float")

    def _stand_in(self, node: NodeProto, quantize: Node) -> NodeProto | None:
        """What a pair does beside rounding: change the float type, or cut off what is negative."""
        source = quantize.proto.input[0]
        before, after = (self._view.element_type(name) for name in (quantize.inputs[1], self._key(node.input[1])))
        if before is not None and after is not None and before != after:
            return helper.make_node("Cast", [source], [self._float_name(node.output[0])], to=after)
        if self._is_relu(quantize):
            return helper.make_node("Relu", [source], [self._float_name(node.output[0])])
        return None

    def _is_relu(self, quantize: Node) -> bool:
        maker = self._view.producer(quantize.inputs[0])
        if maker is None or maker.op not in RELU_BEFORE_Q or self._view.is_constant(quantize.inputs[0]):
            return False
        if len(quantize.inputs) < 3 or not quantize.inputs[2]:
            return not quantize.attribute("output_dtype")  # UINT8 with zero point 0
        zero = self._view.known_value(quantize.inputs[2])
        return zero is not None and zero.dtype.kind in "iu" and bool((zero == np.iinfo(zero.dtype).min).all())

    def _dequantized(self, node: NodeProto) -> NDArray[Any] | None:
        """(value - zero point) * scale along the axis; None where the scale is computed, or there is one per block."""
        value, scale = (self._view.known_value(self._key(name)) for name in node.input[:2])
        zero = self._view.known_value(self._key(node.input[2])) if len(node.input) > 2 and node.input[2] else np.int8(0)
        if value is None or scale is None or zero is None or scale.ndim > 1:
            return None
        if scale.size > 1 and (not value.ndim or value.shape[_axis(node) % value.ndim] != scale.size):
            return None
        shape = [1] * value.ndim
        if scale.size > 1:
            shape[_axis(node) % value.ndim] = scale.size
        offset = np.asarray(zero).astype(np.float32)
        offset = offset.reshape(shape) if offset.size == scale.size else offset.reshape([1] * value.ndim)
        real = (value.astype(np.float32) - offset) * scale.reshape(shape)
        return np.asarray(real, scale.dtype).reshape(value.shape)

    def _put_in_stand_ins(self) -> None:
        nodes: list[NodeProto] = []
        for node in self._graph.node:
            stand_in = self._stand_ins.get(node.output[0]) if node.output else None
            if stand_in is not None:
                stand_in.input[0] = _origin(stand_in.input[0], self._sources)
                nodes.append(stand_in)
            if stand_in is None or stand_in.output[0] != node.output[0]:
                nodes.append(node)
        replace_items(self._graph.node, nodes)

    def _keep_outputs(self) -> None:
        """A graph's own output keeps its name."""
        if self._readers is not None:
            return
        for output in self._graph.output:
            source = _origin(output.name, self._sources)
            if source != output.name:
                node = next(node for node in self._graph.node if output.name in node.output)
                node.CopyFrom(NodeProto(op_type="Identity", input=[source], output=[output.name]))

    def _drop_unread(self) -> None:
        """Take out the Q and DQ that nobody reads any more, and their constants."""
        graph = self._graph
        new = {tensor.name for tensor in self._weights}
        gone: set[str] = set()
        constants: set[str] = set()
        while True:
            read = _names_used(graph)
            unread = [node for node in graph.node if self._may_go(node) and node.output[0] not in read - new]
            if not unread:
                break
            gone |= {node.output[0] for node in unread}
            constants |= {name for node in unread for name in node.input}
            replace_items(graph.node, [node for node in graph.node if not node.output or node.output[0] not in gone])
        read = _names_used(graph)
        initializers = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in constants]
        replace_items(graph.initializer, [*initializers, *self._weights])
        stale = gone - new - read
        replace_items(graph.value_info, [value for value in graph.value_info if value.name not in stale])

    def _may_go(self, node: NodeProto) -> bool:
        return is_linear(node, "QuantizeLinear") or (is_linear(node) and node.output[0] in self._sources)


def _names_used(graph: GraphProto) -> set[str]:
    return {name for node in graph.node for name in names_read(node)} | {output.name for output in graph.output}


def names_read(node: NodeProto) -> Iterator[str]:
    """What a node and its bodies read."""
    yield from node.input
    for _, body in bodies(node):
        yield from (name for inner in body.node for name in names_read(inner))
        yield from (output.name for output in body.output)


def _origin(name: str, sources: Mapping[str, str]) -> str:
    while name in sources and sources[name] != name:
        name = sources[name]
    return name


def _redirect(
    graph: GraphProto, scope: tuple[str, ...], names: Mapping[str, str], readers: Collection[str] | None
) -> None:
    """Let the nodes of a graph and its bodies (those among `readers`) read other names."""
    for node in graph.node:
        first = first_output_of(node)
        if readers is None or scoped(scope, first) in readers:
            for slot, name in enumerate(node.input):
                if name in names:
                    node.input[slot] = names[name]
        for name, body in bodies(node):
            _redirect(body, (*scope, f"{first}.{name}"), names, readers)
            for output in body.output:
                if readers is None:
                    output.name = names.get(output.name, output.name)


def replace_items(repeated: Any, items: list[Any]) -> None:
    """Let a repeated field of a proto hold these items, of which some may be its own."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del repeated[:]
    repeated.extend(copies)
