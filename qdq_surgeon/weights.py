"""Where a tensor's data lie: in the model itself, or in a file beside it that is read when asked for.

A tensor outside has `location`, `offset` and `length` as in its file, and as `basepath` the folder of the model that it
was read from, so that it can be read wherever its ModelProto goes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .errors import ModelError

SMALL = 4096
"""Tensors of no more bytes lie in the model: shapes, axes and the like are needed at once."""
PIECE = 16 << 20
"""How much of a file is in memory while it is read through."""
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_NATIVE = frozenset("biufc")  # what NumPy itself can map

_folders: set[Path] = set()
"""The folders of the models read so far: a model made up in memory may not point anywhere else."""
_owners: dict[Path, set[Path]] = {}


@dataclass(frozen=True)
class Place:
    """Some bytes of a file."""

    file: Path
    offset: int
    length: int


def is_outside(tensor: TensorProto) -> bool:
    """True where the data lie in a file of their own."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def size(tensor: TensorProto) -> int:
    """The bytes that the tensor's dimensions ask for, wherever they lie."""
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    try:
        kind = TensorProto.DataType.Name(tensor.data_type)
        bits = _BITS.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):
        raise ModelError(f"the tensor '{tensor.name}' has no element type that this onnx knows") from None
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"the tensor '{tensor.name}' has a negative dimension: {list(tensor.dims)}")
    return int(math.prod(tensor.dims) * bits + 7) // 8


def place(tensor: TensorProto) -> Place:
    """Where the data of a tensor outside lie. Raises ModelError for a model that was not read from a file."""
    entries = _entries(tensor)
    folder = Path(entries.get("basepath", ""))
    if folder not in _folders:
        raise ModelError(
            f"the values of '{tensor.name}' cannot be read: load the model with its external data, or give its path"
        )
    return _checked(tensor, entries, folder)


def owners() -> Mapping[Path, set[Path]]:
    """The files of weights that were read so far, each with the models that they belong to."""
    return _owners


def settle(tensor: TensorProto, model: Path, keep_outside: bool) -> None:
    """Let a tensor of a model that was just read know its folder; read it where it is small or must lie in the model.

    Raises ModelError where its file is missing or outside the folder, or its bytes are not all in the file.
    """
    folder = model.parent
    found = _checked(tensor, _entries(tensor), folder)
    _folders.add(folder)
    _owners.setdefault(found.file, set()).add(model)
    location = found.file.relative_to(folder).as_posix()
    refer(tensor, location, found.offset, found.length, folder)
    if found.length <= SMALL or not keep_outside:
        take_in(tensor)


def refer(tensor: TensorProto, location: str, offset: int, length: int, folder: Path | None = None) -> None:
    """Make a tensor refer to bytes of a file; `folder` is for tensors in memory alone."""
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    for key, value in (entries | ({"basepath": str(folder)} if folder else {})).items():
        tensor.external_data.add(key=key, value=value)


def take_in(tensor: TensorProto) -> None:
    """Read the data of a tensor outside into it."""
    tensor.raw_data = b"".join(pieces(tensor))
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def array(tensor: TensorProto) -> NDArray[Any]:
    """The values, read-only; those outside are mapped, not read."""
    if not is_outside(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if dtype.kind not in _NATIVE or TensorProto.DataType.Name(tensor.data_type) in _BITS:
        inside = TensorProto()
        inside.CopyFrom(tensor)
        take_in(inside)
        return np.asarray(numpy_helper.to_array(inside))
    found = place(tensor)
    try:
        return np.asarray(np.memmap(found.file, dtype.newbyteorder("<"), "r", found.offset, tuple(tensor.dims)))
    except (OSError, ValueError) as error:
        raise ModelError(f"{found.file} cannot be read: {error}") from error


def pieces(tensor: TensorProto) -> Iterator[bytes]:
    """The data as raw bytes, little-endian; a file is read in pieces."""
    if tensor.HasField("raw_data") and not is_outside(tensor):
        yield tensor.raw_data
        return
    if not is_outside(tensor):
        try:
            yield numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        except ValueError as error:
            raise ModelError(f"the values of '{tensor.name}' cannot be read: {error}") from error
        return
    found = place(tensor)
    try:
        with found.file.open("rb") as file:
            file.seek(found.offset)
            for start in range(0, found.length, PIECE):
                yield file.read(min(PIECE, found.length - start))
    except OSError as error:
        raise ModelError(f"{found.file} cannot be read: {error.strerror or error}") from error


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _checked(tensor: TensorProto, entries: dict[str, str], folder: Path) -> Place:
    """The place that the entries name, if it is in the folder and holds what the dimensions ask for."""
    location = entries.get("location", "")
    what = f"its external data '{location}' (tensor '{tensor.name}')"
    if not location or _leaves(location):
        raise ModelError(f"{what} lie outside the model's folder, where nothing is read")
    file = folder / location
    try:
        available = _size_of(file, folder, what)
    except FileNotFoundError:
        raise ModelError(f"its external data is missing: {file} (tensor '{tensor.name}')") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{what} cannot be read: {getattr(error, 'strerror', '') or error}") from error
    needed = size(tensor)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        raise ModelError(f"{what} have an offset or a length that is no number") from None
    if length != needed:
        raise ModelError(f"{what} have {length} bytes, but its dimensions {list(tensor.dims)} ask for {needed}")
    if offset < 0 or offset + length > available:
        raise ModelError(f"{what} should be {length} bytes from byte {offset} on, but the file has {available}")
    return Place(file, offset, length)


def _size_of(file: Path, folder: Path, what: str) -> int:
    """The bytes of a file in the folder. Raises ModelError for what is no file, or leads out of the folder."""
    if not Path(os.path.realpath(file, strict=True)).is_relative_to(os.path.realpath(folder)):
        raise ModelError(
            f"{what} lead out of the model's folder through a link: put the file itself there "
            f"(cp -rL {folder} COPY makes a folder without links, as a Hugging Face cache needs)"
        )
    if not file.is_file():
        raise ModelError(f"{what} are no file")
    return file.stat().st_size


def _leaves(location: str) -> bool:
    """True for a path that is absolute or climbs, in the eyes of any system."""
    return any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(location), PureWindowsPath(location))
    )
