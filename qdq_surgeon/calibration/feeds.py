"""Where data comes from: files, arrays, iterables of dicts, test_data_set folders, or made up.

All of them become `Feeds`: a stream of checked batches, cut to what the model's inputs allow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..errors import DataError, nearest
from ..model import Model, tensor_type

log = logging.getLogger("qdq_surgeon")

Data: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]]"
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Trial: TypeAlias = "Callable[[dict[str, NDArray[Any]]], str | None]"
"""Runs the model on a feed and tells why it does not run; None where it does."""

DYNAMIC_BATCH = 8
"""How many samples are fed at once where the model leaves the batch open."""
SYNTHETIC = "synthetic inputs"
SYNTHETIC_SAMPLES = 16
SYNTHETIC_SIZES = (224, 512, 64, 16, 1)
"""What unknown dimensions are tried with, in order, when inputs are made up."""
HELD_OUT_EVERY = 4
"""One batch in four is kept for the comparison, when there is enough data."""
ENOUGH_SAMPLES = 16
"""With fewer samples than this nothing is held out: calibration needs them all."""


@dataclass(frozen=True, slots=True)
class Input:
    """What the model declares of one input: NumPy type and dimensions (int, symbol or None)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def is_open(self) -> bool:
        """True where the model takes any number of samples along axis 0."""
        return self.shape is None or (len(self.shape) > 0 and not isinstance(self.shape[0], int))

    @property
    def is_sized(self) -> bool:
        """True where the model states all dimensions."""
        return self.shape is not None and all(isinstance(dim, int) for dim in self.shape)

    @property
    def batch(self) -> int | None:
        """The declared size of axis 0; None where it is open."""
        return self.shape[0] if self.shape and isinstance(self.shape[0], int) else None


@dataclass(frozen=True, slots=True)
class Batch:
    """One feed for the model, {input name: array}, and how many samples are in it."""

    feed: dict[str, NDArray[Any]]
    samples: int
    along: frozenset[str] = frozenset()
    """The inputs whose axis 0 may be cut: those whose batch the model leaves open."""

    @property
    def divisible(self) -> bool:
        return self.samples > 1 and bool(self.along)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.feed.values())

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`; the whole batch where the model does not allow to cut it."""
        if not self.divisible or (start <= 0 and stop >= self.samples):
            return self
        cut = {name for name in self.along if _rows(self.feed[name]) == self.samples}
        feed = {name: array[start:stop] if name in cut else array for name, array in self.feed.items()}
        return Batch(feed, min(stop, self.samples) - start, self.along)


@dataclass(frozen=True)
class Feeds:
    """A stream of batches, to be read once. `source` says where it comes from; `total` counts its samples if known."""

    batches: Iterator[Batch]
    source: str
    total: int | None = None
    synthetic: bool = False


def read_data(data: Data, model: Model) -> Feeds:
    """Open a data source for a model.

    A path to an .npz (input name -> array, samples along axis 0), an .npy (one-input models), or a folder of these
    or of test_data_set_* folders; a mapping of arrays; or an iterable of mappings, one per batch. Raises DataError,
    at once or while batches are read, for what does not fit: names, types, shapes, NaN.
    """
    inputs = declared_inputs(model)
    if isinstance(data, (str, os.PathLike)):
        return _from_path(Path(data), inputs)
    if isinstance(data, Mapping):
        return _from_arrays(data, inputs, "the arrays given")
    if hasattr(data, "__array__") or hasattr(data, "__dlpack__"):
        return _from_arrays({_only(inputs, "an array").name: data}, inputs, "the array given")
    if isinstance(data, Iterable):
        return Feeds(_from_iterable(data, inputs), "the batches given")
    raise DataError(f"data is a path, a mapping of arrays or an iterable of mappings; this is a {type(data).__name__}")


def default_data(model: Model, shapes: Shapes | None = None, runs: Trial | None = None) -> Feeds:
    """The test_data_set_* folders beside the model if there are any, else synthetic inputs.

    `runs` tries a feed on the model; it serves to find sizes for dimensions that nothing states.
    """
    inputs = declared_inputs(model)
    folder = model.path.parent if model.path else None
    if folder and any(folder.glob("test_data_set_*")):
        return _from_test_sets(folder, inputs)
    return Feeds(_synthetic(inputs, shapes or {}, runs), SYNTHETIC, SYNTHETIC_SAMPLES, synthetic=True)


def declared_inputs(model: Model) -> tuple[Input, ...]:
    """The inputs to feed. Raises DataError for one that is not a tensor."""
    inputs = []
    for value in model.inputs:
        element, shape = tensor_type(value)
        if not element:
            raise DataError(f"the input '{value.name}' is not a tensor: such models cannot be calibrated yet")
        inputs.append(Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(element)), shape))
    return tuple(inputs)


def _from_path(path: Path, inputs: tuple[Input, ...]) -> Feeds:
    if path.is_dir():
        return _from_folder(path, inputs)
    if not path.exists():
        raise DataError(f"{path}: no such data file")
    return _from_arrays(_read_arrays(path, inputs), inputs, str(path))


def _from_folder(folder: Path, inputs: tuple[Input, ...]) -> Feeds:
    if any(folder.glob("test_data_set_*")):
        return _from_test_sets(folder, inputs)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".npy"))
    if not files:
        raise DataError(f"{folder} holds no .npz, no .npy and no test_data_set_* folder")
    batches = (batch for path in files for batch in _from_arrays(_read_arrays(path, inputs), inputs, str(path)).batches)
    return Feeds(batches, str(folder))


def _from_test_sets(folder: Path, inputs: tuple[Input, ...]) -> Feeds:
    sets = sorted(folder.glob("test_data_set_*"))
    return Feeds((_read_test_set(path, inputs) for path in sets), f"{folder}/test_data_set_*", len(sets))


def _read_test_set(folder: Path, inputs: tuple[Input, ...]) -> Batch:
    feed: dict[str, Any] = {}
    for index, declared in enumerate(inputs):
        path = folder / f"input_{index}.pb"
        try:
            tensor = onnx.load_tensor(str(path))
            feed[tensor.name if tensor.name in {i.name for i in inputs} else declared.name] = numpy_helper.to_array(
                tensor
            )
        except Exception as error:
            raise DataError(f"{path} is not a saved ONNX tensor ({type(error).__name__})") from error
    return _batch(feed, inputs, str(folder))


def _read_arrays(path: Path, inputs: tuple[Input, ...]) -> dict[str, NDArray[Any]]:
    try:
        arrays = _load_arrays(path, inputs)
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a whole .npz or .npy file ({reason}): save it with numpy.savez") from error
    return arrays if isinstance(arrays, dict) else {_only(inputs, str(path)).name: arrays}


def _load_arrays(path: Path, inputs: tuple[Input, ...]) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """An .npy stays on disk, mapped; of an .npz the inputs are read, and nothing else."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            if archive.files == ["arr_0"] and len(inputs) == 1:
                return {inputs[0].name: archive["arr_0"]}
            _check_names(archive.files, inputs, str(path))
            return {declared.name: archive[declared.name] for declared in inputs}


def _only(inputs: tuple[Input, ...], source: str) -> Input:
    if len(inputs) != 1:
        names = ", ".join(declared.name for declared in inputs)
        raise DataError(
            f"{source} is one array, but the model has {len(inputs)} inputs ({names}): give an .npz with these names"
        )
    return inputs[0]


def _from_arrays(arrays: Mapping[str, Any], inputs: tuple[Input, ...], source: str) -> Feeds:
    """Cut arrays with the samples along axis 0 into batches. One input's single batch serves every batch."""
    _check_names(arrays, inputs, source)
    given = {d.name: _array(arrays[d.name], d, source) for d in inputs}
    cuts = {d.name: _cuts(given[d.name], d, source) for d in inputs}
    counts = {name: len(pieces) for name, pieces in cuts.items() if len(pieces) != 1}
    lengths = {len(given[d.name]) for d in inputs if d.name in counts and d.is_open and given[d.name].ndim == d.rank}
    if len(set(counts.values())) > 1 or len(lengths) > 1:
        sizes = ", ".join(f"{name} {len(given[name])}" for name in counts)
        raise DataError(f"{source}: the inputs have different numbers of samples ({sizes})")
    number = next(iter(counts.values()), 1)
    open_batches = [cuts[declared.name] for declared in inputs if declared.is_open]
    fixed = _fixed_batch([declared for declared in inputs if declared.name in counts] or inputs)
    total = max((sum(rows for rows, _ in pieces) for pieces in open_batches), default=fixed * number)

    def batches() -> Iterator[Batch]:
        for index in range(number):
            feed = {name: pieces[index if len(pieces) > 1 else 0][1]() for name, pieces in cuts.items()}
            yield _batch(feed, inputs, f"{source}, batch {index}", fixed)

    return Feeds(batches(), source, total)


def _cuts(array: NDArray[Any], declared: Input, source: str) -> list[tuple[int, Callable[[], NDArray[Any]]]]:
    """The pieces of one input's array: how many rows each has, and how to read it when its turn comes."""
    rank = declared.rank
    if array.ndim == 0 and rank in (0, None):
        return [(1, lambda: array)]
    if array.ndim == 0:
        raise DataError(f"{source}: '{declared.name}' is a single number, but the model wants {_shape_text(declared)}")
    if not len(array):
        raise DataError(f"{source}: '{declared.name}' is empty")
    if not _can_cut(array.shape, declared):
        raise DataError(_misfit(f"{source}: '{declared.name}'", array, declared))
    if rank is not None and array.ndim == rank + 1:
        return [(array.shape[1] if rank else 1, lambda i=i: array[i]) for i in range(len(array))]  # type: ignore[misc]
    size = declared.batch or _open_batch(len(array))
    whole = len(array) // size * size if declared.batch else len(array)
    if not whole:
        raise DataError(f"{source}: '{declared.name}' has {len(array)} samples, but the model's batch is {size}")
    if whole < len(array):
        left = len(array) - whole
        log.warning("%s: the last %d samples do not fill the model's batch of %d and are left out", source, left, size)
    starts = range(0, whole, size)
    return [(min(size, whole - i), lambda i=i: array[i : min(i + size, whole)]) for i in starts]  # type: ignore[misc]


def _open_batch(samples: int) -> int:
    """How many samples to feed at once: fewer where a batch to hold out would be missing otherwise."""
    return DYNAMIC_BATCH if samples < ENOUGH_SAMPLES else min(DYNAMIC_BATCH, samples // HELD_OUT_EVERY)


def _fixed_batch(inputs: Iterable[Input]) -> int:
    """How many samples a feed holds where the model fixes all batches.

    The smallest axis 0: inputs that share a batch agree there, and what has another axis first (a recurrent state
    its layers, a table its rows) mostly has more. A vector has a batch axis only where all inputs are vectors.
    """
    sized = [declared for declared in inputs if declared.shape]
    sizes = [declared.batch or 1 for declared in sized if len(declared.shape or ()) > 1]
    return min(sizes or [declared.batch or 1 for declared in sized], default=1)


def _from_iterable(data: Iterable[Mapping[str, Any]], inputs: tuple[Input, ...]) -> Iterator[Batch]:
    for index, feed in enumerate(data):
        source = f"batch {index}"
        if not isinstance(feed, Mapping):
            raise DataError(f"{source} is a {type(feed).__name__}: give one mapping of input names to arrays per batch")
        _check_names(feed, inputs, source)
        yield _batch({d.name: _array(feed[d.name], d, source) for d in inputs}, inputs, source)


def _batch(feed: Mapping[str, NDArray[Any]], inputs: tuple[Input, ...], source: str, fixed: int | None = None) -> Batch:
    """Check one feed against the model's inputs and give it the declared types.

    It counts as `fixed` samples where the model leaves no batch open.
    """
    _check_names(feed, inputs, source)
    checked = {declared.name: _checked(feed[declared.name], declared, source) for declared in inputs}
    along = frozenset(declared.name for declared in inputs if declared.is_open)
    if not along:
        return Batch(checked, fixed or _fixed_batch(inputs))
    return Batch(checked, max(_rows(checked[name]) for name in along), along)


def _checked(array: NDArray[Any], declared: Input, source: str) -> NDArray[Any]:
    where = f"{source}: '{declared.name}'"
    if array.dtype != declared.dtype and not np.can_cast(array.dtype, declared.dtype, "same_kind"):
        raise DataError(f"{where} holds {array.dtype}, but the model wants {declared.dtype}: convert it")
    if not _fits(array.shape, declared):
        raise DataError(_misfit(where, array, declared))
    if not _rows(array):
        raise DataError(f"{where} is empty")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where} holds NaN or infinity: clean the data")
    with np.errstate(over="ignore"):
        cast = np.asarray(array, declared.dtype, order="C")
    exceeds = (
        not np.isfinite(cast).all() if cast.dtype.kind == "f" else cast.dtype.kind in "iu" and (cast != array).any()
    )
    if exceeds:
        raise DataError(f"{where} holds numbers beyond {declared.dtype}, which the model wants")
    return cast


def _fits(shape: tuple[int, ...], declared: Input) -> bool:
    if declared.shape is None:
        return True
    pairs = zip(declared.shape, shape, strict=False)
    return len(shape) == len(declared.shape) and all(not isinstance(want, int) or want == have for want, have in pairs)


def _misfit(where: str, array: NDArray[Any], declared: Input) -> str:
    return f"{where} has shape {list(array.shape)}, but the model wants {_shape_text(declared)}"


def _can_cut(shape: tuple[int, ...], declared: Input) -> bool:
    """True where all dimensions behind the first are those of one batch, or of one sample."""
    if declared.shape is None:
        return True
    sample = replace(declared, shape=declared.shape[1:])
    return _fits(shape[1:], declared) or _fits(shape[1:], sample)


def _check_names(given: Collection[str], inputs: tuple[Input, ...], source: str) -> None:
    wanted = [declared.name for declared in inputs]
    missing = [name for name in wanted if name not in given]
    extra = [str(name) for name in given if name not in wanted]
    if missing:
        raise DataError(
            f"{source} has no '{missing[0]}'.{nearest(missing[0], extra)} "
            f"It has {', '.join(map(str, given)) or 'nothing'}; the model's inputs are {', '.join(wanted)}"
        )
    if extra:
        log.debug("%s: not inputs of the model, left out: %s", source, ", ".join(extra))


def _array(value: Any, declared: Input, source: str) -> NDArray[Any]:
    try:
        if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except Exception as error:
        raise DataError(f"{source}: '{declared.name}' cannot be read as an array ({error})") from error
    if array.dtype.kind not in "biufV":
        raise DataError(f"{source}: '{declared.name}' holds {array.dtype}, which is no number")
    return array


def _synthetic(inputs: tuple[Input, ...], shapes: Shapes, runs: Trial | None) -> Iterator[Batch]:
    """Seeded normal values for floats, 0 and 1 for integers. Unknown sizes: `shapes`, else the first that runs."""
    by_name = {declared.name: declared for declared in inputs}
    for name, shape in shapes.items():
        if name not in by_name:
            raise DataError(f"--shapes: the model has no input '{name}'.{nearest(name, by_name)}")
        if not _fits(shape, by_name[name]):
            raise DataError(f"--shapes: '{name}' has {list(shape)}, but the model wants {_shape_text(by_name[name])}")
    generator = np.random.default_rng(0)
    size = _size_that_runs(inputs, shapes, runs, generator)
    del runs  # it may hold a whole model
    for _ in range(SYNTHETIC_SAMPLES):
        yield _batch(_made_up(inputs, shapes, size, generator), inputs, "synthetic inputs")


def _size_that_runs(
    inputs: tuple[Input, ...], shapes: Shapes, runs: Trial | None, generator: np.random.Generator
) -> int:
    """The first of SYNTHETIC_SIZES with which the model runs; where all sizes are stated, these must run."""
    stated = all(declared.name in shapes or declared.is_sized for declared in inputs)
    for size in SYNTHETIC_SIZES:
        feed = _made_up(inputs, shapes, size, generator)
        reason = runs(feed) if runs else None
        if reason is None:
            return size
        if stated:
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise DataError(f"the model does not run on inputs of these sizes ({sizes}): {reason}")
    raise DataError("no input sizes were found with which the model runs: state them with --shapes name:1x3x224x224")


def _made_up(
    inputs: tuple[Input, ...], shapes: Shapes, size: int, generator: np.random.Generator
) -> dict[str, NDArray[Any]]:
    feed: dict[str, NDArray[Any]] = {}
    batch = {declared.shape[0] for declared in inputs if declared.shape}
    for declared in inputs:
        dims = declared.shape or ()
        ones = [axis == 0 or (dim is not None and dim in batch) for axis, dim in enumerate(dims)]
        filled = tuple(d if isinstance(d, int) else 1 if one else size for d, one in zip(dims, ones, strict=True))
        shape = shapes.get(declared.name, filled)
        integral = declared.dtype.kind in "biu"
        values = generator.integers(0, 2, shape) if integral else generator.standard_normal(shape)
        feed[declared.name] = np.asarray(values).astype(declared.dtype)
    return feed


def _rows(array: NDArray[Any]) -> int:
    return len(array) if array.ndim else 1


def _shape_text(declared: Input) -> str:
    return "[" + ", ".join(str(dim) if dim is not None else "?" for dim in declared.shape or ()) + "]"
