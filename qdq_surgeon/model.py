"""Loaded ONNX models: with graph.py the only reader of raw ONNX. Files are read and written by storage.py.

`load` gives a `Model`; `Model.graph` is the view on which the rules work.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from . import weights
from .errors import ModelError, QdqError
from .existing import ExistingPair, notes_on, notes_on_left, pairs_left, parted
from .graph import (
    HALF_OPSET,
    HALF_TYPES,
    MIN_IR,
    MIN_OPSET,
    PER_TENSOR_OPSET,
    Graph,
    default_opset,
    one_line,
    skeleton,
    tensor_type,
)
from .storage import read_model, with_weights
from .storage import save as save

log = logging.getLogger("qdq_surgeon")


@runtime_checkable
class HasModelProto(Protocol):
    """Anything that carries a ModelProto, such as torch.onnx's ONNXProgram."""

    @property
    def model_proto(self) -> ModelProto: ...


Source: TypeAlias = "str | os.PathLike[str] | ModelProto | HasModelProto | Model"


@dataclass(frozen=True)
class Model:
    """A loaded model. `proto` is what gets quantized, and is never changed; `original` is what was given.

    They differ where the opset or the IR version had to be raised, and where the model came with Q/DQ pairs: then
    `proto` is the float model without them, `existing` the pairs, and `quantized` the model with them, its opset
    raised, to which pairs are added. `notes` says what a user should know about all that. `custom_ops` are libraries
    of operators, without which onnxruntime does not run the model.
    """

    proto: ModelProto
    original: ModelProto
    path: Path | None = None
    notes: tuple[str, ...] = ()
    quantized: ModelProto | None = None
    existing: tuple[ExistingPair, ...] = ()
    custom_ops: tuple[Path, ...] = ()

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.proto, deep=True)

    @cached_property
    def opset(self) -> int:
        return default_opset(self.proto)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over opsets, nodes, initializers, inputs and outputs; not over metadata or stored order."""
        whole = hashlib.sha256()
        parts = [proto.SerializeToString(deterministic=True) for proto in self.proto.opset_import]
        parts += map(_node_bytes, self.proto.graph.node)
        parts += [_tensor_digest(tensor) for tensor in self.proto.graph.initializer]
        others = (*self.proto.graph.sparse_initializer, *self.proto.functions)
        parts += [proto.SerializeToString(deterministic=True) for proto in others]
        parts += [str(pair).encode() for pair in self.existing]
        for part in sorted(parts):
            whole.update(hashlib.sha256(part).digest())
        for value in (*self.proto.graph.input, *self.proto.graph.output):
            whole.update(value.SerializeToString(deterministic=True))
        return whole.hexdigest()

    @property
    def inputs(self) -> tuple[onnx.ValueInfoProto, ...]:
        """The inputs that a caller must feed: graph inputs without an initializer of the same name."""
        initializers = {tensor.name for tensor in self.proto.graph.initializer}
        return tuple(value for value in self.proto.graph.input if value.name not in initializers)

    def existing_pair(self, tensor: str, axis: int | None, scope: tuple[str, ...]) -> ExistingPair | None:
        """The pair that came with the model and that another reader of the tensor, a node of the scope, may join."""
        pairs = self._existing_by_site.get((tensor, axis), [])
        return next((pair for pair in pairs if pair.is_seen_from(scope)), None)

    @cached_property
    def _existing_by_site(self) -> Mapping[tuple[str, int | None], list[ExistingPair]]:
        found: dict[tuple[str, int | None], list[ExistingPair]] = {}
        for pair in sorted(self.existing, key=lambda pair: not pair.is_symmetric_int8):
            if pair.is_open:
                found.setdefault((pair.tensor, pair.axis), []).append(pair)
        return found

    def without_pairs(self) -> Model:
        """The float model, as if it had never been quantized; pairs that are not understood stay, with a note."""
        if not self.quantized:
            return self
        left = pairs_left(self.proto)
        quantized = self.proto if left else None
        return replace(self, original=self.proto, quantized=quantized, existing=left, notes=tuple(notes_on_left(left)))


def load(
    source: Source,
    *,
    requantize: bool = False,
    simplify: bool = False,
    custom_ops: Iterable[str | os.PathLike[str]] = (),
) -> Model:
    """Read a model from a path, a ModelProto or anything with `.model_proto`; the source is never changed.

    The opset is raised to 13 where it is lower (19 where FP16 or BF16 tensors are present), the IR version to 4.
    Q/DQ pairs that the model comes with are kept; `requantize` takes them out. `simplify` lets onnxslim rewrite the
    graph first, and `original` stays what was given. `custom_ops` names libraries of operators for onnxruntime.
    Raises ModelError for a missing or damaged file and for what is not ONNX.
    """
    model = _load(source)
    model = model.without_pairs() if requantize else model
    model = simplified(model) if simplify else model
    libraries = tuple(map(Path, custom_ops))
    return replace(model, custom_ops=libraries) if libraries else model


def simplified(model: Model) -> Model:
    """The model with its graph rewritten by onnxslim.

    Raises QdqError where onnxslim is missing, ModelError where it refuses.
    """
    if model.quantized:
        raise ModelError("the model comes with Q/DQ pairs, which simplifying would fold: leave --simplify out")
    try:
        import onnxslim
    except ImportError:
        raise QdqError("--simplify needs onnxslim: pip install 'qdq-surgeon[simplify]'") from None
    copy = ModelProto()
    copy.CopyFrom(with_weights(model.proto))
    try:
        proto = onnxslim.slim(copy)
    except Exception as error:
        raise ModelError(f"onnxslim cannot simplify the model ({one_line(error)}): leave --simplify out") from error
    counts = f"{len(model.proto.graph.node)} to {len(proto.graph.node)}"
    return replace(model, proto=proto, notes=(*model.notes, f"onnxslim simplified the graph from {counts} nodes"))


def _load(source: Source) -> Model:
    if isinstance(source, Model):
        return source
    if isinstance(source, ModelProto):
        return _prepared(source, None)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _prepared(read_model(path), path)
    if isinstance(source, HasModelProto):
        return _prepared(source.model_proto, None)
    raise ModelError(f"a model is a path, a ModelProto or has .model_proto; this is a {type(source).__name__}")


def _prepared(proto: ModelProto, path: Path | None) -> Model:
    name = str(path) if path else "the model"
    if not proto.ir_version or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{name} holds no ONNX graph: is this an ONNX file?")
    original = proto
    proto, notes = _raised(proto, name)
    if proto.ir_version < MIN_IR:
        copied = ModelProto()
        copied.CopyFrom(proto)
        copied.ir_version = MIN_IR
        proto = copied
    floats, existing = parted(proto)
    if floats is proto:
        return Model(proto, original, path, notes)
    return Model(floats, original, path, (*notes, *notes_on(existing)), proto, existing)


def _raised(proto: ModelProto, name: str) -> tuple[ModelProto, tuple[str, ...]]:
    have = default_opset(proto)
    want = HALF_OPSET if _has_half(proto) else MIN_OPSET
    if have >= want:
        return proto, ()
    try:
        return converted_to(proto, want), (f"opset raised from {have} to {want}",)
    except Exception as error:
        reason = one_line(error)
    if have >= MIN_OPSET:
        return proto, (f"opset stays at {have}, so FP16 and BF16 tensors stay float: onnx's converter says: {reason}",)
    if have < PER_TENSOR_OPSET:
        raise ModelError(
            f"{name} has opset {have}, Q/DQ needs {want}, and onnx's converter refuses it ({reason}): "
            f"export it with opset {want} or later"
        )
    return proto, (f"opset stays at {have}, so weights get one scale per tensor: onnx's converter says: {reason}",)


def _has_half(proto: ModelProto) -> bool:
    types = {tensor.data_type for tensor in proto.graph.initializer}
    values = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    types |= {tensor_type(value)[0] or 0 for value in values}
    attributes = [item for node in proto.graph.node for item in node.attribute]
    types |= {item.i for item in attributes if item.name in ("to", "dtype")}
    types |= {item.t.data_type for item in attributes if item.name == "value"}
    return bool(types & HALF_TYPES)


def converted_to(proto: ModelProto, opset: int) -> ModelProto:
    """onnx's version converter, and what it drops put back: functions, metadata, doc strings, names."""
    from onnx import version_converter

    converted = version_converter.convert_version(skeleton(proto), opset)
    if [value.name for value in converted.graph.output] != [value.name for value in proto.graph.output]:
        raise ModelError("it renames the graph's outputs")
    result = ModelProto()
    result.CopyFrom(proto)
    result.ir_version = max(proto.ir_version, MIN_IR)
    for entry in result.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    graph = result.graph
    originals = {node.output[0]: node for node in proto.graph.node if node.output}
    del graph.node[:]
    for node in converted.graph.node:
        original = originals.get(node.output[0]) if node.output else None
        if original is not None and original.op_type == node.op_type:
            for field in ("name", "doc_string"):
                node.ClearField(field)
                if original.HasField(field):
                    setattr(node, field, getattr(original, field))
            node.metadata_props.extend(original.metadata_props)
        graph.node.append(node)
    have = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in converted.graph.initializer if tensor.name not in have)
    if proto.functions:
        onnx.checker.check_model(skeleton(result))  # a function keeps its opset, which may not go with the new one
    return result


def _node_bytes(node: NodeProto) -> bytes:
    """A node without its metadata and doc string."""
    bare = NodeProto()
    bare.CopyFrom(node)
    del bare.metadata_props[:]
    bare.ClearField("doc_string")
    return bytes(bare.SerializeToString(deterministic=True))


def _tensor_digest(tensor: TensorProto) -> bytes:
    head = f"{tensor.name}|{tensor.data_type}|{list(tensor.dims)}|".encode()
    if weights.is_outside(tensor) or tensor.HasField("raw_data"):
        whole = hashlib.sha256()
        for piece in weights.pieces(tensor):
            whole.update(piece)
        return head + whole.digest()
    return head + hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest()


def metadata(proto: ModelProto) -> Mapping[str, str]:
    """The model's metadata_props as a dict."""
    return {entry.key: entry.value for entry in proto.metadata_props}
