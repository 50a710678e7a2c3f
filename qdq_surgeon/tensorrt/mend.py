"""Mend what lint finds, where that needs no new calibration; always on a copy.

Each step looks at the model anew, changes what it can be sure of, and says what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..edges import count
from ..graph import FLOAT_TYPES, QDQ_OPS, FreshNames, Graph, Node, all_nodes
from ..model import Source, load
from ..rules.commuting import commutes
from ..scales import to_scale
from ..storage import with_weights
from .lint import DEFAULT_TARGET, Finding, lint
from .lint_rules import POOLS, SMALLEST_HALF, channel_axis, one_sided, same_names, same_values
from .view import INTEGER_TYPES, OTHER_QUANTIZED_TYPES, Linear, Values, View

NOT_NEGATIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"})
"""Ops whose results are never below zero."""
UINT8_MIDDLE = 128
INT8_LOWEST, INT8_LEVELS, UINT8_LEVELS = -128, 127, 255


@dataclass(frozen=True)
class Mended:
    """`model` is a mended copy, `done` says what was mended where, `left` is what lint still finds in it."""

    model: ModelProto
    done: tuple[str, ...]
    left: tuple[Finding, ...]


def mend(model: Source, target: str = DEFAULT_TARGET) -> Mended:
    """Mend a copy of a Q/DQ model, as far as that needs no calibration data, and lint the result for `target`.

    Raises ModelError for what is no readable ONNX model, QdqError for an unknown target.
    """
    proto = ModelProto()
    proto.CopyFrom(with_weights(load(model).original))
    read_before = _names_read(proto)
    done: list[str] = []
    refused: dict[str, str] = {}
    bench = _Bench(proto)
    for step in STEPS:
        said = list(step(bench))
        refused.update(bench.refused)
        done.extend(said)
        if said:
            bench = _Bench(proto)
    _remove_initializers(proto, read_before - _names_read(proto))
    _remove_integer_hints(proto)
    left = (_with_reason(finding, refused) for finding in lint(proto, target).findings)
    return Mended(proto, tuple(done), tuple(left))


def _with_reason(finding: Finding, refused: dict[str, str]) -> Finding:
    reason = refused.get(finding.node) if finding.code.startswith("zero-point") else None
    return replace(finding, detail=f"{finding.detail}; not mended: {reason}".lstrip("; ")) if reason else finding


@dataclass(frozen=True, eq=False, slots=True)
class _Pair:
    """A Q with the DQs that read its integers, or (without a Q) a DQ of stored integers."""

    linears: tuple[Linear, ...]

    @property
    def first(self) -> Linear:
        return self.linears[0]

    @property
    def label(self) -> str:
        return self.first.node.label


class _Bench:
    """The model under repair as one step finds it, and the means to change it."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.view = View(proto)
        self.refused: dict[str, str] = {}

    @cached_property
    def all_pairs(self) -> tuple[_Pair, ...]:
        groups: dict[str, list[Linear]] = {}
        for linear in self.view.linears:
            groups.setdefault((linear.source or linear).output, []).append(linear)
        return tuple(_Pair(tuple(group)) for group in groups.values())

    @cached_property
    def pairs(self) -> tuple[_Pair, ...]:
        """The pairs that could be INT8 and whose constants are known and fit together."""
        return tuple(pair for pair in self.all_pairs if self._is_sound(pair))

    def weight(self, pair: _Pair) -> Values | None:
        """The float values of a constant under a pair, None for activations."""
        values = self.view.raw.known_value(pair.first.data)
        if values is None or pair.first.is_q:
            return None if values is None else values.astype(np.float64)
        return _dequantized(pair.first, values)

    def is_stored(self, pair: _Pair) -> bool:
        return not pair.first.is_q

    def rewrite(self, pair: _Pair, scale: Values, axis: int | None, stored: Values | None = None) -> None:
        """Give all Q and DQ of a pair this scale, INT8 zero points of 0, this axis, and (if any) new integers."""
        old = pair.first
        scale_name = old.scale_name
        if scale is not old.scale:
            scale_name = self.store(f"{old.data}_scale", scale)
        zero_point = self.store(f"{old.data}_zero_point", np.zeros(scale.shape, np.int8))
        for linear in pair.linears:
            proto = linear.node.proto
            del proto.input[1:]
            proto.input.extend([scale_name, zero_point])
            _remove_attributes(proto, "output_dtype")
            _set_axis(proto, axis)
        if stored is not None:
            old.node.proto.input[0] = self.store(f"{old.data}_int8", stored)

    def store(self, wanted: str, values: Values) -> str:
        """Add an initializer under a fresh name."""
        name = self.names.fresh(wanted)
        self.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    @cached_property
    def names(self) -> FreshNames:
        return FreshNames(self.proto)

    def _is_sound(self, pair: _Pair) -> bool:
        kinds = {self.view.zero_point_type(linear) for linear in pair.linears}
        if self.view.raw.element_type(pair.first.scale_name) not in FLOAT_TYPES:
            return False
        if kinds & {TensorProto.INT32, *OTHER_QUANTIZED_TYPES}:
            return False
        return all(_fits(linear, pair.first, self.view.raw) for linear in pair.linears)


def _fits(linear: Linear, first: Linear, raw: Graph) -> bool:
    """True where the constants of a Q or DQ are known, equal those of its pair, and fit the data's shape."""
    scale, zero_point, axis, shape = linear.scale, linear.zero_point, linear.channel_axis, raw.shape(linear.data)
    if scale is None or first.scale is None or not same_values(scale, first.scale) or axis != first.channel_axis:
        return False
    if zero_point is None:
        return not linear.zero_point_name
    if axis is not None and shape is not None and (axis >= len(shape) or shape[axis] not in (None, scale.size)):
        return False
    return zero_point.size in (1, scale.size)


def _remove_attributes(node: NodeProto, *names: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _set_axis(node: NodeProto, axis: int | None) -> None:
    _remove_attributes(node, "axis")
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))


# ---- the steps --------------------------------------------------------------------------------------------------


def _make_names_unique(bench: _Bench) -> Iterator[str]:
    for name, nodes in same_names(bench.proto).items():
        for node in nodes[1:]:
            if node.op_type in QDQ_OPS:
                node.name = bench.names.fresh(name)
                yield f"duplicate-names: a {node.op_type} called '{name}' is now '{node.name}'"


def _make_biases_float(bench: _Bench) -> Iterator[str]:
    removed: set[str] = set()
    for linear in bench.view.linears:
        if linear.is_q or linear.scale is None or bench.view.raw.element_type(linear.data) != TensorProto.INT32:
            continue
        values = bench.view.raw.known_value(linear.data)
        if values is None:
            continue
        bias = _dequantized(linear, values).astype(linear.scale.dtype)
        bench.proto.graph.initializer.append(numpy_helper.from_array(bias, linear.output))
        removed.add(linear.output)
        yield f"bias-int32: {linear.node.label} became the float initializer '{linear.output}'"
    _remove_nodes(bench.proto, removed)


def _make_symmetric(bench: _Bench) -> Iterator[str]:
    for pair in bench.pairs:
        if all(_is_symmetric_int8(bench.view, linear) for linear in pair.linears):
            continue
        weight = bench.weight(pair)
        said = _activation_to_int8(bench, pair) if weight is None else _weight_to_int8(bench, pair, weight)
        if said:
            yield f"zero-point: {pair.label}: {said}"


def _is_symmetric_int8(view: View, linear: Linear) -> bool:
    if view.zero_point_type(linear) != TensorProto.INT8 or linear.scale is None:
        return False
    zero_point = linear.zero_point
    return zero_point is None or (zero_point.size == linear.scale.size and not zero_point.any())


def _activation_to_int8(bench: _Bench, pair: _Pair) -> str:
    """Change an activation's pair to INT8; empty where that takes calibration."""
    first = pair.first
    zero_points = _zero_points(bench.view, first)
    if first.scale is None or not first.is_q:
        return ""
    if zero_points.dtype == np.uint8 and (zero_points == UINT8_MIDDLE).all():
        bench.rewrite(pair, first.scale, first.axis)
        return "UINT8 around 128 became INT8 around 0 with the same scale"
    if zero_points.any():
        bench.refused[pair.label] = "the range is not symmetric, so this needs calibration"
        return ""
    if zero_points.dtype == np.int8:
        bench.rewrite(pair, first.scale, first.axis)
        return "the INT8 zero point got the shape of the scale"
    if not _is_not_negative(bench.view.raw, first.data):
        bench.refused[pair.label] = "UINT8 data become INT8 at half the resolution, if they are never negative"
        return ""
    wider = first.scale.astype(np.float64) * (UINT8_LEVELS / INT8_LEVELS)
    bench.rewrite(pair, wider.astype(first.scale.dtype), first.axis)
    return "UINT8 became INT8 over the same range, at half the resolution"


def _weight_to_int8(bench: _Bench, pair: _Pair, weight: Values) -> str:
    """Change a constant's pair to symmetric INT8, with its own scale where that reaches far enough."""
    first = pair.first
    if first.scale is None or not (first.scale > 0).all():
        return ""
    steps = np.rint(weight / _along(first.scale.astype(np.float64), first.channel_axis, weight.ndim))
    fits = steps.size == 0 or (steps.min() >= INT8_LOWEST and steps.max() <= INT8_LEVELS)
    scale = first.scale if fits else _scale_for(bench, pair, _amax(weight, first.channel_axis))
    bench.rewrite(pair, scale, first.axis, _stored(pair, weight, scale, first.channel_axis))
    return f"the weight is symmetric INT8 now, with {'its old' if fits else 'a new'} scale"


def _write_missing_axes(bench: _Bench) -> Iterator[str]:
    for pair in bench.all_pairs:
        wanted, shape, scale = _wanted_axis(bench.view, pair), bench.view.raw.shape(pair.first.data), pair.first.scale
        if wanted is None or shape is None or scale is None or _is_complete(pair, wanted):
            continue
        if shape[wanted] == scale.size:
            for linear in pair.linears:
                _set_axis(linear.node.proto, wanted)
            yield f"axis-missing: {pair.label}: axis {wanted}, the output channels of its consumer"


def _turn_wrong_axes(bench: _Bench) -> Iterator[str]:
    for pair in bench.pairs:
        wanted = _wanted_axis(bench.view, pair)
        if wanted is None or pair.first.axis is None or pair.first.axis == wanted:
            continue
        weight = bench.weight(pair)
        if weight is not None and pair.first.axis + weight.ndim != wanted:
            scale = _scale_for(bench, pair, _amax(weight, wanted))
            bench.rewrite(pair, scale, wanted, _stored(pair, weight, scale, wanted))
            yield f"axis-wrong: {pair.label}: axis {wanted}, with {count(scale.size, 'scale')} from the weight"


def _is_complete(pair: _Pair, wanted: int) -> bool:
    """True where no axis is missing, or where one is stated that the consumer does not want."""
    axes = {linear.axis for linear in pair.linears}
    return None not in axes or bool(axes - {None, wanted})


def _wanted_axis(view: View, pair: _Pair) -> int | None:
    """The axis on which all readers of a per-channel weight agree; None where they do not, or ask for none."""
    first = pair.first
    shape = view.raw.shape(first.data)
    if not first.per_channel or shape is None or not view.raw.is_constant(first.data):
        return None
    for axis in range(len(shape)):
        placed = [replace(linear, axis=axis) for linear in pair.linears if not linear.is_q]
        reads = [read for linear in placed for read in view.weight_reads(linear)]
        asked = [(seen, channel_axis(view, node, slot)) for node, slot, seen in reads]
        if any(right is not None for _, right in asked) and all(right in (seen, None) for seen, right in asked):
            return axis
    return None


def _replace_bad_scales(bench: _Bench) -> Iterator[str]:
    for pair in bench.pairs:
        scale, axis = pair.first.scale, pair.first.channel_axis
        bad = _bad(scale) if scale is not None else np.zeros(())
        weight = bench.weight(pair) if bad.any() else None
        if scale is None or weight is None or (bench.is_stored(pair) and scale[bad].any()):
            continue
        fresh = _scale_for(bench, pair, np.nan_to_num(_amax(weight, axis)).reshape(scale.shape))
        mended = np.where(bad, fresh, scale)
        bench.rewrite(pair, mended, pair.first.axis, _stored(pair, weight, mended, axis))
        yield f"scale: {pair.label}: {count(int(bad.sum()), 'scale')} from the weight, 1 where that is all zero"


def _bad(scale: Values) -> Values:
    values = scale.astype(np.float64)
    lowest = SMALLEST_HALF if scale.dtype == np.float16 else 0
    return np.asarray(~np.isfinite(values) | (values <= 0) | (values < lowest))


def _unify_concats(bench: _Bench) -> Iterator[str]:
    for members in _ConcatGroups(bench).differing():
        scales = [pair.first.scale for pair in members if pair.first.scale is not None]
        largest = max(scales, key=lambda scale: float(scale.flat[0]))
        factor = float(largest.flat[0]) / min(float(scale.flat[0]) for scale in scales)
        name = bench.store(f"{members[0].first.data}_shared_scale", largest)
        for linear in (linear for pair in members for linear in pair.linears):
            linear.node.proto.input[1] = name
        others = f"{members[0].label} and {count(len(members) - 1, 'pair')} more"
        yield f"concat-scales-differ: {others} share one scale, for some {factor:.3g} times their own"


class _ConcatGroups:
    """Union-find over the symmetric pairs that meet in Concats, at inputs or output."""

    def __init__(self, bench: _Bench) -> None:
        self._parents: dict[str, str] = {}
        self._pairs = {pair.first.output: pair for pair in bench.pairs if self._can_share(bench.view, pair)}
        self._by_data: dict[str, list[str]] = {}
        for output, pair in self._pairs.items():
            self._by_data.setdefault(pair.first.data, []).append(output)
        self._wrong: list[str] = []
        for node in bench.view.graph.nodes:
            if node.op == "Concat":
                self._join(bench.view, node)

    @staticmethod
    def _can_share(view: View, pair: _Pair) -> bool:
        first = pair.first
        return first.is_q and not first.per_channel and all(_is_symmetric_int8(view, it) for it in pair.linears)

    def differing(self) -> Iterator[list[_Pair]]:
        """The pairs of each group in which a Concat reads different scales."""
        wrong = dict.fromkeys(map(self._find, self._wrong))
        members: dict[str, list[_Pair]] = {root: [] for root in wrong}
        for output, pair in self._pairs.items():
            root = self._find(output)
            if root in members:
                members[root].append(pair)
        yield from members.values()

    def _join(self, view: View, concat: Node) -> None:
        arriving = [view.arriving(concat, slot) for slot in range(len(concat.inputs))]
        inputs = [(linear.source or linear).output for linear in arriving if linear is not None]
        if not inputs or any(output not in self._pairs for output in inputs):
            return
        scales = {float(scale.flat[0]) for name in inputs if (scale := self._pairs[name].first.scale) is not None}
        if len(scales) > 1:
            self._wrong.append(inputs[0])
        root = self._find(inputs[0])
        for output in (*inputs[1:], *self._by_data.get(concat.outputs[0], ())):
            other = self._find(output)
            if other != root:
                self._parents[other] = root

    def _find(self, name: str) -> str:
        while name in self._parents:
            self._parents[name] = self._parents.get(self._parents[name], self._parents[name])
            name = self._parents[name]
        return name


def _remove_one_sided(bench: _Bench) -> Iterator[str]:
    for node, slot in one_sided(bench.view):
        linear = bench.view.pair(node.edges[slot])
        if linear is None or linear.source is None or linear.data != linear.source.output:
            continue
        producer = bench.view.raw.producer(node.first_output)
        if producer is not None:
            producer.proto.input[slot] = linear.source.data
            yield f"one-sided: {node.label} reads '{linear.source.data}' in float, as its other input"
    _remove_unread_pairs(bench)


def _remove_unread_pairs(bench: _Bench) -> None:
    """Remove the Q and DQ that had readers and have none any more."""
    for wanted in ("DequantizeLinear", "QuantizeLinear"):
        read = _names_read(bench.proto) | {value.name for value in bench.proto.graph.output}
        unread = {
            linear.output
            for linear in bench.view.linears
            if linear.node.proto.op_type == wanted and linear.output not in read
        }
        _remove_nodes(bench.proto, unread)


STEPS: tuple[Callable[[_Bench], Iterable[str]], ...] = (
    _make_names_unique,
    _make_biases_float,
    _write_missing_axes,
    _replace_bad_scales,
    _make_symmetric,
    _turn_wrong_axes,
    _remove_one_sided,
    _unify_concats,
)

# ---- numbers ----------------------------------------------------------------------------------------------------


def _zero_points(view: View, linear: Linear) -> Values:
    """The zero points in their type; without any, 0 in the type that ONNX says."""
    if linear.zero_point is not None:
        return linear.zero_point
    kind = view.zero_point_type(linear)
    return np.zeros((), np.int8 if kind == TensorProto.INT8 else np.uint8)


def _along(values: Values, axis: int | None, rank: int) -> Values:
    """A scale or zero point in a shape that broadcasts against a tensor of this rank."""
    if axis is None or values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis % rank] = -1
    return values.reshape(shape)


def _dequantized(linear: Linear, integers: Values) -> Values:
    """(integers - zero point) * scale, in double precision."""
    axis = linear.channel_axis if linear.channel_axis is None or integers.ndim > 1 else 0
    values = integers.astype(np.float64)
    if linear.zero_point is not None:
        values = values - _along(linear.zero_point.astype(np.float64), axis, integers.ndim)
    if linear.scale is None:
        return values
    return np.asarray(values * _along(linear.scale.astype(np.float64), axis, integers.ndim))


def _stored(pair: _Pair, weight: Values, scale: Values, axis: int | None) -> Values | None:
    """The integers that replace those of a weight stored as integers; None where there are none."""
    return None if pair.first.is_q else _quantized(weight, scale, axis)


def _quantized(values: Values, scale: Values, axis: int | None) -> Values:
    """values / scale, rounded half to even, as INT8."""
    steps = np.rint(values / _along(scale.astype(np.float64), axis, values.ndim))
    return np.asarray(np.clip(steps, INT8_LOWEST, INT8_LEVELS).astype(np.int8))


def _amax(values: Values, axis: int | None) -> Values:
    """The largest magnitude of a tensor, shape (), or of each of its channels, shape (channels,)."""
    if axis is None:
        return np.asarray(np.abs(values).max(initial=0))
    others = tuple(other for other in range(values.ndim) if other != axis % values.ndim)
    return np.asarray(np.abs(values).max(axis=others, initial=0))


def _scale_for(bench: _Bench, pair: _Pair, amax: Values) -> Values:
    return to_scale(amax, bench.view.raw.element_type(pair.first.scale_name) or TensorProto.FLOAT)


def _is_not_negative(raw: Graph, tensor: str) -> bool:
    """True where the ops that lead to a tensor keep it from ever being negative."""
    node = raw.producer(tensor)
    while node is not None and (node.op in POOLS or node.proto.op_type in QDQ_OPS or commutes(node, raw)):
        node = raw.producer(node.inputs[0])
    if node is None:
        return False
    return node.op in NOT_NEGATIVE or (node.op == "Clip" and _clips_at_zero(raw, node))


def _clips_at_zero(raw: Graph, clip: Node) -> bool:
    low = clip.attribute("min")
    if len(clip.inputs) > 1:
        low = raw.known_value(clip.inputs[1])
    return low is not None and bool(np.all(np.asarray(low) >= 0))


# ---- cleaning up ------------------------------------------------------------------------------------------------


def _names_read(proto: ModelProto) -> set[str]:
    return {name for node in all_nodes(proto.graph) for name in node.input}


def _remove_nodes(proto: ModelProto, outputs: set[str]) -> None:
    if not outputs:
        return
    kept = [node for node in proto.graph.node if not outputs & set(node.output)]
    copy = ModelProto()
    copy.graph.node.extend(kept)
    del proto.graph.node[:]
    proto.graph.node.extend(copy.graph.node)


def _remove_initializers(proto: ModelProto, unread: set[str]) -> None:
    """Remove initializers that the mended nodes read before."""
    unread = unread - {value.name for value in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in unread]
    if len(kept) == len(proto.graph.initializer):
        return
    copy = ModelProto()
    copy.graph.initializer.extend(kept)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(copy.graph.initializer)


def _remove_integer_hints(proto: ModelProto) -> None:
    """Remove the declared types of 8-bit tensors, some of which have changed."""
    kept = [value for value in proto.graph.value_info if value.type.tensor_type.elem_type not in INTEGER_TYPES]
    copy = ModelProto()
    copy.graph.value_info.extend(kept)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(copy.graph.value_info)
