"""The arrays in .npz and .npy files: their headers are read at once, their rows when their turn comes.

Memory holds the batch in hand only, however large the file: arrays are read in step, each through a file of its own.
An array stored in Fortran order has no rows to read one after another, so it is read whole.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ..errors import DataError
from .batches import Input, check_names, only_input
from .cutting import InMemory, Rows

SUFFIXES = (".npz", ".npy")


def open_arrays(path: Path, inputs: tuple[Input, ...]) -> dict[str, Rows]:
    """The arrays of the inputs in a file, {input name: rows}; one array alone serves a model with one input.

    Raises DataError for a file that is broken, ends early, lacks an input, or holds Python objects for one.
    """
    with _readable(path), path.open("rb") as file:
        if file.read(2) == b"PK":
            return _open_archive(path, inputs)
        file.seek(0)
        return {only_input(inputs, str(path)).name: _Stored(path, *_layout(file, path.stat().st_size))}


def _open_archive(path: Path, inputs: tuple[Input, ...]) -> dict[str, Rows]:
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if list(members) == ["arr_0"] and len(inputs) == 1:
            members = {inputs[0].name: members["arr_0"]}
        check_names(members, inputs, str(path))
        return {declared.name: _open_member(path, archive, members[declared.name]) for declared in inputs}


def _open_member(path: Path, archive: zipfile.ZipFile, name: str) -> Rows:
    with archive.open(name) as file:
        return _Stored(path, *_layout(file, archive.getinfo(name).file_size), name)


@dataclass(frozen=True)
class _Stored:
    """The array of an .npy, or one of an .npz, of which only the rows in hand are in memory.

    An .npy is read rather than mapped: mapped pages count as the process's memory as long as it lives.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    name: str | None = None

    def pieces(self, size: int) -> Iterator[NDArray[Any]]:
        with _readable(self.path), self._opened() as file:
            _, by_column, _ = _header(file)
            if by_column:
                file.seek(0)
                yield from InMemory(npy_format.read_array(file, allow_pickle=False)).pieces(size)
                return
            rows = self.shape[0] if self.shape else 1
            for start in range(0, rows, size):
                stop = min(start + size, rows)
                yield self._read(file, stop - start, last=stop == rows)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self.name is None:
            with self.path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(self.name) as member:
            yield member

    def _read(self, file: IO[bytes], rows: int, last: bool) -> NDArray[Any]:
        shape = (rows, *self.shape[1:]) if self.shape else ()
        wanted = math.prod(shape) * self.dtype.itemsize
        content = file.read(wanted)
        if len(content) < wanted:
            raise EOFError(f"'{self.name}' ends early")
        if last:
            file.read(1)  # at the end of a member, zipfile compares its checksum
        return np.ndarray(shape, self.dtype, content)


def _layout(file: IO[bytes], available: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in a file of so many bytes."""
    shape, _, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > available:
        raise EOFError("an array ends early")
    return shape, dtype


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is stored in Fortran order, and type; the file stands at the first number then."""
    version = npy_format.read_magic(file)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    return read(file)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a fault of the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not a whole .npz or .npy file ({reason}): save it with numpy.savez") from error
