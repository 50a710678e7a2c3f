"""FP16 around the INT8 pairs: a Q/DQ model whose un-quantized rest, and whose scales, are in half precision.

onnxruntime's converter turns every FP32 tensor of a copy into FP16. What must stay FP32 is then put back: the nodes
that FP16 cannot hold or that know no FP16, and the graph's own inputs and outputs. A pair needs no Cast: Q reads
its tensor's type and DQ writes its readers' type, each with the same scale in that type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .edges import LEVELS
from .errors import ModelError
from .graph import DATA_FREE_OPS, HALF_OPSET, QDQ_OPS, FreshNames, Graph, bodies, default_opset, one_line
from .model import converted_to
from .rules.commuting import MOVES
from .scales import SMALLEST_NORMAL, to_scale
from .storage import with_weights

LARGEST = float(np.finfo(np.float16).max)
"""65504: what lies above it is infinite in FP16."""

FULL, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
SUFFIX: dict[int, str] = {FULL: "fp32", HALF: "fp16"}

ANY_TYPE_OPS = DATA_FREE_OPS | {"Cast"}
"""Ops that read FP32 and FP16 alike, so that a Cast before them would be for nothing."""
TYPED_BY_ATTRIBUTE = frozenset({"BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix"})
"""Their `output_datatype` is unknown to the converter."""
PASSES_LARGE = MOVES | {"Add", "Concat", "Max", "Mean", "Min", "Mul", "Neg", "Pad", "Relu", "Sub", "Sum", "Where"}
"""Ops whose output may be as large as their inputs: where its range is not known, it counts as too large as well."""


@dataclass(frozen=True)
class Halved:
    """What `to_float16` returns. `kept` says, one line each, what stayed FP32 and why.

    `raised` names the activations whose scale FP16 cannot hold, so that it was raised to FP16's smallest normal
    number: they keep fewer than 127 levels, and their neighbours lie below FP16's precision too.
    """

    model: ModelProto
    kept: tuple[str, ...]
    raised: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(("in FP16, except for" if self.kept else "in FP16", *(f"  {line}" for line in self.kept)))


def to_float16(model: ModelProto, *, float16_io: bool = False, ranges: Mapping[str, float] | None = None) -> Halved:
    """A copy of a Q/DQ model in which everything that may be FP16 is FP16, the Q/DQ scales included.

    The opset is raised to 19 where it is lower. Graph inputs and outputs stay FP32; `float16_io` makes them FP16.
    `ranges` maps tensors to the largest |x| that calibration saw: nodes that read or write what exceeds 65504 stay
    FP32, as do those at constants or pairs that exceed it.
    Raises ModelError where the opset cannot be raised, or where the type of a tensor is not known.
    """
    source = _spelled_out(_raised(model))
    types = _Types(source)
    half = _all_half(source)
    top = _Scope(half.graph, source.graph, types, FreshNames(source))
    kept = _decide(top, types, ranges or {})
    io = HALF if float16_io else FULL
    wide = {value.name: FULL if value.name in types.large else io for value in source.graph.input}
    top.restore(wide, {value.name: FULL if value.name in types.large else io for value in source.graph.output})
    if float16_io:
        ports = [*source.graph.input, *source.graph.output]
        kept += [f"graph tensor {port.name}: {types.large[port.name]}" for port in ports if port.name in types.large]
    _check(half, source)
    return Halved(half, tuple(kept), tuple(_raised_scales(source)))


def _raised(model: ModelProto) -> ModelProto:
    have = default_opset(model)
    copy = ModelProto()
    copy.CopyFrom(with_weights(model))
    if have >= HALF_OPSET:
        return copy
    try:
        return converted_to(copy, HALF_OPSET)
    except Exception as error:
        raise ModelError(
            f"FP16 scales need opset {HALF_OPSET}, the model has {have}, and onnx's converter refuses to raise it "
            f"({one_line(error)}): export it with opset {HALF_OPSET} or later"
        ) from error


def _spelled_out(model: ModelProto) -> ModelProto:
    """Write as tensors what the converter would overlook: float attributes of constants, and a default value."""
    for node in (node for graph in _graphs(model.graph) for node in graph.node):
        if node.op_type == "Constant" and node.attribute[0].name in ("value_float", "value_floats"):
            value = np.asarray(helper.get_attribute_value(node.attribute[0]), np.float32)
            node.attribute[0].CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))
        elif node.op_type == "ConstantOfShape" and not node.attribute:
            zero = numpy_helper.from_array(np.zeros(1, np.float32))
            node.attribute.append(helper.make_attribute("value", zero))
    return model


def _converter() -> Any:
    # Importing onnxruntime.transformers appends its folder to sys.path, which its other modules rely on.
    from onnxruntime.transformers import float16

    return float16


def _all_half(source: ModelProto) -> ModelProto:
    """A copy in which every FP32 tensor is FP16: same nodes, same names, same order."""
    converter = _converter()
    copy = ModelProto()
    copy.CopyFrom(source)
    try:
        half: ModelProto = converter.convert_float_to_float16(
            copy,
            disable_shape_infer=True,
            op_block_list=[],
            force_fp16_initializers=True,
            force_fp16_inputs=converter.ALWAYS_FLOAT_INPUTS,
        )
    except Exception as error:
        raise ModelError(f"onnxruntime's converter cannot turn the model into FP16: {one_line(error)}") from error
    return half


def _check(half: ModelProto, source: ModelProto) -> None:
    """Refuse to hand out an invalid model, unless it was given to us as one."""
    try:
        onnx.checker.check_model(half, full_check=True)
    except Exception as error:
        try:
            onnx.checker.check_model(source, full_check=True)
        except Exception:
            return
        raise ModelError(f"the model cannot be turned into FP16: {one_line(error)}") from error


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for _, body in bodies(node):
            yield from _graphs(body)


def half_scale(scale: NDArray[Any]) -> NDArray[Any]:
    """A scale in FP16: rounded up, and never below the smallest normal number."""
    return to_scale(np.minimum(scale, LARGEST).astype(np.float64) * LEVELS, HALF)


def _raised_scales(source: ModelProto) -> Iterator[str]:
    """What loses levels because its scale had to be raised. Raises ModelError where stored integers would change."""
    constants = {tensor.name: tensor for tensor in source.graph.initializer}
    for node in source.graph.node:
        if node.op_type not in QDQ_OPS or node.input[1] not in constants:
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        low = int(np.sum((scale > 0) & (scale < SMALLEST_NORMAL[HALF])))
        if low and node.op_type == "QuantizeLinear":
            of_scales = f" for {low} of {scale.size} channels" if scale.ndim else ""
            yield f"{node.input[0]}: scale {float(scale.min()):.3g} raised to {SMALLEST_NORMAL[HALF]:.3g}{of_scales}"
        elif low and node.input[0] in constants:
            raise ModelError(
                f"the stored INT8 weight '{node.input[0]}' has scales below {SMALLEST_NORMAL[HALF]:.3g}, which FP16 "
                "cannot hold: quantize the float model again"
            )


def _tensor(value: NDArray[Any], like: TensorProto) -> TensorProto:
    tensor = numpy_helper.from_array(value, like.name)
    tensor.doc_string = like.doc_string
    return tensor


# ---- what is known of the model ----------------------------------------------------------------------------


class _Types:
    """Which tensors were FP32, in control-flow bodies too, and which of them FP16 cannot hold, with the reason."""

    def __init__(self, source: ModelProto) -> None:
        self.opsets = {_domain(entry.domain): entry.version for entry in source.opset_import}
        self.floats: set[str] = set()
        self.known: set[str] = set()
        self.large: dict[str, str] = {}
        view = Graph(source)
        for node in view.nodes:
            for name in (*node.inputs, *node.outputs):
                self._add(name, view.element_type(name) or 0)
        graphs = list(_graphs(source.graph))
        if len(graphs) > 1:
            graphs += _graphs(onnx.shape_inference.infer_shapes(source).graph)
        for graph in graphs:
            for value in (*graph.input, *graph.output, *graph.value_info):
                self._add(value.name, value.type.tensor_type.elem_type)
            for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
                self._add(tensor.name, tensor.data_type)

    def _add(self, name: str, element: int) -> None:
        if element:
            self.known.add(name)
        if element == FULL:
            self.floats.add(name)

    def schema(self, node: NodeProto) -> Any:
        """The operator's schema, None where onnx does not know the operator."""
        domain = _domain(node.domain)
        try:
            return onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return None


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


class _Op:
    """One node: as it is `now`, in FP16, and as it was `before`. `full` puts it back to FP32."""

    def __init__(self, now: NodeProto, before: NodeProto, schema: Any) -> None:
        self.now, self.before, self.schema = now, before, schema
        self.full = False
        self.on_weight = False  # a Q that reads an initializer
        self.kind: str = before.op_type
        self.inputs: tuple[str, ...] = tuple(before.input)
        self.outputs: tuple[str, ...] = tuple(before.output)

    @property
    def label(self) -> str:
        return f"{self.kind} {self.before.name or next(filter(None, self.outputs), '')}"

    def takes_half(self, slot: int) -> bool:
        """False where the schema leaves FP16 out, as for the scales of a Resize."""
        return self.schema is None or _allows_half(self.schema.inputs, slot)

    def writes_half(self, index: int) -> bool:
        return self.schema is None or _allows_half(self.schema.outputs, index)


def _allows_half(declared: Sequence[Any], index: int) -> bool:
    return not declared or "tensor(float16)" in declared[min(index, len(declared) - 1)].types


# ---- what stays FP32 ---------------------------------------------------------------------------------------


def _decide(top: _Scope, types: _Types, ranges: Mapping[str, float]) -> list[str]:
    """Mark the nodes that must stay FP32, producers first; one line for each."""
    known = _known_ranges(top, types, ranges)
    types.large.update(
        (name, f"'{name}' reaches {reach:.3g}, above FP16's {LARGEST:.0f}")
        for name, reach in known.items()
        if reach > LARGEST and name in types.floats
    )
    blocked = frozenset(_converter().DEFAULT_OP_BLOCK_LIST) | TYPED_BY_ATTRIBUTE
    sizes = _sizes(top)
    kept = []
    for op in top.all_ops():
        _check_known(op, types)
        reason = _reason(op, types, sizes, blocked)
        if not reason:
            continue
        op.full = True
        kept.append(f"{op.label}: {reason}")
        if op.kind in PASSES_LARGE and any(name in types.large for name in op.inputs):
            passed = next(types.large[name] for name in op.inputs if name in types.large)
            unknown = [name for name in op.outputs if name in types.floats and name not in known]
            types.large.update(dict.fromkeys(unknown, passed))
    return kept


def _reason(op: _Op, types: _Types, sizes: set[str], blocked: frozenset[str]) -> str:
    """Why a node stays FP32; nothing for one that does not, and for pairs and constants, which follow their readers."""
    floats = [name for name in (*op.inputs, *op.outputs) if name in types.floats]
    if not floats or op.kind in QDQ_OPS or op.kind == "Constant" or op.kind in DATA_FREE_OPS or bodies(op.before):
        return ""
    if op.schema is None:
        return "onnx does not know this operator, nor whether it takes FP16"
    if op.kind in blocked:
        return "onnxruntime's converter keeps this operator FP32"
    written = [op.writes_half(index) for index, name in enumerate(op.outputs) if name in types.floats]
    if not (all(written) and (not op.inputs or op.inputs[0] not in types.floats or op.takes_half(0))):
        return "this operator takes no FP16"
    if sizes.issuperset(op.outputs):
        return "it computes with tensor sizes, which FP16 holds exactly only up to 2048"
    return next((types.large[name] for name in floats if name in types.large), "")


def _check_known(op: _Op, types: _Types) -> None:
    if op.schema is None and not types.known.issuperset(filter(None, op.outputs)):
        raise ModelError(
            f"{op.label}: onnx does not know this operator, and the type of its output is not declared: "
            "declare it in the graph's value_info"
        )


def _known_ranges(top: _Scope, types: _Types, ranges: Mapping[str, float]) -> dict[str, float]:
    """The largest |x| of tensors: as given, of constants, and of what Q and DQ saturate at."""
    known = dict(ranges)
    values = {tensor.name: tensor for scope in top.scopes() for tensor in scope.before.initializer}
    constants = [(op.outputs[0], op.before.attribute[0]) for op in top.all_ops() if op.kind == "Constant"]
    values |= {name: attribute.t for name, attribute in constants if attribute.name == "value"}
    arrays = {name: numpy_helper.to_array(values[name]) for name in values.keys() & types.floats}
    for name, array in arrays.items():
        known[name] = float(np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=0))
    for op in top.all_ops():
        if op.kind in QDQ_OPS and op.inputs[1] in arrays:
            name = op.inputs[0] if op.kind == "QuantizeLinear" else op.outputs[0]
            known[name] = max(known.get(name, 0.0), LEVELS * known[op.inputs[1]])
    return known


def _sizes(top: _Scope) -> set[str]:
    """The tensors computed from the sizes of other tensors, and constants, alone."""
    sizes: set[str] = set()
    constant = {tensor.name for scope in top.scopes() for tensor in scope.before.initializer}
    for op in top.all_ops():
        inputs = [name for name in op.inputs if name]
        if op.kind == "Constant":
            constant.update(op.outputs)
        elif op.kind in DATA_FREE_OPS:
            sizes.update(op.outputs)
        elif op.kind not in ("ConstantOfShape", "Expand", "Tile") and any(name in sizes for name in inputs):
            sizes.update(op.outputs if all(name in sizes or name in constant for name in inputs) else ())
    return sizes


# ---- putting FP32 back -------------------------------------------------------------------------------------


Readers: TypeAlias = Mapping[str, list[tuple[_Op, int]]]


def _ports(values: Iterable[onnx.ValueInfoProto]) -> dict[str, int]:
    return {value.name: HALF for value in values}


class _Scope:
    """One graph, as it is `now`, in FP16, and as it was `before`, with the scopes of its control-flow bodies."""

    def __init__(
        self, now: GraphProto, before: GraphProto, types: _Types, names: FreshNames, full: set[str] | None = None
    ) -> None:
        self.now, self.before = now, before
        self._types, self._names = types, names
        self._full: set[str] = set() if full is None else full  # the tensors that are FP32 by now, in all scopes
        self._behind: dict[str, list[NodeProto]] = defaultdict(list)  # new nodes, by the tensor they stand behind
        self._ops: list[_Op] = []
        self._inner: list[_Scope] = []
        for changed, original in zip(now.node, before.node, strict=True):
            self._ops.append(_Op(changed, original, types.schema(original)))
            for (_, body), (_, body_before) in zip(bodies(changed), bodies(original), strict=True):
                self._inner.append(_Scope(body, body_before, types, names, self._full))

    def scopes(self) -> Iterator[_Scope]:
        yield self
        for inner in self._inner:
            yield from inner.scopes()

    def all_ops(self) -> Iterator[_Op]:
        for scope in self.scopes():
            yield from scope._ops

    def restore(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
        """Give every tensor of this graph and its bodies its type; `inputs` and `outputs` say those at the border.

        A tensor that is read in both types is cast once, behind the node that makes it. Pairs and constants need no
        Cast: they take the type of their readers, and stand twice where these differ.
        """
        readers = self._readers()
        sparse = [tensor.values.name for tensor in self.before.sparse_initializer]
        weights = {tensor.name for tensor in self.before.initializer}
        fed = {**dict.fromkeys(sparse, FULL), **{name: inputs[name] for name in inputs if name not in weights}}
        self._full.update(name for name, element in fed.items() if element == FULL and name in self._types.floats)
        for op in list(self._ops):
            if op.kind in ("DequantizeLinear", "Constant") and op.outputs[0] in self._types.floats:
                self._follow_readers(op, readers, outputs)
        self._restore_nodes()
        self._type_quantizers(readers, weights)
        for changed, original in zip(list(self.now.initializer), self.before.initializer, strict=True):
            if original.name in self._types.floats:
                self._restore_initializer(changed, original, readers, outputs)
        for name in [*fed, *(name for op in self._ops for name in op.outputs)]:
            if name in self._types.floats:
                self._settle(name, readers, outputs)
        self._declare(outputs)
        for inner in self._inner:
            inner.restore(_ports(inner.before.input), _ports(inner.before.output))
        self._place()

    def _readers(self) -> dict[str, list[tuple[_Op, int]]]:
        readers = defaultdict(list)
        for op in self.all_ops():
            for slot, name in enumerate(op.inputs):
                readers[name].append((op, slot))
        return readers

    def _wanted(self, op: _Op, slot: int) -> int | None:
        """The type in which a node reads a tensor that was FP32; None where it reads any."""
        if op.kind in ANY_TYPE_OPS or (op.kind == "QuantizeLinear" and slot == 0 and not op.on_weight):
            return None
        return FULL if op.full or not op.takes_half(slot) else HALF

    def _wants(self, name: str, readers: Readers, outputs: Mapping[str, int]) -> set[int | None]:
        wants = {self._wanted(op, slot) for op, slot in readers[name]} | {outputs.get(name)}
        return wants - {None}

    def _follow_readers(self, op: _Op, readers: Readers, outputs: Mapping[str, int]) -> None:
        name = op.outputs[0]
        wants = self._wants(name, readers, outputs)
        op.full = FULL in wants
        if wants != {FULL, HALF}:
            return
        twin = self._names.fresh(f"{name}_{SUFFIX[HALF]}")
        copy = NodeProto()
        copy.CopyFrom(op.now)
        copy.name = self._names.fresh(f"{op.before.name or name}_{SUFFIX[HALF]}")
        copy.output[0] = twin
        self._behind[name].append(copy)
        twin_op = _Op(copy, copy, op.schema)
        for slot, read in enumerate(twin_op.inputs):
            readers[read].append((twin_op, slot))
        self._rewire(name, twin, HALF, readers)

    def _restore_nodes(self) -> None:
        for op in self._ops:
            if op.full:
                del op.now.attribute[:]
                op.now.attribute.extend(op.before.attribute)
            written = [name for index, name in enumerate(op.outputs) if op.full or not op.writes_half(index)]
            self._full.update(name for name in written if name in self._types.floats)

    def _type_quantizers(self, readers: Readers, weights: set[str]) -> None:
        """Q reads the type that its tensor has; that of a weight is the type that DQ writes."""
        for op in self._ops:
            if op.kind != "QuantizeLinear":
                continue
            op.on_weight = op.inputs[0] in weights
            if op.on_weight:
                op.full = all(reader.full for reader, slot in readers[op.outputs[0]] if slot == 0)
            else:
                op.full = op.now.input[0] in self._full

    def _restore_initializer(
        self, changed: TensorProto, original: TensorProto, readers: Readers, outputs: Mapping[str, int]
    ) -> None:
        name = original.name
        wants = self._wants(name, readers, outputs)
        if any(op.kind in QDQ_OPS and slot == 1 for op, slot in readers[name]):
            scale = half_scale(numpy_helper.to_array(original))
            changed.CopyFrom(_tensor(scale, original))
            if wants == {FULL, HALF}:
                original = _tensor(scale.astype(np.float32), original)
        if FULL not in wants:
            return
        self._full.add(name)
        if HALF in wants:
            twin = self.now.initializer.add()
            twin.CopyFrom(changed)
            twin.name = self._names.fresh(f"{name}_{SUFFIX[HALF]}")
            self._rewire(name, twin.name, HALF, readers)
        changed.CopyFrom(original)

    def _settle(self, name: str, readers: Readers, outputs: Mapping[str, int]) -> None:
        """Cast a tensor for those who read it in the other type, and for the border."""
        have = FULL if name in self._full else HALF
        other = HALF if have == FULL else FULL
        produced = next((op for op in self._ops if name in op.outputs), None) if outputs.get(name) == other else None
        if produced is not None:
            inside = self._names.fresh(f"{name}_{SUFFIX[have]}")
            produced.now.output[produced.outputs.index(name)] = inside
            for wanted in (have, None):
                self._rewire(name, inside, wanted, readers)
            self._cast(name, inside, name, other)
            self._full.difference_update({name} if have == FULL else ())
            self._full.add(inside if have == FULL else name)
        elif any(self._wanted(op, slot) == other and op.now.input[slot] == name for op, slot in readers[name]):
            cast = self._names.fresh(f"{name}_{SUFFIX[other]}")
            self._rewire(name, cast, other, readers)
            self._cast(name, name, cast, other)

    def _cast(self, behind: str, read: str, written: str, to: int) -> None:
        name = self._names.fresh(f"{behind}_Cast_{SUFFIX[to]}")
        self._behind[behind].append(helper.make_node("Cast", [read], [written], name=name, to=to))

    def _rewire(self, name: str, new: str, wanted: int | None, readers: Readers) -> None:
        for op, slot in readers[name]:
            if self._wanted(op, slot) == wanted and op.now.input[slot] == name:
                op.now.input[slot] = new

    def _declare(self, outputs: Mapping[str, int]) -> None:
        """The declared types: value_info, inputs and outputs."""
        for value in (*self.now.input, *self.now.output, *self.now.value_info):
            if value.name in self._types.floats:
                value.type.tensor_type.elem_type = FULL if value.name in self._full else HALF

    def _place(self) -> None:
        """Put the new nodes behind those whose tensor they read; those on inputs go to the front."""
        made = {name for op in self._ops for name in op.outputs}
        placed = GraphProto()
        for name, nodes in self._behind.items():
            placed.node.extend(nodes if name not in made else ())
        for op in self._ops:
            placed.node.append(op.now)
            for name in op.outputs:
                placed.node.extend(self._behind.get(name, ()))
        del self.now.node[:]
        self.now.node.MergeFrom(placed.node)
