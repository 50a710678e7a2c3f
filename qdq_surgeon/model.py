"""Load and save ONNX models: with graph.py the only reader of raw ONNX.

`load` gives a `Model`; `Model.graph` is the view on which the rules work.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from .errors import ModelError
from .graph import (
    HALF_OPSET,
    HALF_TYPES,
    MIN_IR,
    MIN_OPSET,
    PER_TENSOR_OPSET,
    QDQ_OPS,
    Graph,
    all_nodes,
    bodies,
    default_opset,
    one_line,
    tensor_type,
)

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

    They differ where the opset or the IR version had to be raised. `notes` says what a user should know about that.
    """

    proto: ModelProto
    original: ModelProto
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.proto, self.path.parent if self.path else None, deep=True)

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


def load(source: Source) -> Model:
    """Read a model from a path, a ModelProto or anything with `.model_proto`; the source is never changed.

    The opset is raised to 13 where it is lower (19 where FP16 or BF16 tensors are present), the IR version to 4.
    Raises ModelError for a missing or damaged file and for what is not ONNX.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, ModelProto):
        return _prepared(source, None)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _prepared(_read_file(path), path)
    if isinstance(source, HasModelProto):
        return _prepared(source.model_proto, None)
    raise ModelError(f"a model is a path, a ModelProto or has .model_proto; this is a {type(source).__name__}")


def save(proto: ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model atomically: the file is either whole or not there. Raises ModelError where it cannot be."""
    target = Path(path)
    if proto.ByteSize() >= 2**31:
        raise ModelError(f"{target}: the result exceeds 2 GB, which one ONNX file cannot hold")
    write_atomically(target, proto.SerializeToString(deterministic=True))


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target` and move it into place. Raises ModelError where the folder refuses."""
    target = Path(os.path.realpath(target))  # behind a link stands what is meant
    temporary = ""
    try:
        if target.exists() and not target.is_file():  # a pipe, a terminal: nothing to replace
            target.write_bytes(data)
            return
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _read_file(path: Path) -> ModelProto:
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.is_dir():
        raise ModelError(f"{path} is a folder: give the .onnx file in it")
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise ModelError(f"{path} is not a whole ONNX file ({one_line(error)}): export or download it again") from error
    try:
        onnx.load_external_data_for_model(proto, str(path.parent))
    except Exception as error:
        raise ModelError(f"{path}: its external data is missing: {one_line(error)}") from error
    return proto


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
    return Model(proto, original, path, notes)


def _raised(proto: ModelProto, name: str) -> tuple[ModelProto, tuple[str, ...]]:
    have = default_opset(proto)
    want = HALF_OPSET if _has_half(proto) else MIN_OPSET
    if have >= want or any(node.op_type in QDQ_OPS for node in proto.graph.node):
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

    converted = version_converter.convert_version(proto, opset)
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
        onnx.checker.check_model(result)  # a function keeps its opset, which may not go with the new one
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
    if tensor.raw_data:
        return head + hashlib.sha256(tensor.raw_data).digest()
    return head + hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest()


class FreshNames:
    """Gives names that are free in the whole model, control-flow bodies included."""

    def __init__(self, proto: ModelProto) -> None:
        nodes = list(all_nodes(proto.graph))
        graphs = [proto.graph, *(body for node in nodes for _, body in bodies(node))]
        self._taken = {
            value.name
            for graph in graphs
            for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        }
        self._taken.update(*((node.name, *node.input, *node.output) for node in nodes))

    def fresh(self, wanted: str) -> str:
        """`wanted`, with a number behind it where it is taken; it is taken from now on."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def metadata(proto: ModelProto) -> Mapping[str, str]:
    """The model's metadata_props as a dict."""
    return {entry.key: entry.value for entry in proto.metadata_props}
