"""Reads and writes model files. Large weights stay in their file until they are needed, and go from file to file."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from . import weights
from .errors import ModelError
from .graph import all_nodes, bodies, one_line

LIMIT = (1 << 31) - (1 << 20)
"""A protobuf file holds less than 2 GB."""
_ALIGNED = 4096  # so that the file can be mapped


def read_model(path: Path) -> ModelProto:
    """Read a model; of external data only what is small. Raises ModelError, in one line, for whatever is wrong."""
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
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 - a link to the model keeps its own folder
    try:
        for tensor in filter(weights.is_outside, _inner_tensors(proto)):
            weights.settle(tensor, folder, keep_outside=False)
        for tensor in filter(weights.is_outside, proto.graph.initializer):
            weights.settle(tensor, folder, keep_outside=True)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return proto


def save(proto: ModelProto, path: str | os.PathLike[str], external_data: bool | None = None) -> None:
    """Write a model atomically: whole or not at all.

    `external_data` puts the weights into `<name>.data` beside it (None: where one file cannot hold the model).
    Raises ModelError where the files cannot be written, or where that would overwrite the weights of the input.
    """
    target = Path(os.path.realpath(path))
    outside = data_file(proto, target, external_data)
    if outside is None:
        write_atomically(target, _bytes(with_weights(proto), target))
        return
    with _replacing(target) as model_file, _replacing(outside) as file:
        data = _DataFile(file, outside.name)
        bare = without_weights(proto)
        bare.graph.initializer.extend(map(data.put, proto.graph.initializer))
        model_file.write(_bytes(bare, target))
        model_file.flush()
        file.flush()


def data_file(proto: ModelProto, path: Path, external_data: bool | None = None) -> Path | None:
    """The file in which `save` would put the weights of this model; None where they go into the model's own.

    Raises ModelError where that is impossible.
    """
    target = Path(os.path.realpath(path))
    too_big = total_size(proto) >= LIMIT
    sources = {weights.place(tensor).file.resolve() for tensor in filter(weights.is_outside, proto.graph.initializer)}
    outside = target.with_name(f"{target.name}.data")
    if too_big and external_data is False:
        raise ModelError(f"{path}: the model exceeds 2 GB, which one ONNX file cannot hold: allow external data")
    needs = external_data or too_big
    shown = Path(path)
    for file in (shown, shown.with_name(outside.name)) if needs else (shown,):
        if any(is_same(file, source) for source in sources):
            raise ModelError(f"{file} holds the weights of the input, which is never overwritten: name another output")
    if not needs:
        return None
    if target.exists() and not target.is_file():
        raise ModelError(f"{path} is no ordinary file, and the weights need a file beside it: name another output")
    return outside


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target` and move it into place. Raises ModelError where the folder refuses."""
    with _replacing(target) as file:
        file.write(data)
        file.flush()


def is_same(left: Path, right: Path) -> bool:
    """True for two names of one file: through links, and in whatever case where the disk does not care."""
    with contextlib.suppress(OSError):
        return left.samefile(right)
    return os.path.realpath(left) == os.path.realpath(right)


@contextlib.contextmanager
def on_disk(proto: ModelProto) -> Iterator[Path]:
    """A model as a file in a temporary folder, for a runtime to open: its weights are linked, not copied."""
    with tempfile.TemporaryDirectory(prefix="qdq_surgeon.", ignore_cleanup_errors=True) as folder:
        bare = without_weights(proto)
        with WeightFolder(Path(folder)) as beside:
            bare.graph.initializer.extend(map(beside.put, proto.graph.initializer))
        path = Path(folder, "model.onnx")
        path.write_bytes(_bytes(bare, path))
        yield path


class WeightFolder:
    """A folder in which graphs find their weights: files of weights are linked into it, what is in memory is written.

    Runtimes read external data from the folder of the graph alone. Where the disk knows no hard links, or is another
    one, the file is copied.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._links: dict[Path, str] = {}
        self._file = (folder / "weights").open("wb")
        self._written = _DataFile(self._file, "weights")

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, tensor: TensorProto) -> TensorProto:
        """The tensor for a graph in this folder."""
        if not weights.is_outside(tensor):
            return self._written.put(tensor)
        place = weights.place(tensor)
        if place.file not in self._links:
            self._links[place.file] = f"weights.{len(self._links)}"
            _link(place.file, self._folder / self._links[place.file])
        return _reference(tensor, self._links[place.file], place.offset, place.length)


def with_weights(proto: ModelProto) -> ModelProto:
    """The model with all weights in it: a copy where some lie outside."""
    if not any(map(weights.is_outside, proto.graph.initializer)):
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    for tensor in filter(weights.is_outside, copy.graph.initializer):
        weights.take_in(tensor)
    return copy


def without_weights(proto: ModelProto) -> ModelProto:
    """A copy of the model without its initializers, which are never copied on the way."""
    bare = ModelProto()
    _copy(proto, bare, but="graph")
    _copy(proto.graph, bare.graph, but="initializer")
    return bare


def total_size(proto: ModelProto) -> int:
    """The bytes of the model in one file, nearly."""
    initializers = proto.graph.initializer
    inside = without_weights(proto).ByteSize()
    return int(inside + sum(weights.size(tensor) + len(tensor.name) + 64 for tensor in initializers))


def fits_in_one_file(proto: ModelProto) -> bool:
    """True for a model that can be handed over as bytes: no weights outside, less than 2 GB."""
    return not any(map(weights.is_outside, proto.graph.initializer)) and total_size(proto) < LIMIT


class _DataFile:
    """Puts tensors one behind the other into a file."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file = file
        self._location = location

    def put(self, tensor: TensorProto) -> TensorProto:
        """Write a tensor; what refers to it. Small ones stay as they are."""
        if weights.size(tensor) <= weights.SMALL or tensor.data_type == TensorProto.STRING:
            return tensor
        self._file.write(bytes(-self._file.tell() % _ALIGNED))
        start = self._file.tell()
        for piece in weights.pieces(tensor):
            self._file.write(piece)
        return _reference(tensor, self._location, start, self._file.tell() - start)


def _reference(tensor: TensorProto, location: str, offset: int, length: int) -> TensorProto:
    """A tensor like this one whose data lie elsewhere."""
    reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.doc_string:
        reference.doc_string = tensor.doc_string
    reference.metadata_props.extend(tensor.metadata_props)
    weights.refer(reference, location, offset, length)
    return reference


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        _copy_file(source, target)


def _copy_file(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ModelError(
            f"{source} cannot be copied to {target.parent} ({error.strerror or error}), where onnxruntime reads it: "
            "set TMPDIR to a folder on the model's disk"
        ) from error


def _bytes(proto: ModelProto, path: Path) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except Exception as error:  # protobuf's own, which differ from version to version
        raise ModelError(f"{path}: without its weights the model still exceeds 2 GB: {one_line(error)}") from error


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `target` where the block ends well, and is gone where it does not."""
    target = Path(os.path.realpath(target))  # behind a link stands what is meant
    special = target.exists() and not target.is_file()  # a pipe, a terminal: nothing to replace
    written = target if special else target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with written.open("wb" if special else "xb") as file:
            yield file
        if not special:
            written.replace(target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if not special:
            written.unlink(missing_ok=True)


def _copy(source: Any, target: Any, but: str) -> None:
    """Copy all fields of a message except one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        elif hasattr(value, "MergeFrom") or hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)


def _inner_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All tensors but the graph's own initializers: those in attributes, bodies, functions, and sparse ones."""
    nodes = [node for graph in (proto.graph, *proto.functions) for node in all_nodes(graph)]
    for graph in (body for node in nodes for _, body in bodies(node)):
        yield from (*graph.initializer, *_sparse(graph))
    yield from _sparse(proto.graph)
    yield from (tensor for node in nodes for tensor in _attribute_tensors(node))


def _sparse(graph: GraphProto) -> Iterator[TensorProto]:
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _attribute_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
