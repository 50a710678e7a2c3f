"""Lint: what TensorRT refuses, or silently runs in float, in a Q/DQ model of any producer.

Rules are data: `RULES` says for each code what TensorRT will do and how to mend it, and names one small function
that finds the places. They all read one `View`, built once: the Q/DQ nodes, and the same graph without them, on
which the predicates of the placement rules work unchanged. Only the top graph is looked at; in bodies of If, Loop
and Scan just the ops themselves are.

Evidence: [S] read in the source of onnx-tensorrt or ModelOpt, [D] said by NVIDIA's documentation,
[E] seen in a TensorRT-RTX 1.7.1 engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..edges import Edge, count
from ..errors import ModelError, QdqError, nearest
from ..model import FLOAT_TYPES, HALF_OPSET, HALF_TYPES, MIN_OPSET, QDQ_OPS, Graph, Node, Source, load
from ..rules.commuting import MOVES, commutes
from ..rules.predicates import (
    ACTIVATIONS,
    MAX_DIAMOND,
    WEIGHTED,
    WITH_CONSTANT,
    Subject,
    backbone,
    consumed_quantized,
    feeds_softmax,
    fused_branch,
    single_use,
    small_conv,
    small_matmul,
    spatial,
)

TARGETS = ("trt10", "trt11", "rtx")
"""TensorRT 10 and 11, and TensorRT for RTX."""
DEFAULT_TARGET = "trt11"
ERROR, WARNING = "error", "warning"

Values: TypeAlias = NDArray[Any]

DEFAULT_AXIS = 1
"""The axis of Q and DQ where the node does not say one."""
SMALLEST_HALF = 2.0**-14
"""FP16's smallest normal number: TensorRT flushes what lies below to zero."""
OTHER_QUANTIZED_TYPES = frozenset(
    {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}
)
"""FP8 and 4-bit pairs follow rules of their own, which are not looked at here."""
INTEGER_TYPES = frozenset({TensorProto.INT8, TensorProto.UINT8})

OPERATOR_FORM_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
OPERATOR_FORM_PREFIXES = ("QLinear", "QOrdered", "QAttention", "QEmbed", "QGemm", "QMoE", "DynamicQuantize")
OPERATOR_FORM_ENDINGS = ("Integer", "IntegerToFloat")

POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
SUMS = frozenset({"Add", "Sum"})
FUSING = ACTIVATIONS | WITH_CONSTANT | {"BatchNormalization", "Sum"}
"""Ops that join the kernel of the op before them."""
BETWEEN_SCORES_AND_SOFTMAX = SUMS | MOVES | {"Cast", "Div", "Mul", "Sub", "Where"}
MAX_ATTENTION = 16
"""How many tensors around a Softmax the search for its two MatMuls looks at."""
ON_DEMAND_BYTES = 4096
"""Float weights above this size enter the view without their values, which no rule asks for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that TensorRT will refuse or slow down: `what` it will do there, and how to `mend` it."""

    code: str
    severity: str
    node: str
    tensor: str
    detail: str
    what: str
    mend: str

    def __str__(self) -> str:
        place = f"{self.node} ({self.tensor})" if self.node and self.tensor else self.node or self.tensor
        return ": ".join(part for part in (place, self.detail) if part)


@dataclass(frozen=True, slots=True)
class Report:
    """What `lint` found for one target, errors first, in the order of `RULES`."""

    findings: tuple[Finding, ...]
    target: str

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == WARNING)

    def __str__(self) -> str:
        head = f"{count(len(self.errors), ERROR)}, {count(len(self.warnings), WARNING)} for {self.target}"
        return "\n".join([head, *_grouped(self.findings)])


def _grouped(findings: Iterable[Finding]) -> Iterator[str]:
    by_code: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_code[finding.code].append(finding)
    for code, found in by_code.items():
        first = found[0]
        yield from ("", f"{first.severity} {code} ({len(found)}): {first.what}", f"  mend: {first.mend}")
        yield from (f"    {finding}" for finding in found)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a rule found what it looks for."""

    node: str
    tensor: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LintRule:
    """One code: what TensorRT does, how to mend it, on which targets, and the function that finds the places."""

    code: str
    severity: str
    what: str
    mend: str
    find: Callable[[View], Iterator[Spot]]
    targets: tuple[str, ...] = TARGETS


def lint(model: Source, target: str = DEFAULT_TARGET) -> Report:
    """Check a Q/DQ model, as it was given, against what `target` (one of TARGETS) accepts and runs in INT8.

    Raises ModelError for what is no readable ONNX model, QdqError for an unknown target.
    """
    if target not in TARGETS:
        raise QdqError(f"unknown target '{target}'.{nearest(target, TARGETS)} Targets: {', '.join(TARGETS)}")
    view = View(load(model).original)
    rules = [rule for rule in RULES if target in rule.targets]
    return Report(tuple(finding for rule in rules for finding in _findings(rule, view)), target)


def _findings(rule: LintRule, view: View) -> Iterator[Finding]:
    for spot in rule.find(view):
        yield Finding(rule.code, rule.severity, spot.node, spot.tensor, spot.detail, rule.what, rule.mend)


# ---- the view ---------------------------------------------------------------------------------------------------


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
                    constants[name] = constant_value(self.raw, name)
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


def constant_value(graph: Graph, name: str) -> Values | None:
    """The value of a constant tensor, None where it is none or cannot be computed."""
    if not name or not graph.is_constant(name):
        return None
    node = graph.producer(name)
    literal = node.attribute("value") if node is not None and node.op == "Constant" else None
    if isinstance(literal, TensorProto):
        return numpy_helper.to_array(literal)
    try:
        return graph.value(name)
    except ModelError:
        return None


def _moved_integers(raw: Graph, dequantize: Node) -> str:
    """The tensor whose integers a DQ reads, upstream of data movement."""
    tensor = dequantize.inputs[0]
    node = raw.producer(tensor)
    while node is not None and node.op in MOVES:
        tensor = node.inputs[0]
        node = raw.producer(tensor)
    return tensor


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
    for body in _bodies(node):
        for child in body.node:
            _rename(child, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [body for item in node.attribute for body in (item.g, *item.graphs) if body.ByteSize()]


def _without_values(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in FLOAT_TYPES or tensor.ByteSize() <= ON_DEMAND_BYTES:
        return tensor
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


# ---- errors: zero points and scales -----------------------------------------------------------------------------


def _at(linear: Linear, detail: str = "") -> Spot:
    return Spot(linear.node.label, linear.data, detail)


def _type_name(element_type: int | None) -> str:
    return str(TensorProto.DataType.Name(element_type or 0))


def _zero_point_missing(view: View) -> Iterator[Spot]:
    for linear in view.written:
        kind = view.zero_point_type(linear)
        if not linear.zero_point_name and kind not in (TensorProto.INT8, TensorProto.INT32):
            yield _at(linear)


def _zero_point_not_zero(view: View) -> Iterator[Spot]:
    for linear in view.written:
        if linear.zero_point is not None and linear.zero_point.any():
            low, high = linear.zero_point.min(), linear.zero_point.max()
            yield _at(linear, f"it is {low}" if low == high else f"they are {low} to {high}")
        elif linear.zero_point_name and linear.zero_point is None:
            yield _at(linear, "it is computed at run time")


def _zero_point_not_int8(view: View) -> Iterator[Spot]:
    for linear in view.written:
        kind = view.zero_point_type(linear) if linear.zero_point_name else None
        if kind not in (None, TensorProto.INT8, TensorProto.INT32):
            yield _at(linear, f"it is {_type_name(kind)}")


def _zero_point_shape(view: View) -> Iterator[Spot]:
    for linear in view.written:
        scale, zero_point = linear.scale, linear.zero_point
        if scale is not None and zero_point is not None and scale.size != zero_point.size:
            yield _at(linear, f"{count(zero_point.size, 'zero point')} for {count(scale.size, 'scale')}")


def _scale_not_constant(view: View) -> Iterator[Spot]:
    return (_at(linear, f"it is '{linear.scale_name}'") for linear in view.written if linear.scale is None)


def _scale_not_positive(view: View) -> Iterator[Spot]:
    for linear in view.written:
        if linear.scale is None:
            continue
        values = linear.scale.astype(np.float64)
        wrong = ~(np.isfinite(values) & (values > 0))
        if linear.scale.dtype == np.float16:
            wrong &= values != 0  # that is scale-zero-in-fp16
        if wrong.any():
            yield _at(linear, f"{values[wrong].flat[0]:g} in {count(int(wrong.sum()), 'place')}")


def _scale_double(view: View) -> Iterator[Spot]:
    for linear in view.written:
        if view.raw.element_type(linear.scale_name) == TensorProto.DOUBLE:
            yield _at(linear)


def _scale_zero_in_fp16(view: View) -> Iterator[Spot]:
    for linear in view.written:
        kinds = (view.raw.element_type(linear.scale_name), view.raw.element_type(linear.data))
        if linear.scale is None or TensorProto.FLOAT16 not in kinds:
            continue
        values = linear.scale.astype(np.float64)
        small = (values >= 0) & (values < SMALLEST_HALF)
        if small.any():
            yield _at(linear, f"{values[small].flat[0]:g} in {count(int(small.sum()), 'place')}")


def _scale_type(view: View) -> Iterator[Spot]:
    for linear in view.written:
        scale, data = view.raw.element_type(linear.scale_name), _data_type(view, linear)
        if scale in FLOAT_TYPES and data in FLOAT_TYPES and scale != data:
            yield _at(linear, f"{_type_name(scale)} scale, {_type_name(data)} data")


def _data_type(view: View, linear: Linear) -> int | None:
    """The float type of the data; for stored integers that of the activation which they are multiplied with."""
    if linear.is_q:
        return view.raw.element_type(linear.data)
    for edge in view.raw.readers(linear.output):
        node = view.graph.reading_node(edge)
        if linear.source is None and node is not None and node.op in WEIGHTED and edge.slot == 1:
            return view.graph.element_type(node.inputs[0])
    return None


def _fp16_scale_opset(view: View) -> Iterator[Spot]:
    if view.raw.opset >= HALF_OPSET:
        return
    for linear in view.written:
        if view.raw.element_type(linear.scale_name) in HALF_TYPES:
            yield _at(linear, f"opset {view.raw.opset}")


def _per_channel_opset(view: View) -> Iterator[Spot]:
    if view.raw.opset < MIN_OPSET:
        yield from (_at(linear, f"opset {view.raw.opset}") for linear in view.written if linear.per_channel)


def _pair_mismatch(view: View) -> Iterator[Spot]:
    for linear in view.linears:
        q = linear.source
        if q is None or q.scale is None or linear.scale is None:
            continue
        if not same_values(q.scale, linear.scale):
            yield _at(linear, f"its scale differs from that of {q.node.label}")
        elif q.channel_axis != linear.channel_axis:
            yield _at(linear, f"axis {linear.channel_axis}, but {q.node.label} has axis {q.channel_axis}")


def same_values(left: Values, right: Values) -> bool:
    """True for equal numbers in the same order, whatever their shape."""
    return np.array_equal(left.astype(np.float64).reshape(-1), right.astype(np.float64).reshape(-1), equal_nan=True)


# ---- errors: channels, biases, ops, names -----------------------------------------------------------------------


def _activation_per_channel(view: View) -> Iterator[Spot]:
    for linear in view.written:
        if linear.per_channel and linear.scale is not None and not view.raw.is_constant(linear.data):
            yield _at(linear, count(linear.scale.size, "scale"))


def _axis_missing(view: View) -> Iterator[Spot]:
    for linear in view.linears:
        follows = linear.source is not None and linear.source.axis is None
        if linear.per_channel and linear.axis is None and not follows and view.raw.is_constant(linear.data):
            yield _at(linear)


def _axis_wrong(view: View) -> Iterator[Spot]:
    for linear in view.linears:
        if linear.is_q or linear.axis is None or not view.raw.is_constant(linear.data):
            continue
        for node, slot, axis in view.weight_reads(linear):
            wanted = channel_axis(view, node, slot)
            if wanted is not None and wanted != axis:
                yield _at(linear, f"axis {axis}, but the output channels of {node.label} lie along axis {wanted}")


def channel_axis(view: View, node: Node, slot: int) -> int | None:
    """The axis of a weight's output channels where `node` reads it, None where there is none (or it is disputed)."""
    if node.op == "Conv":
        return 0 if slot == 1 else None
    if node.op == "Gemm" and slot < 2:
        turned = bool(node.attribute("transB" if slot else "transA"))
        return int(turned) if slot == 0 else int(not turned)
    shape = view.raw.shape(node.inputs[slot])
    if node.op == "MatMul" and shape is not None and len(shape) > 1:
        return len(shape) - (1 if slot else 2)
    return None


def _bias_int32(view: View) -> Iterator[Spot]:
    for linear in view.linears:
        if not linear.is_q and view.raw.element_type(linear.data) == TensorProto.INT32:
            yield _at(linear)


def _operator_form(view: View) -> Iterator[Spot]:
    for proto in all_nodes(view.proto.graph):
        if _is_operator_form(proto):
            node = Node.of(proto)
            yield Spot(node.label, node.first_output)


def _is_operator_form(node: NodeProto) -> bool:
    if node.domain not in OPERATOR_FORM_DOMAINS:
        return False
    return node.op_type.startswith(OPERATOR_FORM_PREFIXES) or node.op_type.endswith(OPERATOR_FORM_ENDINGS)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of all bodies in it."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from all_nodes(body)


def _duplicate_names(view: View) -> Iterator[Spot]:
    for name, nodes in same_names(view.proto).items():
        yield Spot(Node.of(nodes[-1]).label, "", f"{len(nodes)} nodes are called '{name}'")


def same_names(proto: ModelProto) -> dict[str, list[NodeProto]]:
    """The nodes that share a name, where at least one of them is a Q or DQ, those last."""
    named: dict[str, list[NodeProto]] = defaultdict(list)
    for node in proto.graph.node:
        if node.name:
            named[node.name].append(node)
    return {
        name: sorted(nodes, key=lambda node: node.op_type in QDQ_OPS)
        for name, nodes in named.items()
        if len(nodes) > 1 and any(node.op_type in QDQ_OPS for node in nodes)
    }


# ---- warnings: weighted ops -------------------------------------------------------------------------------------


def _sides(view: View, node: Node) -> tuple[Linear | None, Linear | None]:
    """What arrives quantized at data and weight of a weighted op."""
    return view.arriving(node, 0), view.arriving(node, 1)


def _is_int8(view: View, node: Node) -> bool:
    return None not in _sides(view, node)


def one_sided(view: View) -> Iterator[tuple[Node, int]]:
    """The weighted ops with one quantized input, attention apart, and the slot of that input."""
    for node, slot in _half_quantized(view):
        if _separator(view, node, 1 - slot) is None:
            yield node, slot


def _half_quantized(view: View) -> Iterator[tuple[Node, int]]:
    for node in view.weighted:
        left, right = _sides(view, node)
        if (left is None) != (right is None) and node.first_output not in view.attention_nodes:
            yield node, 0 if right is None else 1


def _one_sided(view: View) -> Iterator[Spot]:
    for node, slot in one_sided(view):
        yield Spot(node.label, node.inputs[1 - slot], f"input {slot} is quantized, input {1 - slot} is not")


def _op_between(view: View) -> Iterator[Spot]:
    for node, slot in _half_quantized(view):
        between = _separator(view, node, 1 - slot)
        if between is not None:
            yield Spot(between.label, node.inputs[1 - slot], f"it stands between a pair and {node.label}")


def _separator(view: View, node: Node, slot: int) -> Node | None:
    """The non-commuting op between a pair upstream and this input, where one input leads to the next."""
    separator = None
    for _ in range(MAX_DIAMOND):
        above = view.graph.producer(node.inputs[slot])
        if above is None or above.op in WEIGHTED:
            return None
        slots = [
            number
            for number in range(len(above.inputs))
            if view.is_quantized(above.edges[number]) or number in view.activations(above)
        ]
        if len(slots) != 1:
            return None
        if not commutes(above, view.graph):
            separator = separator or above
        if view.is_quantized(above.edges[slots[0]]):
            return separator
        node, slot = above, slots[0]
    return None


def _half_attention(view: View) -> Iterator[Spot]:
    for pair in view.attentions:
        inputs = [(node, slot) for node in pair for slot in (0, 1)]
        bare = [(node, slot) for node, slot in inputs if view.arriving(node, slot) is None]
        if 0 < len(bare) < len(inputs):
            node, slot = bare[0]
            yield Spot(node.label, node.inputs[slot], f"{len(inputs) - len(bare)} of its 4 inputs are quantized")


def _tiny_shape(view: View) -> Iterator[Spot]:
    for node in view.weighted:
        subject = Subject(node.outputs[0], node)
        small = (node.op == "Conv" and small_conv(view, subject)) or (
            node.op in ("Gemm", "MatMul") and small_matmul(view, subject)
        )
        if small and _is_int8(view, node):
            shapes = " x ".join(_shape_text(view.graph.shape(name)) for name in node.inputs[:2])
            yield Spot(node.label, node.inputs[1], shapes)


def _shape_text(shape: tuple[int | None, ...] | None) -> str:
    return "[?]" if shape is None else f"[{','.join('?' if size is None else str(size) for size in shape)}]"


def _conv_transpose_per_channel(view: View) -> Iterator[Spot]:
    for node in view.weighted:
        weight = view.arriving(node, 1) if node.op == "ConvTranspose" else None
        if weight is not None and weight.per_channel:
            yield Spot(node.label, node.inputs[1], f"axis {weight.channel_axis}")


# ---- warnings: what stands around weighted ops ------------------------------------------------------------------


def _pair_in_epilogue(view: View) -> Iterator[Spot]:
    for node in view.graph.nodes:
        for edge in filter(view.is_quantized, node.edges):
            conv = _continued(view, node, edge)
            if conv is not None:
                yield Spot(node.label, node.inputs[edge.slot], f"it would fuse with {conv.label}")
        branches = _fusable_branches(view, node)
        if branches and not _bare(view, node, branches):
            yield Spot(node.label, node.inputs[branches[0]], "this branch would fuse with the sum")


def _continued(view: View, node: Node, edge: Edge) -> Node | None:
    """The weighted op whose kernel would take in `node`, a BN, activation, or Add or Mul of a constant."""
    if node.op not in FUSING:
        return None
    above = backbone(node.inputs[edge.slot], view.graph)
    return above if above is not None and backbone(node.outputs[0], view.graph) is above else None


def _fusable_branches(view: View, node: Node) -> list[int]:
    """The slots of a residual sum whose branch could be taken into one kernel with it; none for other nodes."""
    slots = view.activations(node) if node.op in SUMS else []
    if len(slots) < 2:
        return []
    subjects = {slot: Subject(node.inputs[slot], view.graph.producer(node.inputs[slot])) for slot in slots}
    return [slot for slot, subject in subjects.items() if single_use(view, subject) and fused_branch(view, subject)]


def _bare(view: View, node: Node, slots: Iterable[int]) -> list[int]:
    return [slot for slot in slots if not view.is_quantized(node.edges[slot])]


def _residual_skip_float(view: View) -> Iterator[Spot]:
    for node in view.graph.nodes:
        branches = _bare(view, node, _fusable_branches(view, node))
        mains = [slot for slot in branches if _comes_from_int8(view, node.inputs[slot])]
        if not mains or feeds_softmax(view, Subject(node.outputs[0], node)):
            continue
        skips = [slot for slot in view.activations(node) if slot != mains[0] and view.arriving(node, slot) is None]
        if skips:
            yield Spot(node.label, node.inputs[skips[0]])


def _comes_from_int8(view: View, tensor: str) -> bool:
    node = backbone(tensor, view.graph)
    return node is not None and _is_int8(view, node)


class _BehindConcat:
    """The view in which a Concat reads quantized where its output is: TensorRT moves a Q to the Concat's inputs."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._concats: set[str] = set()
        for node in reversed(view.graph.nodes):
            if node.op == "Concat" and consumed_quantized(self, Subject(node.outputs[0], node)):
                self._concats.add(node.first_output)

    @property
    def graph(self) -> Graph:
        return self._view.graph

    def is_quantized(self, edge: Edge) -> bool:
        return self._view.is_quantized(edge) or (not edge.scope and edge.reader in self._concats)


def _float_consumer(view: View) -> Iterator[Spot]:
    behind = _BehindConcat(view)
    for node in view.graph.nodes:
        output = Subject(node.first_output, node)
        if node.op not in SUMS | POOLS | {"Mul", "ReduceMean"} or (
            node.op == "ReduceMean" and not spatial(view, output)
        ):
            continue
        edges = [edge for edge in node.edges if view.is_quantized(edge)]
        fused = _fusable_branches(view, node) or any(_continued(view, node, edge) for edge in edges)
        if edges and not fused and not consumed_quantized(behind, output):
            yield Spot(node.label, node.inputs[edges[0].slot])


def _concat_scales_differ(view: View) -> Iterator[Spot]:
    for node in view.graph.nodes:
        if node.op != "Concat":
            continue
        arriving = [view.arriving(node, slot) for slot in range(len(node.inputs))]
        scales = {float(it.scale.flat[0]) for it in arriving if it and it.scale is not None and it.scale.size == 1}
        if len(scales) > 1:
            yield Spot(node.label, node.outputs[0], f"from {min(scales):g} to {max(scales):g}")


def _several_scales(view: View) -> Iterator[Spot]:
    by_tensor: dict[tuple[str, int | None], list[Linear]] = defaultdict(list)
    for linear in view.linears:
        if linear.is_q and linear.scale is not None:
            by_tensor[linear.data, linear.channel_axis].append(linear)
    for (tensor, _), linears in by_tensor.items():
        scales = {linear.scale.tobytes() for linear in linears if linear.scale is not None}
        if len(scales) > 1:
            yield Spot(linears[-1].node.label, tensor, f"{len(scales)} different scales")


def _output_quantized(view: View) -> Iterator[Spot]:
    for name in view.raw.outputs:
        if name in view.by_output:
            yield Spot(view.by_output[name].node.label, name)


def _fp32_rest(view: View) -> Iterator[Spot]:
    int8: set[str] = set()
    nodes = [node for node in view.graph.nodes if _computes_in_fp32(view, node)]
    for node in nodes:
        if _runs_in_int8(view, node, int8):
            int8.add(node.first_output)
    rest = [node for node in nodes if node.first_output not in int8]
    if rest:
        yield Spot("", "", f"{len(rest)} of {count(len(nodes), 'float op')}, such as {rest[0].label}")


def _computes_in_fp32(view: View, node: Node) -> bool:
    fp32 = view.graph.element_type(node.first_output) == TensorProto.FLOAT
    moves = node.op in ("Cast", "Concat") or commutes(node, view.graph)
    return fp32 and not moves and not view.graph.is_constant(node.first_output)


def _runs_in_int8(view: View, node: Node, int8: set[str]) -> bool:
    """True for ops that read nothing but pairs, and for those that fuse behind one that does."""
    if node.op in WEIGHTED:
        return _is_int8(view, node)
    slots = view.activations(node)
    if all(view.arriving(node, slot) is not None for slot in slots) or _comes_from_int8(view, node.first_output):
        return True
    above = [view.graph.producer(node.inputs[slot]) for slot in _bare(view, node, slots)]
    alone = [it for it in above if it and len(view.graph.readers(it.first_output)) == 1]
    return node.op in FUSING and any(it.first_output in int8 for it in alone)


# ---- the rules --------------------------------------------------------------------------------------------------

RULES: tuple[LintRule, ...] = (
    LintRule(  # [S] the importer's default is INT8, ONNX's is UINT8
        "zero-point-missing",
        ERROR,
        "Without a zero point ONNX Runtime reads UINT8 and TensorRT INT8: the two compute different things.",
        "Write an INT8 zero point of 0, as large as the scale.",
        _zero_point_missing,
    ),
    LintRule(  # [S][E] the parser stops
        "zero-point-not-zero",
        ERROR,
        "TensorRT refuses the model: it knows symmetric quantization only, where the zero point is 0.",
        "Quantize the float model symmetrically (qdq-insert; ONNX Runtime: ActivationSymmetric, WeightSymmetric).",
        _zero_point_not_zero,
    ),
    LintRule(  # [S][E] a UINT8 zero point of 0 parses, and is then taken for INT8
        "zero-point-not-int8",
        ERROR,
        "TensorRT has INT8 only: another integer type is refused, or its range is cut.",
        "Quantize to INT8 (ONNX Runtime: activation_type and weight_type QInt8).",
        _zero_point_not_int8,
    ),
    LintRule(  # [S][E] volumes are compared
        "zero-point-shape",
        ERROR,
        "TensorRT refuses the model: there must be as many zero points as scales.",
        "Give the zero point the shape of the scale.",
        _zero_point_shape,
    ),
    LintRule(  # [S][D]
        "scale-not-constant",
        ERROR,
        "TensorRT refuses the model: it needs the scale when it builds the engine.",
        "Use static quantization; fold constants if the scale is computed from them.",
        _scale_not_constant,
    ),
    LintRule(  # [E] zero, negative and NaN are refused, infinity gives an engine of zeros
        "scale-not-positive",
        ERROR,
        "TensorRT refuses scales that are not positive, and computes nonsense with infinite ones.",
        "Give tensors and channels that are all zero the scale 1; calibrate anew for the others.",
        _scale_not_positive,
    ),
    LintRule(  # [S]
        "scale-double",
        ERROR,
        "Scales in double precision are not valid ONNX, and TensorRT has no such type.",
        "Store the scale in the float type of the data.",
        _scale_double,
    ),
    LintRule(  # [S] ModelOpt clamps here
        "scale-zero-in-fp16",
        ERROR,
        "This scale lies below FP16's smallest normal number and becomes zero: its tensor is lost.",
        f"Raise the scale to at least {SMALLEST_HALF:.3g}; it is 1 for tensors that are all zero.",
        _scale_zero_in_fp16,
    ),
    LintRule(  # [S][E]
        "scale-type",
        ERROR,
        "Networks are strongly typed: a scale of another float type than the data changes the type of what follows.",
        "Store the scale in the float type of the data.",
        _scale_type,
    ),
    LintRule(  # ONNX: QuantizeLinear-19
        "fp16-scale-opset",
        ERROR,
        f"FP16 and BF16 scales exist from opset {HALF_OPSET} on: below, the model is not valid ONNX.",
        f"Export with opset {HALF_OPSET} or later.",
        _fp16_scale_opset,
    ),
    LintRule(  # ONNX: QuantizeLinear-13
        "per-channel-opset",
        ERROR,
        f"Scales per channel exist from opset {MIN_OPSET} on: below, the model is not valid ONNX.",
        f"Export with opset {MIN_OPSET} or later.",
        _per_channel_opset,
    ),
    LintRule(  # [D] a pair stands for one rounding
        "pair-mismatch",
        ERROR,
        "The DQ undoes another quantization than its Q did: what comes out is scaled wrongly.",
        "Give both the same scale and the same axis.",
        _pair_mismatch,
    ),
    LintRule(  # [D][E] builds, as a float layer
        "activation-per-channel",
        ERROR,
        "TensorRT quantizes activations with one scale per tensor: what reads this one runs in float.",
        "Use one scale for the whole tensor; scales per channel are for weights.",
        _activation_per_channel,
    ),
    LintRule(  # [S][E] the default changed between parser versions
        "axis-missing",
        ERROR,
        "Parser versions disagree on the default axis: with a wrong one the op silently runs in float.",
        "Write the axis of the output channels on Q and DQ.",
        _axis_missing,
    ),
    LintRule(  # [E] with Cin == Cout it builds, as a float layer
        "axis-wrong",
        ERROR,
        "Scales that do not follow the output channels leave INT8: the op silently runs in float.",
        "Output channels: Conv axis 0; Gemm B 1, or 0 if transB; MatMul the last axis, on the left the last but one.",
        _axis_wrong,
    ),
    LintRule(  # [E] DQ takes INT8 (or FP8, FP4, INT4) only
        "bias-int32",
        ERROR,
        "TensorRT refuses the model: a DQ cannot read INT32.",
        "Leave the bias in float (ONNX Runtime: QuantizeBias=False).",
        _bias_int32,
    ),
    LintRule(  # [S] there are no importers
        "operator-form",
        ERROR,
        "TensorRT refuses the model: it reads Q/DQ pairs around float ops, not integer ops.",
        "Quantize the float model to Q/DQ form (qdq-insert; ONNX Runtime: quant_format=QDQ).",
        _operator_form,
    ),
    LintRule(  # [E] only where a Q or DQ bears the second name; others are renamed by the parser
        "duplicate-names",
        ERROR,
        "TensorRT refuses a Q or DQ that bears the name of another node.",
        "Rename the Q or DQ, or leave its name empty.",
        _duplicate_names,
    ),
    LintRule(  # [D][E]
        "one-sided",
        WARNING,
        "With only one of its two inputs quantized, the op runs in float and the pair costs accuracy for nothing.",
        "Quantize both data and weight, or neither.",
        _one_sided,
    ),
    LintRule(  # [E]
        "op-between",
        WARNING,
        "An op that does not commute with quantization stands between the pair and its consumer, which runs in float.",
        "Put the pair behind this op, directly before the Conv, Gemm or MatMul.",
        _op_between,
    ),
    LintRule(  # [D][S]
        "pair-in-epilogue",
        WARNING,
        "The pair breaks the fusion of a Conv, Gemm or MatMul with the op behind it: two kernels, two roundings.",
        "Remove the pair; quantize behind the fused op instead, where the next weighted op reads.",
        _pair_in_epilogue,
    ),
    LintRule(  # [D]
        "residual-skip-float",
        WARNING,
        "The skip input sets the precision of the fused Conv and Add: while it is float, the sum is written in float.",
        "Put a pair on the skip input of the Add; the Conv branch stays bare.",
        _residual_skip_float,
    ),
    LintRule(  # [S] classic TensorRT has no average pool from INT8 to float
        "float-consumer",
        WARNING,
        "Its inputs are quantized, but its result is read in float: INT8 gains nothing here and costs accuracy.",
        "Remove the pairs on its inputs, or quantize what reads its result.",
        _float_consumer,
    ),
    LintRule(  # [S]
        "concat-scales-differ",
        WARNING,
        "A Concat of INT8 data with different scales must convert each of them.",
        "Use one scale for all inputs and the output, the largest.",
        _concat_scales_differ,
    ),
    LintRule(  # [E] one pair serves all consumers
        "several-scales",
        WARNING,
        "One tensor has pairs with different scales: it is converted and written several times.",
        "Use one pair, with one scale, for all its consumers.",
        _several_scales,
    ),
    LintRule(  # [E] half of it breaks the fused kernel
        "half-attention",
        WARNING,
        "Attention fuses into one kernel when none or all of its MatMul inputs are quantized; this one is torn apart.",
        "Quantize both inputs of both MatMuls (placement cases/attention-int8), or none.",
        _half_attention,
    ),
    LintRule(  # [D][S]
        "output-quantized",
        WARNING,
        "A pair on a graph output rounds the result for no gain: nothing behind it runs in INT8.",
        "Let the graph end in float.",
        _output_quantized,
    ),
    LintRule(  # [S] ModelOpt leaves these in float
        "tiny-shape",
        WARNING,
        "Too few or unaligned channels, or an odd kernel: in INT8 this op is slower than in float.",
        "Leave it in float.",
        _tiny_shape,
    ),
    LintRule(  # [?] sources disagree between axis 0 and 1
        "conv-transpose-per-channel",
        WARNING,
        "Sources disagree on the channel axis of a ConvTranspose weight: with the other one it runs in float.",
        "Use one scale for the whole weight.",
        _conv_transpose_per_channel,
    ),
    LintRule(  # [D] 11 is always strongly typed
        "fp32-rest",
        WARNING,
        "TensorRT 11 runs each op in the type that the model says: what is not quantized runs in FP32, not in FP16.",
        "Convert the float tensors and the scales to FP16 (opset 19 or later); graph inputs and outputs may stay FP32.",
        _fp32_rest,
        ("trt11",),
    ),
)
"""Errors first, then warnings; reports follow this order."""
