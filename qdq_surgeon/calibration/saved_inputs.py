"""Inputs that other tools saved: ONNX's test_data_set_* folders, and Polygraphy's JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .. import weights
from ..errors import DataError
from .batches import Batch, Feeds, Input, check_names, fixed_batch, make_batch

JSON = ".json"
_KIND = "polygraphy_class"
"""The key under which Polygraphy names the type of what it encoded."""


def test_sets(folder: Path) -> list[Path]:
    """The test_data_set_* folders in a folder, or the folder itself where it is one."""
    return sorted(folder.glob("test_data_set_*")) or [path.parent for path in folder.glob("input_0.pb")]


def read_test_sets(sets: Sequence[Path], inputs: tuple[Input, ...]) -> Feeds:
    """One batch per test set, of input_0.pb and so on. Tensors are matched by their names, else by position."""
    source = str(sets[0]) if len(sets) == 1 else str(sets[0].with_name("test_data_set_*"))
    total = None if any(declared.is_open for declared in inputs) else len(sets) * fixed_batch(inputs)
    return Feeds((_read_test_set(path, inputs) for path in sets), source, total)


def _read_test_set(folder: Path, inputs: tuple[Input, ...]) -> Batch:
    names = {declared.name for declared in inputs}
    feed: dict[str, NDArray[Any]] = {}
    for index, declared in enumerate(inputs):
        path = folder / f"input_{index}.pb"
        try:
            tensor = onnx.load_tensor(str(path))
            feed[tensor.name if tensor.name in names else declared.name] = weights.array(tensor)
        except Exception as error:
            raise DataError(f"{path} is not a saved ONNX tensor ({type(error).__name__})") from error
    check_names(feed, inputs, str(folder))
    return make_batch(feed, inputs, str(folder))


def polygraphy_inputs(path: Path) -> Iterator[Mapping[str, Any]]:
    """The batches of a file that `polygraphy run --save-inputs` or polygraphy.json.save_json wrote, in order.

    The file holds one mapping of input names to arrays, or a list of them. Its text is read whole, and the arrays are
    decoded one batch at a time. Raises DataError for anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): write it with polygraphy.json.save_json") from error
    for index, entry in enumerate(content if isinstance(content, list) else [content]):
        where = f"{path}, batch {index}"
        if not isinstance(entry, dict) or _KIND in entry:
            kind = entry.get(_KIND) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(f"{where} is a {kind}, no mapping of input names to arrays: save with --save-inputs")
        yield {name: _decoded(value, f"{where}: '{name}'") for name, value in entry.items()}


def _decoded(value: Any, where: str) -> Any:
    """An array as Polygraphy encodes it: the bytes of an .npy in base64. Plain lists of numbers stay as they are."""
    if not isinstance(value, dict):
        return value
    if value.get(_KIND) != "ndarray":
        raise DataError(f"{where} is a {value.get(_KIND, 'mapping')}: save NumPy arrays")
    try:
        return np.load(io.BytesIO(base64.b64decode(value["array"], validate=True)), allow_pickle=False)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{where} is no array that Polygraphy saved ({reason}): save it again") from error
