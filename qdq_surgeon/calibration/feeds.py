"""Where data comes from: files, folders, scripts, arrays, anything that gives batches, or made up.

All of them become `Feeds`: a stream of checked batches, cut to what the model's inputs allow. The same samples give the
same arrays, whatever they come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import DataError
from ..model import Model
from .arrays import SUFFIXES, open_arrays
from .batches import Batch, Feeds, Input, check_are_tensors, check_names, declared_inputs, only_input, to_array
from .cutting import DYNAMIC_BATCH, ENOUGH_SAMPLES, HELD_OUT_EVERY, InMemory, cut, with_batch_axis
from .images import is_image, read_images, walk
from .preprocessing import STATE_PREPROCESSING, Preprocessing
from .saved_inputs import JSON, polygraphy_inputs, read_test_sets, test_sets
from .scripts import script_data, script_file
from .streams import is_array, stream
from .synthetic import SYNTHETIC, SYNTHETIC_SAMPLES, Shapes, Trial, synthetic

__all__ = [
    "DYNAMIC_BATCH",
    "ENOUGH_SAMPLES",
    "HELD_OUT_EVERY",
    "SYNTHETIC",
    "SYNTHETIC_SAMPLES",
    "Batch",
    "Data",
    "Feeds",
    "Input",
    "Shapes",
    "Trial",
    "declared_inputs",
    "default_data",
    "read_data",
]

Data: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]"

HEADERS_READ_AT_ONCE = 1000
"""Up to so many files of a folder, their headers are read first, to count the samples and to find what does not fit."""


def read_data(data: Data, model: Model, preprocessing: Preprocessing | None = None) -> Feeds:
    """Open a data source for a model.

    - A path: an .npz (input name -> array, samples along axis 0); an .npy (one-input models); a .json of Polygraphy's
      saved inputs; a .py whose `load_data()` yields mappings ('loader.py:my_func' for another name); or a folder of
      .npz and .npy, of .json, of test_data_set_* folders, or, with `preprocessing`, of images.
    - A mapping of arrays, or for one-input models an array, with the samples along axis 0.
    - Anything that gives batches one by one, such as a DataLoader or a generator: see `streams.stream`. It is read no
      further than needed.

    Arrays stay where they are: a file is read, or an image decoded, one batch at a time. Raises DataError, at once or
    while batches are read, for what does not fit: names, types, shapes, NaN.
    """
    inputs = declared_inputs(model)
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if not preprocessing:
            return _from_path(path, inputs)
        check_are_tensors(inputs)
        return read_images(path, model, preprocessing)
    if preprocessing:
        raise DataError("preprocessing is for folders of images: arrays are taken as they are, so leave it out")
    if isinstance(data, Mapping):
        return _from_arrays(data, inputs, "the arrays given")
    if is_array(data):
        check_are_tensors(inputs)
        return _from_arrays({only_input(inputs, "an array").name: data}, inputs, "the array given")
    if isinstance(data, Iterable):
        return Feeds(stream(data, inputs), "the batches given")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Feeds(stream((data[index] for index in range(len(data))), inputs), "the batches given")
    raise DataError(f"data is a path, a mapping of arrays or an iterable of mappings; this is a {type(data).__name__}")


def default_data(model: Model, shapes: Shapes | None = None, runs: Trial | None = None) -> Feeds:
    """The test_data_set_* folders beside the model if there are any, else synthetic inputs.

    `runs` tries a feed on the model; it serves to find sizes for dimensions that nothing states.
    """
    inputs = declared_inputs(model)
    check_are_tensors(inputs)
    folder = model.path.parent if model.path else None
    if folder and (sets := test_sets(folder)):
        return read_test_sets(sets, inputs)
    return synthetic(inputs, shapes or {}, runs)


def _from_arrays(arrays: Mapping[str, Any], inputs: tuple[Input, ...], source: str) -> Feeds:
    check_are_tensors(inputs)
    check_names(arrays, inputs, source)
    return cut({d.name: InMemory(to_array(arrays[d.name], d, source)) for d in inputs}, inputs, source)


def _from_path(path: Path, inputs: tuple[Input, ...]) -> Feeds:
    if script_file(path) and not path.is_dir():
        return Feeds(stream(script_data(path), inputs, str(path)), str(path))
    check_are_tensors(inputs)
    if path.is_dir():
        return _from_folder(path, inputs)
    if not path.exists():
        raise DataError(f"{path}: no such data file")
    if is_image(path):
        raise DataError(f"{path} is one image: give the folder that holds it")
    if path.suffix == JSON:
        return _from_json(path, inputs)
    return cut(open_arrays(path, inputs), inputs, str(path))


def _from_json(path: Path, inputs: tuple[Input, ...]) -> Feeds:
    return Feeds(stream(polygraphy_inputs(path), inputs, str(path)), str(path))


def _from_folder(folder: Path, inputs: tuple[Input, ...]) -> Feeds:
    if sets := test_sets(folder):
        return read_test_sets(sets, inputs)
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if arrays := [path for path in files if path.suffix in SUFFIXES]:
        return _joined((_from_array_file(path, inputs) for path in arrays), len(arrays), str(folder))
    if any(map(is_image, walk(folder))):
        raise DataError(f"{folder} holds images: {STATE_PREPROCESSING}")
    if saved := [path for path in files if path.suffix == JSON]:
        return _joined((_from_json(path, inputs) for path in saved), len(saved), str(folder))
    raise DataError(f"{folder} holds no .npz, no .npy, no .json, no image and no test_data_set_* folder")


def _from_array_file(path: Path, inputs: tuple[Input, ...]) -> Feeds:
    """One file of a folder. Here an array whose rank is one lower than declared is one sample."""
    rows = open_arrays(path, inputs)
    return cut({d.name: with_batch_axis(rows[d.name], d) for d in inputs}, inputs, str(path))


def _joined(parts: Iterator[Feeds], number: int, source: str) -> Feeds:
    """One source after another, each opened when its turn comes; their samples are counted where they are few."""
    total = None
    if number <= HEADERS_READ_AT_ONCE:
        opened = list(parts)
        totals = [part.total or 0 for part in opened]
        total = sum(totals) if all(totals) else None
        parts = iter(opened)
    return Feeds((batch for part in parts for batch in part.batches), source, total)
