"""The read-only view of a Q/DQ model of any producer, on which lint and mend work.

A `View` is built once: the Q/DQ nodes with their constants, and the same graph without them, on which the predicates
of the placement rules work unchanged. Only the top graph is looked at; bodies of If, Loop and Scan are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..edges import Edge
from ..graph import FLOAT_TYPES, QDQ_OPS, Graph, Node, bodies
from ..rules.commuting import MOVES, commutes
from ..rules.predicates import WEIGHTED

Values: TypeAlias = NDArray[Any]

DEFAULT_AXIS = 1
"""The axis of Q and DQ where the node does not say one."""
OTHER_QUANTIZED_TYPES = frozenset(
    {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}
)
"""FP8 and 4-bit pairs follow rules of their own, which are not looked at here."""
INTEGER_TYPES = frozenset({TensorProto.INT8, TensorProto.UINT8})

SUMS = frozenset({"Add", "Sum"})
BETWEEN_SCORES_AND_SOFTMAX = SUMS | MOVES | {"Cast", "Div", "Mul", "Sub", "Where"}
MAX_ATTENTION = 16
"""How many tensors around a Softmax the search for its two MatMuls looks at."""
ON_DEMAND_BYTES = 4096
"""Float weights above this size enter the view without their values, which no rule asks for."""


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """One QuantizeLinear or DequantizeLinear. `scale` and `zero_point` are None where absent or not constant.

    `source` is the Q whose integers a DQ reads, also behind data movement; a weight stored as integers has none.
    """

    node: Node
    scale: Values | None
    zero_point: Values | None
    axis: int | None
    source: Linear | None = None

    @property
    def is_q(self) -> bool:
        return self.node.proto.op_type == "QuantizeLinear"

    @property
    def data(self) -> str:
        return self.node.inputs[0]

    @property
    def scale_name(self) -> str:
        return self.node.inputs[1]

    @property
    def zero_point_name(self) -> str:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else ""

    @property
    def output(self) -> str:
        return self.node.outputs[0]

    @property
    def per_channel(self) -> bool:
        return self.scale is not None and self.scale.size > 1

    @property
    def channel_axis(self) -> int | None:
        """The axis along which ONNX reads the scale, None for one scale per tensor."""
        if not self.per_channel:
            return None
        return DEFAULT_AXIS if self.axis is None else self.axis

    @property
    def repeats(self) -> bool:
        """True for a DQ that reads the very constants of its Q: what is wrong with them is said there."""
        return self.source is not None and self.node.inputs[1:] == self.source.node.inputs[1:]


class View:
    """The Q/DQ nodes of a model, and `graph`: the same model without them, as if it had never been quantized.

    In `graph` every tensor has the name of its float original, and stored integers are float constants. An edge of
    `graph` is quantized where the real one reads a DQ (or a Q, if only data movement comes between Q and DQ).
    """

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.raw = Graph(proto)
        self.linears: tuple[Linear, ...] = tuple(self._read_linears())
        self.by_output = {linear.output: linear for linear in self.linears}
        self.graph = Graph(_float_model(self.raw))
        self._reads = {
            edge: self.by_output[name]
            for node in self.raw.nodes
            for edge, name in zip(node.edges, node.inputs, strict=True)
            if name in self.by_output
        }

    def is_quantized(self, edge: Edge) -> bool:
        return edge in self._reads

    def pair(self, edge: Edge) -> Linear | None:
        """The Q or DQ that the edge itself reads."""
        return self._reads.get(edge)

    def arriving(self, node: Node, slot: int) -> Linear | None:
        """The Q or DQ whose values an input reads, looking through data movement."""
        edge: Edge | None = node.edges[slot]
        while edge is not None and edge not in self._reads:
            node_above = self.graph.producer(node.inputs[slot])
            if node_above is None or not commutes(node_above, self.graph):
                return None
            node, slot = node_above, 0
            edge = node.edges[0]
        return self._reads[edge] if edge else None

    def activations(self, node: Node) -> list[int]:
        """The input slots of float tensors that are not constant."""
        return [
            slot
            for slot, name in enumerate(node.inputs)
            if name and self.graph.is_float(name) and not self.graph.is_constant(name)
        ]

    @cached_property
    def written(self) -> tuple[Linear, ...]:
        """Every Q, and every DQ with constants of its own, of pairs that could be INT8."""
        return tuple(linear for linear in self.linears if not linear.repeats and not self._is_of_other_type(linear))

    @cached_property
    def weighted(self) -> tuple[Node, ...]:
        """Every Conv, ConvTranspose, Gemm and MatMul."""
        return tuple(node for node in self.graph.nodes if node.op in WEIGHTED)

    @cached_property
    def attentions(self) -> tuple[tuple[Node, Node], ...]:
        """The two MatMuls around each Softmax, where both multiply activations."""
        return tuple(self._find_attentions())

    @cached_property
    def attention_nodes(self) -> frozenset[str]:
        """The first outputs of the MatMuls of all attentions."""
        return frozenset(node.first_output for pair in self.attentions for node in pair)

    def zero_point_type(self, linear: Linear) -> int | None:
        """The integer type that a Q or DQ works with, as far as the model says it."""
        if linear.zero_point_name:
            return self.raw.element_type(linear.zero_point_name)
        if linear.is_q:
            return int(linear.node.attribute("output_dtype") or 0) or None
        return self.raw.element_type(linear.data)

    def weight_reads(self, linear: Linear) -> Iterator[tuple[Node, int, int]]:
        """Who reads a per-channel DQ, directly or behind Transpose: node, slot, and the scale's axis as seen there."""
        axis = linear.channel_axis
        shape = self.raw.shape(linear.output)
        if axis is None or shape is None:
            return
        pending = [(linear.output, axis % len(shape))]
        while pending:
            tensor, axis = pending.pop()
            for edge in self.raw.readers(tensor):
                node = self.raw.reading_node(edge)
                if node is not None and node.op == "Transpose":
                    permutation = list(node.attribute("perm") or reversed(range(len(shape))))
                    pending.append((node.outputs[0], permutation.index(axis)))
                elif node is not None:
                    yield node, edge.slot, axis

    def _is_of_other_type(self, linear: Linear) -> bool:
        return self.zero_point_type(linear) in OTHER_QUANTIZED_TYPES

    def _read_linears(self) -> Iterator[Linear]:
        constants: dict[str, Values | None] = {}
        written: dict[str, Linear] = {}
        for node in self.raw.nodes:
            if node.proto.op_type not in QDQ_OPS:
                continue
            for name in node.inputs[1:3]:
                if name not in constants:
                    constants[name] = self.raw.known_value(name)
            axes = [attribute.i for attribute in node.proto.attribute if attribute.name == "axis"]
            linear = Linear(
                node,
                constants[node.inputs[1]],
                constants[node.inputs[2]] if len(node.inputs) > 2 else None,
                axes[0] if axes else None,
                None if node.proto.op_type == "QuantizeLinear" else written.get(_moved_integers(self.raw, node)),
            )
            if linear.is_q:
                written[linear.output] = linear
            yield linear

    def _find_attentions(self) -> Iterator[tuple[Node, Node]]:
        for softmax in self.graph.nodes:
            if softmax.op != "Softmax":
                continue
            scores, context = self._matmul_above(softmax), self._matmul_below(softmax)
            if scores is not None and context is not None:
                yield scores, context

    def _matmul_above(self, softmax: Node) -> Node | None:
        pending = [softmax.inputs[0]]
        for _ in range(MAX_ATTENTION):
            node = self.graph.producer(pending.pop()) if pending else None
            if node is not None and node.op == "MatMul":
                return node if len(self.activations(node)) == 2 else None
            if node is not None and node.op in BETWEEN_SCORES_AND_SOFTMAX:
                pending.extend(node.inputs[slot] for slot in reversed(self.activations(node)))
        return None

    def _matmul_below(self, softmax: Node) -> Node | None:
        pending = [softmax.outputs[0]]
        for _ in range(MAX_ATTENTION):
            edges = self.graph.readers(pending.pop()) if pending else ()
            for node in filter(None, map(self.graph.reading_node, edges)):
                if node.op == "MatMul" and len(self.activations(node)) == 2:
                    return node
                if node.op in MOVES or node.op == "Cast":
                    pending.append(node.outputs[0])
        return None


def _moved_integers(raw: Graph, dequantize: Node) -> str:
    """The tensor whose integers a DQ reads, upstream of data movement."""
    tensor = dequantize.inputs[0]
    node = raw.producer(tensor)
    while node is not None and node.op in MOVES:
        tensor = node.inputs[0]
        node = raw.producer(tensor)
    return tensor


# ---- the model without pairs ------------------------------------------------------------------------------------


def _float_model(raw: Graph) -> ModelProto:
    """A copy of the model without its Q/DQ nodes and without the values of large float weights."""
    linears = [node for node in raw.proto.graph.node if node.op_type in QDQ_OPS]
    names = _originals(linears)
    stored = _stored_integers(raw, linears)
    proto = ModelProto(ir_version=raw.proto.ir_version)
    proto.opset_import.extend(raw.proto.opset_import)
    proto.functions.extend(raw.proto.functions)
    graph = proto.graph
    graph.name = raw.proto.graph.name
    graph.node.extend(
        _renamed(node, names)
        for node in raw.proto.graph.node
        if node.op_type not in QDQ_OPS and not stored.keys() & set(node.output)
    )
    kept = [tensor for tensor in raw.proto.graph.initializer if tensor.name not in stored]
    graph.initializer.extend(_without_values(tensor) for tensor in kept)
    graph.initializer.extend(
        TensorProto(name=name, data_type=kind, dims=[size or 0 for size in raw.shape(name) or ()])
        for name, kind in stored.items()
        if name not in raw.inputs
    )
    graph.sparse_initializer.extend(raw.proto.graph.sparse_initializer)
    for value in raw.proto.graph.input:
        if value.name not in stored:
            graph.input.append(value)
        elif value.name in raw.inputs:
            graph.input.append(helper.make_tensor_value_info(value.name, stored[value.name], raw.shape(value.name)))
    graph.value_info.extend(
        value
        for value in raw.proto.graph.value_info
        if value.name not in names and value.type.tensor_type.elem_type not in INTEGER_TYPES
    )
    outputs = dict.fromkeys(names.get(name, name) for name in raw.outputs)
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return proto


def _originals(linears: Iterable[NodeProto]) -> dict[str, str]:
    """What each output of a Q or DQ was called before there were any, however long the chain of pairs."""
    above = {node.output[0]: node.input[0] for node in linears}
    originals: dict[str, str] = {}
    for name in above:
        chain = [name]
        while chain[-1] in above and chain[-1] not in originals:
            chain.append(above[chain[-1]])
        original = originals.get(chain[-1], chain[-1])
        originals.update(dict.fromkeys(chain[:-1], original))
    return originals


def _stored_integers(raw: Graph, linears: Iterable[NodeProto]) -> dict[str, int]:
    """Constants and graph inputs whose integers a DQ reads, and the float type that they stand for."""
    stored: dict[str, int] = {}
    for proto in linears:
        if proto.op_type == "QuantizeLinear":
            continue
        name = _moved_integers(raw, Node.of(proto))
        producer = raw.producer(name)
        if raw.element_type(name) not in FLOAT_TYPES and (producer is None or producer.op == "Constant"):
            kind = raw.element_type(proto.input[1])
            stored[name] = kind if kind in FLOAT_TYPES else TensorProto.FLOAT
    return stored


def _renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename(copy, names)
    return copy


def _rename(node: NodeProto, names: dict[str, str]) -> None:
    for slot, name in enumerate(node.input):
        if name in names:
            node.input[slot] = names[name]
    for _, body in bodies(node):
        for child in body.node:
            _rename(child, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def _without_values(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in FLOAT_TYPES or tensor.ByteSize() <= ON_DEMAND_BYTES:
        return tensor
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
