"""Reads and writes model files. Large weights stay in their file until they are needed, and go from file to file."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
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
    for text in _texts(proto):
        if not isinstance(text, str):
            raise ModelError(f"{path} is not a whole ONNX file ({text!r} is no text): export or download it again")
    here = Path(os.path.abspath(path))  # noqa: PTH100 - a link to the model keeps its own folder
    try:
        for tensor in filter(weights.is_outside, _inner_tensors(proto)):
            weights.settle(tensor, here, keep_outside=False)
        for tensor in filter(weights.is_outside, proto.graph.initializer):
            weights.settle(tensor, here, keep_outside=True)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return proto


def save(proto: ModelProto, path: str | os.PathLike[str], external_data: bool | None = None) -> None:
    """Write a model atomically: whole or not at all.

    `external_data` puts the weights into `<name>.data` beside it (None: where one file cannot hold the model).
    Raises ModelError where the files cannot be written, or where that would overwrite the weights of another model.
    """
    target = Path(path)
    outside = data_file(proto, target, external_data)
    if outside is None:
        write_atomically(target, _bytes(with_weights(proto), target))
        return
    with _replacing(target, outside) as (model_file, file):
        data = _DataFile(file, outside.name)
        bare = without_weights(proto)
        bare.graph.initializer.extend(map(data.put, proto.graph.initializer))
        model_file.write(_bytes(bare, target))


def data_file(proto: ModelProto, path: Path, external_data: bool | None = None) -> Path | None:
    """The file in which `save` would put the weights of this model; None where they go into the model's own.

    Raises ModelError where that is impossible.
    """
    too_big = total_size(proto) >= LIMIT
    if too_big and external_data is False:
        raise ModelError(f"{path}: the model exceeds 2 GB, which one ONNX file cannot hold: allow external data")
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    outside = target.with_name(f"{target.name}.data") if external_data or too_big else None
    files = (target, outside) if outside else (target,)
    spare_weights(*files)
    for source in {weights.place(tensor).file for tensor in filter(weights.is_outside, proto.graph.initializer)}:
        _spare(source, files)
    if outside and target.exists() and not target.is_file():
        raise ModelError(f"{path} is no ordinary file, and the weights need a file beside it: name another output")
    return outside


def spare_weights(*files: Path) -> None:
    """Raise ModelError where one of these files holds weights of a model that was read, and that is not among them."""
    for source, models in weights.owners().items():
        if not all(any(is_same(model, file) for file in files) for model in models):
            _spare(source, files)


def _spare(source: Path, files: Sequence[Path]) -> None:
    for file in files:
        if is_same(source, file):
            raise ModelError(f"{file} holds the weights of the input, which is never overwritten: name another output")


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target` and move it into place. Raises ModelError where the folder refuses."""
    spare_weights(target)
    with _replacing(target) as (file,):
        file.write(data)


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
def _replacing(*targets: Path) -> Iterator[Sequence[BinaryIO]]:
    """Files that take the places of the targets where the block ends well, and are gone where it does not."""
    real = [Path(os.path.realpath(target)) for target in targets]  # behind a link stands what is meant
    ordinary = [target for target in real if target.is_file() or not target.exists()]  # no pipe, no terminal
    drafts = {target: target.with_name(f".{target.name}.{secrets.token_hex(4)}") for target in ordinary}
    try:
        with contextlib.ExitStack() as opened:
            files = [
                opened.enter_context(drafts[target].open("xb") if target in drafts else target.open("wb"))
                for target in real
            ]
            yield files
            for file in files:
                file.flush()
            for file in files if drafts else ():
                os.fsync(file.fileno())
        with _signals_held():
            _move(drafts)
    except OSError as error:
        raise ModelError(f"{targets[0]} cannot be written: {error.strerror or error}") from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _move(drafts: dict[Path, Path]) -> None:
    """Put drafts in the places of their targets, the first one last: what it refers to is there before it.

    Raises ModelError where another run has put its own there meanwhile.
    """
    ours = {target: draft.stat() for target, draft in drafts.items()}
    for target, draft in reversed(drafts.items()):
        draft.replace(target)
    for target in list(drafts)[1:]:
        if not os.path.samestat(target.stat(), ours[target]):
            raise ModelError(f"another run wrote {target} at the same time, now perhaps beside our model: run it again")


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # no other thread answers signals
        yield
        return
    came: list[int] = []
    held = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


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


def _texts(message: Any) -> Iterator[str | bytes]:
    """Names and other texts of a message; what is no UTF-8 comes as bytes. The data of tensors are not touched."""
    if isinstance(message, TensorProto):
        yield from (message.name, *(entry.value for entry in message.external_data))
        return
    for field, value in message.ListFields():
        items = value if hasattr(value, "append") else (value,)
        if field.type == field.TYPE_STRING:
            yield from items
        elif field.type == field.TYPE_MESSAGE:
            for item in items:
                yield from _texts(item)


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
