"""The rules of lint: for each code what TensorRT will do and how to mend it.

Rules are data: each entry of `RULES` names one small function that finds the places in a `View`. Only the top graph
is looked at; in bodies of If, Loop and Scan just the ops themselves are.

Evidence: [S] read in the source of onnx-tensorrt or ModelOpt, [D] said by NVIDIA's documentation,
[E] seen in a TensorRT-RTX 1.7.1 engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from ..edges import Edge, count
from ..graph import FLOAT_TYPES, HALF_OPSET, HALF_TYPES, MIN_OPSET, QDQ_OPS, Graph, Node, all_nodes
from ..rules.commuting import commutes
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
from ..scales import SMALLEST_NORMAL
from .view import SUMS, Linear, Values, View

ERROR, WARNING = "error", "warning"

SMALLEST_HALF = SMALLEST_NORMAL[TensorProto.FLOAT16]
"""FP16's smallest normal number: TensorRT flushes what lies below to zero."""

OPERATOR_FORM_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
OPERATOR_FORM_PREFIXES = ("QLinear", "QOrdered", "QAttention", "QEmbed", "QGemm", "QMoE", "DynamicQuantize")
OPERATOR_FORM_ENDINGS = ("Integer", "IntegerToFloat")

POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
FUSING = ACTIVATIONS | WITH_CONSTANT | {"BatchNormalization", "Sum"}
"""Ops that join the kernel of the op before them."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a rule found what it looks for."""

    node: str
    tensor: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LintRule:
    """One code: what TensorRT does, how to mend it, and the function that finds the places.

    `targets` names the only targets on which it does so; empty for all of them.
    """

    code: str
    severity: str
    what: str
    mend: str
    find: Callable[[View], Iterator[Spot]]
    targets: tuple[str, ...] = ()


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
    fp32 = view.raw.element_type(node.first_output) == TensorProto.FLOAT
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
