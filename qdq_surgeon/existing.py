"""Models that come with Q/DQ pairs, from any producer: what these pairs are, and the float model without them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .biases import restore_biases
from .edges import LEVELS, Edge, count, scoped
from .graph import MIN_IR, QDQ_OPS, FreshNames, Graph, Node, bodies, entered, first_output_of
from .rules.commuting import MOVES

PREFIX = "qdq_surgeon."
"""The keys of our metadata in model and nodes begin with this."""

QDQ_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""The domains whose QuantizeLinear and DequantizeLinear mean the same."""
DEFAULT_AXIS = 1
RELU_BEFORE_Q = frozenset({"Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Sub", "Sum"})
"""The ops behind which producers drop a Relu where the pair cannot hold a negative value."""
NARROWING = frozenset({"Cast", "Clip", "Identity"})
"""Ops between a Q and its DQ that only say which integers are used, as PyTorch's `reduce_range` does."""
EIGHT_BITS = frozenset({TensorProto.INT8, TensorProto.UINT8})
SAME_SCALE = 2.0**-7
"""How far, relatively, one scale may lie from itself in another float type."""
NAMED = 3
"""How many tensors a note names."""


@dataclass(frozen=True, eq=False)
class ExistingPair:
    """A pair that came with the model, as the float model sees it.

    `tensor` is what it quantizes there, `edges` are those that read it. `output` is the tensor that its
    DequantizeLinear makes in the model as given, within `scope`; '' where other ops stand between. `scale` and
    `zero_point` are None where they are not known; `axis` is the channel axis, `type` the TensorProto.DataType of
    what is stored.
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
    def has_scale(self) -> bool:
        """True where the scale is known, finite and positive."""
        return self.scale is not None and bool((np.isfinite(self.scale) & (self.scale > 0)).all())

    @property
    def is_foreign(self) -> bool:
        """True for INT4, INT16, FP8 ...: pairs of ours do not make an INT8 op of what reads it."""
        return self.type not in EIGHT_BITS | {TensorProto.INT32}

    @property
    def is_open(self) -> bool:
        """True where others that read the tensor may read this pair instead."""
        return bool(self.output) and self.has_scale and self.type in EIGHT_BITS

    @property
    def is_symmetric(self) -> bool:
        """True for INT8 without a zero point, whatever its scale."""
        return self.type == TensorProto.INT8 and (self.zero_point is None or not self.zero_point.any())

    @property
    def is_symmetric_int8(self) -> bool:
        """True for what TensorRT takes, and what one of our own pairs could hold."""
        return self.has_scale and self.is_symmetric

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
    if not _has_pairs(quantized.graph):
        return quantized, ()
    floats = strip_pairs(quantized)
    return floats, tuple(_pairs(Graph(quantized, deep=True), Graph(floats, deep=True)))


def pairs_left(floats: ModelProto) -> tuple[ExistingPair, ...]:
    """The pairs that `strip_pairs` has left in a model."""
    if not _has_pairs(floats.graph):
        return ()
    view = Graph(floats, deep=True)
    return tuple(_pairs(view, view))


def _pairs(given: Graph, floats: Graph) -> Iterator[ExistingPair]:
    """Each pair with the edges of the float model that read it, as far as they lead to an output."""
    groups: dict[tuple[str, str], list[Edge]] = {}
    facts: dict[Edge, dict[str, Any]] = {}
    for node in floats.nodes:
        for edge, tensor in zip(node.edges, node.inputs, strict=True):
            group = (tensor, _output_read(node, edge.slot, given))
            if group[1] and group in groups:
                known: dict[str, Any] | None = facts[groups[group][0]]
            else:
                known = _facts(node, edge, *group, given, floats, facts)
            if known is not None:
                facts[edge] = known
                groups.setdefault(group, []).append(edge)
    for (tensor, name), edges in groups.items():
        scope, output = given.home(name)
        yield ExistingPair(tensor, tuple(edges), output, scope, **facts[edges[0]])


def _output_read(node: Node, slot: int, given: Graph) -> str:
    """The output of a DequantizeLinear that a node of the float model reads in the model as given, or ''."""
    here = given.producer(node.first_output)
    if here is None or is_linear(node.proto):
        return ""
    if is_linear(here.proto):  # a graph output that a DequantizeLinear makes
        return here.first_output if node.op == "Identity" else ""
    maker = given.producer(here.inputs[slot])
    return here.inputs[slot] if maker is not None and is_linear(maker.proto, "DequantizeLinear") else ""


def _facts(
    node: Node, edge: Edge, tensor: str, output: str, given: Graph, floats: Graph, facts: Mapping[Edge, dict[str, Any]]
) -> dict[str, Any] | None:
    """What is known of the pair that an edge reads; None where it reads none."""
    maker = given.producer(output)
    if maker is not None:
        return _constants(maker, given)
    if edge.slot == 0 and _is_inside(node, given, floats):
        return {"type": _stored_type(node.first_output, given)}
    above = floats.producer(tensor)
    moved = facts.get(above.edges[0]) if above is not None and above.op in MOVES else None
    if moved is None:
        return None
    is_sited_anew = moved.get("scale") is not None and moved["type"] in EIGHT_BITS and not floats.is_constant(tensor)
    return None if is_sited_anew else {"type": moved["type"]}  # what was quantized before it was moved


def _is_inside(node: Node, given: Graph, floats: Graph) -> bool:
    """True for what reads a pair from its inside: a QuantizeLinear that stays, and what stands in for nodes between."""
    here = given.producer(node.first_output)
    if here is None or is_linear(node.proto, "QuantizeLinear"):
        return True
    if is_linear(node.proto) or not is_linear(here.proto):
        return False
    is_new = floats.producer(node.inputs[0]) is not None and given.producer(node.inputs[0]) is None
    return is_new or node.op in MOVES


def _constants(dequantize: Node, given: Graph) -> dict[str, Any]:
    """Scale, zero point, axis and type, as far as they are known and the Q of the pair has the same."""
    names = dequantize.inputs[1:]
    quantize, _ = _way_up(dequantize.inputs[0], given)
    kind = _stored_type(dequantize.first_output, given) or given.element_type((*names, "")[1])
    scale, zero = (given.known_value(name) for name in (*names, "")[:2])
    if scale is None or scale.ndim > 1 or (zero is None and any(names[1:])):
        return {"type": kind}
    if quantize is not None and not _are_same(names, quantize.inputs[1:], given):
        return {"type": kind}
    rank = len(given.shape(dequantize.outputs[0]) or given.shape(dequantize.inputs[0]) or ())
    axis = _axis(dequantize.proto) % max(rank, 1) if scale.size > 1 else None
    return {"scale": scale, "zero_point": zero, "axis": axis, "type": kind}


def _stored_type(output: str, given: Graph) -> int | None:
    """The type that a pair stores, by what its Q or its DQ makes."""
    maker = given.producer(output)
    stored = maker.inputs[0] if maker is not None and is_linear(maker.proto, "DequantizeLinear") else output
    quantize, _ = _way_up(stored, given)
    if quantize is None:
        return given.element_type(stored)
    if any(quantize.inputs[2:]):
        return given.element_type(quantize.inputs[2])
    return int(quantize.attribute("output_dtype") or TensorProto.UINT8)


def _way_up(stored: str, view: Graph) -> tuple[Node | None, list[Node]]:
    """The QuantizeLinear that a stored tensor comes from, None where there is none; and the nodes between them."""
    between: list[Node] = []
    maker = view.producer(stored)
    while maker is not None and _is_between(maker, view):
        between.insert(0, maker)
        maker = view.producer(maker.inputs[0])
    return (maker, between) if maker is not None and is_linear(maker.proto, "QuantizeLinear") else (None, [])


def _is_between(node: Node, view: Graph) -> bool:
    """True for a node that moves what is stored, or says which integers are used."""
    if node.op == "Clip":
        return all(view.known_value(name) is not None for name in node.inputs[1:] if name)
    if node.op == "Cast":
        before, after = (view.element_type(name) for name in (node.inputs[0], node.outputs[0]))
        return before in EIGHT_BITS and after == TensorProto.INT32
    return node.op in MOVES and len(node.outputs) == 1


def _are_same(ours: Sequence[str], theirs: Sequence[str], view: Graph) -> bool:
    """True for one scale and one zero point (none is as good as zeros), known or computed."""
    for slot, (left, right) in enumerate(zip_longest(ours, theirs, fillvalue="")):
        if left == right:
            continue
        one, other = (view.known_value(name) if name else np.zeros(()) for name in (left, right))
        if one is None or other is None or (1 not in (one.size, other.size) and one.shape != other.shape):
            return False
        distance = 0.0 if slot else SAME_SCALE
        if not np.allclose(one.astype(np.float64), other.astype(np.float64), rtol=distance, atol=0):
            return False
    return True


def _axis(node: NodeProto) -> int:
    return next((item.i for item in node.attribute if item.name == "axis"), DEFAULT_AXIS)


def notes_on(pairs: Iterable[ExistingPair]) -> Iterator[str]:
    """What a user should know about the pairs that came with the model."""
    pairs = [pair for pair in pairs if pair.output]
    biases = [pair for pair in pairs if pair.type == TensorProto.INT32]
    others = [pair for pair in pairs if not pair.is_symmetric and pair.type not in (None, TensorProto.INT32)]
    broken = [pair.tensor for pair in pairs if pair.scale is not None and not pair.has_scale]
    yield f"the model comes with {count(len(pairs), 'pair')}, which stay as they are"
    if biases:
        yield f"{count(len(biases), 'bias', 'biases')} stored as INT32: TensorRT wants them in float (lint --fix mends)"
    if others:
        yield f"{count(len(others), 'pair')} of the model not symmetric INT8, which TensorRT wants (see lint)"
    if broken:
        yield f"the scale of the pair on {listed(broken)} is not finite and positive: it counts as unknown (see lint)"


def notes_on_left(pairs: Iterable[ExistingPair]) -> Iterator[str]:
    """What a user should know about the pairs that could not be taken out."""
    tensors = [pair.tensor for pair in pairs if pair.output]
    if tensors:
        yield (
            f"{count(len(tensors), 'pair')} of the model not understood, so they stay, on {listed(tensors)}: "
            "their scales are computed or per block, or other ops stand between Q and DQ"
        )


def listed(names: Sequence[str]) -> str:
    """The first of them in quotes, and how many more."""
    text = ", ".join(f"'{name}'" for name in names[:NAMED])
    return f"{text} and {len(names) - NAMED} more" if len(names) > NAMED else text


# ---- the float model -------------------------------------------------------------------------------------------------


def strip_pairs(quantized: ModelProto, readers: Collection[str] | None = None) -> ModelProto:
    """A copy of a Q/DQ model, from any producer, without its pairs: the float model that it stands for.

    What read a DequantizeLinear reads what was quantized; a weight stored as integers becomes the float initializer
    that its DequantizeLinear makes. A pair between two float types becomes a Cast, and one that cannot hold negative
    values, where it stands for a Relu, becomes that Relu. `readers` (first outputs of nodes, with their scopes):
    only these become float. Biases that had been corrected are again what they were.
    What moves data between a Q and its DQ moves them in float; a Clip there only narrows the integers, and goes with
    the pair, as the limits of the type do. A Q and a DQ with other nodes between or with different scales stay, and
    so does a DQ whose integers or scale are computed, or that has a scale per block.
    """
    view = Graph(quantized, deep=True)
    proto = ModelProto()
    proto.CopyFrom(quantized)
    proto.ir_version = max(proto.ir_version, MIN_IR)
    names = FreshNames(proto)
    restore_biases(proto.graph, readers)
    graphs = list(reversed(list(graphs_of(proto.graph))))
    left_over: set[str] = set()
    for scope, graph in graphs:
        left_over |= _Stripper(view, scope, graph, readers, names).strip()
    for scope, graph in graphs:
        drop_constants(view, scope, graph, left_over)
    if not _has_pairs(proto.graph):
        ours = {entry.key for entry in proto.metadata_props if entry.key.startswith(PREFIX)}
        drop_items(proto.metadata_props, ours, attrgetter("key"))
    return proto


def _has_pairs(graph: GraphProto) -> bool:
    return any(is_linear(node) for _, inner in graphs_of(graph) for node in inner.node)


def count_pairs(proto: ModelProto) -> int:
    """The DequantizeLinear nodes of a model, those in bodies that are not planned apart."""
    return sum(is_linear(node, "DequantizeLinear") for _, graph in graphs_of(proto.graph) for node in graph.node)


def graphs_of(graph: GraphProto, scope: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], GraphProto]]:
    """A graph and the bodies in it that are planned, each with its scope."""
    yield scope, graph
    for node in graph.node:
        for name, body in entered(node):
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
        self._stand_ins: dict[str, list[NodeProto]] = {}
        self._weights: set[str] = set()

    def strip(self) -> set[str]:
        """The constants that the nodes taken out have read, by the names that the whole model knows them by."""
        for node in self._graph.node:
            if is_linear(node, "DequantizeLinear"):
                self._find_source(node)
        if self._sources:
            _redirect(
                self._graph, self._scope, {name: _origin(name, self._sources) for name in self._sources}, self._readers
            )
            self._put_in_stand_ins()
            self._keep_outputs()
        return self._drop_unread()

    def _find_source(self, node: NodeProto) -> None:
        view, output = self._view, node.output[0]
        stored = self._key(node.input[0])
        quantize, between = _way_up(stored, view)
        if quantize is not None and _are_same([self._key(name) for name in node.input[1:]], quantize.inputs[1:], view):
            stand_ins = self._floats_for(node, quantize, between)
            self._stand_ins[output] = stand_ins
            self._sources[output] = stand_ins[-1].output[0] if stand_ins else quantize.proto.input[0]
        elif view.is_constant(stored) and (values := self._dequantized(node)) is not None:
            self._sources[output] = self._float_name(output)
            self._weights.add(self._sources[output])
            self._graph.initializer.append(numpy_helper.from_array(values, self._sources[output]))

    def _key(self, name: str) -> str:
        return self._view.key(self._scope, name)

    def _float_name(self, output: str) -> str:
        """What takes the place of a DQ's output has its name, unless that must stay for other readers."""
        edges = self._view.readers(self._key(output))
        if self._readers is None or all(edge.slot >= 0 and edge.key in self._readers for edge in edges):
            return output
        return self._names.fresh(f"{output}_float")

    def _floats_for(self, node: NodeProto, quantize: Node, between: list[Node]) -> list[NodeProto]:
        """What a pair does beside rounding: move data, change the float type, or cut off what is negative."""
        made = [NodeProto.FromString(move.proto.SerializeToString()) for move in between if move.op not in NARROWING]
        before, after = (self._view.element_type(name) for name in (quantize.inputs[1], self._key(node.input[1])))
        if before is not None and after is not None and before != after:
            made.append(helper.make_node("Cast", [""], [""], to=after))
        elif self._is_relu(quantize, between):
            made.append(helper.make_node("Relu", [""], [""]))
        read = quantize.proto.input[0]
        for new in made:
            new.input[0] = read
            read = self._float_name(node.output[0]) if new is made[-1] else self._names.fresh(f"{new.output[0]}_float")
            new.output[0] = read
        return made

    def _is_relu(self, quantize: Node, between: list[Node]) -> bool:
        maker = self._view.producer(quantize.inputs[0])
        if maker is None or maker.op not in RELU_BEFORE_Q or self._view.is_constant(quantize.inputs[0]):
            return False
        zero = self._zero_point(quantize)
        if zero is None or zero.dtype.kind not in "iu":
            return False
        bounds = [self._view.known_value(clip.inputs[1]) for clip in between if clip.op == "Clip" and clip.inputs[1:]]
        lowest = max([np.iinfo(zero.dtype).min, *(int(bound) for bound in bounds if bound is not None)])
        return bool((zero <= lowest).all())

    def _zero_point(self, quantize: Node) -> NDArray[Any] | None:
        if any(quantize.inputs[2:]):
            return self._view.known_value(quantize.inputs[2])
        return None if quantize.attribute("output_dtype") else np.zeros((), np.uint8)

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
        real = value.astype(np.float32)
        real -= offset
        real *= scale.reshape(shape)
        return np.asarray(real, scale.dtype)

    def _put_in_stand_ins(self) -> None:
        if not any(self._stand_ins.values()):
            return
        nodes: list[NodeProto] = []
        for node in self._graph.node:
            stand_ins = self._stand_ins.get(first_output_of(node), [])
            for new in stand_ins:
                new.input[:] = [_origin(name, self._sources) for name in new.input]
            nodes.extend(stand_ins)
            if not stand_ins or stand_ins[-1].output[0] != node.output[0]:
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

    def _drop_unread(self) -> set[str]:
        """Take out what of the pairs nobody reads any more; the constants that these have read."""
        graph = self._graph
        gone: set[str] = set()
        constants: set[str] = set()
        while True:
            read = _names_used(graph)
            unread = [node for node in graph.node if self._may_go(node) and node.output[0] not in read - self._weights]
            if not unread:
                break
            gone |= {node.output[0] for node in unread}
            constants |= {self._key(name) for node in unread for name in node.input if name}
            drop_items(graph.node, gone, first_output_of)
        drop_items(graph.value_info, gone - self._weights - read)
        return set(filter(self._view.is_constant, constants))

    def _may_go(self, node: NodeProto) -> bool:
        if is_linear(node):
            return node.op_type == "QuantizeLinear" or node.output[0] in self._sources
        return _way_up(self._key(first_output_of(node)), self._view)[0] is not None


def drop_constants(view: Graph, scope: tuple[str, ...], graph: GraphProto, unwanted: set[str]) -> None:
    """Take out those constants, with what makes them, that are made in this graph and that nobody reads any more."""

    def may_go(name: str) -> bool:
        return name not in read and view.key(scope, name) in unwanted

    while True:
        read = _names_used(graph)
        makers = [node for node in graph.node if any(node.output) and all(map(may_go, filter(None, node.output)))]
        if not makers:
            break
        unwanted |= {view.key(scope, name) for node in makers for name in node.input}
        gone = {first_output_of(node) for node in makers}
        drop_items(graph.node, gone, first_output_of)
        drop_items(graph.value_info, gone)
    gone = {tensor.name for tensor in graph.initializer if may_go(tensor.name)}
    for items in (graph.initializer, graph.input, graph.value_info):
        drop_items(items, gone)


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


def drop_items(repeated: Any, names: Collection[str], name_of: Callable[[Any], str] = attrgetter("name")) -> None:
    """Take the items of these names out of a repeated field of a proto; the others are not copied."""
    for index in reversed(range(len(repeated))):
        if name_of(repeated[index]) in names:
            del repeated[index]


def replace_items(repeated: Any, items: list[Any]) -> None:
    """Let a repeated field of a proto hold these items, of which some may be its own."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del repeated[:]
    repeated.extend(copies)
