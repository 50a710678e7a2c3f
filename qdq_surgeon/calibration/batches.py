"""What the model's inputs want, and the checked batches that data from every source become."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto, helper

from ..errors import DataError, nearest
from ..graph import tensor_type
from ..model import Model

log = logging.getLogger("qdq_surgeon")

TENSOR, SEQUENCE, OPTIONAL = "a tensor", "a sequence", "optional"
KINDS = {"tensor_type": TENSOR, "sequence_type": SEQUENCE, "optional_type": OPTIONAL}

Value: TypeAlias = Any
"""What one input is fed: an array; a list of arrays for a sequence; an array or None for an optional tensor."""


@dataclass(frozen=True, slots=True)
class Input:
    """What the model declares of one input: NumPy type and dimensions (int, symbol or None), for a sequence each's."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    kind: str = TENSOR

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def is_open(self) -> bool:
        """True where the model takes any number of samples along axis 0."""
        sized = self.shape is not None and (not self.shape or isinstance(self.shape[0], int))
        return self.kind == TENSOR and not sized

    @property
    def is_sized(self) -> bool:
        """True where the model states all dimensions."""
        return self.shape is not None and all(isinstance(dim, int) for dim in self.shape)

    @property
    def batch(self) -> int | None:
        """The declared size of axis 0; None where it is open."""
        return self.shape[0] if self.shape and isinstance(self.shape[0], int) else None

    @property
    def text(self) -> str:
        """The declared shape, for messages: '[N, 3]'."""
        return "[" + ", ".join(str(dim) if dim is not None else "?" for dim in self.shape or ()) + "]"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """True where the model takes an array of this shape."""
        if self.shape is None:
            return True
        pairs = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(not isinstance(want, int) or want == have for want, have in pairs)

    def lacks_axis(self, shape: tuple[int, ...]) -> bool:
        """True for the shape of one sample without the batch axis."""
        return self.rank == len(shape) + 1 and self.fits((1, *shape))

    def misfit(self, shape: tuple[int, ...], where: str) -> DataError:
        return DataError(f"{where} has shape {list(shape)}, but the model wants {self.text}")


@dataclass(frozen=True, slots=True)
class Batch:
    """One feed for the model, {input name: array}, and how many samples are in it."""

    feed: dict[str, Value]
    samples: int
    along: frozenset[str] = frozenset()
    """The inputs whose axis 0 may be cut: those whose batch the model leaves open."""

    @property
    def divisible(self) -> bool:
        return self.samples > 1 and bool(self.along)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for value in self.feed.values() for array in arrays_of(value))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays; a sequence, and what is not there, has none."""
        return {name: value.shape for name, value in self.feed.items() if isinstance(value, np.ndarray)}

    def copied(self) -> Batch:
        """The batch with arrays of its own: whoever gave an array may fill it anew for the next batch."""
        return replace(self, feed={name: _copied(value) for name, value in self.feed.items()})

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`; the whole batch where the model does not allow to cut it."""
        if not self.divisible or (start <= 0 and stop >= self.samples):
            return self
        cut = {name for name in self.along if _rows(self.feed[name]) == self.samples}
        feed = {name: array[start:stop] if name in cut else array for name, array in self.feed.items()}
        return Batch(feed, min(stop, self.samples) - start, frozenset(cut))


@dataclass(frozen=True)
class Feeds:
    """A stream of batches, to be read once. `source` says where it comes from; `total` counts its samples if known."""

    batches: Iterator[Batch]
    source: str
    total: int | None = None
    synthetic: bool = False


def arrays_of(value: Value) -> list[NDArray[Any]]:
    """The arrays that an input is fed: those of a sequence, none for an optional tensor that is not there."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _copied(value: Value) -> Value:
    if value is None:
        return None
    return [array.copy() for array in value] if isinstance(value, list) else value.copy()


def declared_inputs(model: Model) -> tuple[Input, ...]:
    """The inputs to feed. Raises DataError for one that is neither a tensor, nor a sequence of some, nor optional."""
    return tuple(map(_declared, model.inputs))


def _declared(value: ValueInfoProto) -> Input:
    which = value.type.WhichOneof("value")
    kind = KINDS.get(which or "")
    inner = value if kind in (TENSOR, None) else ValueInfoProto(type=getattr(value.type, which).elem_type)
    element, shape = tensor_type(inner)
    if kind is None or not element:
        raise DataError(
            f"the input '{value.name}' is no tensor, no sequence of tensors and no optional tensor: "
            "such models cannot be calibrated"
        )
    return Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(element)), shape, kind)


def check_are_tensors(inputs: Iterable[Input]) -> None:
    """Raise DataError for inputs that no file of arrays can feed."""
    for declared in inputs:
        if declared.kind != TENSOR:
            give = "a list of arrays" if declared.kind == SEQUENCE else "an array or None"
            raise DataError(
                f"the input '{declared.name}' is {declared.kind}: give one mapping per sample, with {give} for it, "
                "from a script (--data loader.py) or from Python"
            )


def only_input(inputs: tuple[Input, ...], source: str) -> Input:
    """The one input that a single array is for. Raises DataError where the model has more."""
    if len(inputs) != 1:
        names = ", ".join(declared.name for declared in inputs)
        raise DataError(
            f"{source} is one array, but the model has {len(inputs)} inputs ({names}): give an .npz with these names"
        )
    return inputs[0]


def check_names(given: Collection[str], inputs: tuple[Input, ...], source: str) -> None:
    """Raise DataError where an input is missing; what is no input is left out."""
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


def check_type(dtype: np.dtype[Any], declared: Input, where: str) -> None:
    """Raise DataError where numbers of this type cannot become what the model wants."""
    if dtype.kind not in "biufV":
        raise DataError(f"{where} holds {dtype}, which is no number")
    if dtype != declared.dtype and not np.can_cast(dtype, declared.dtype, "same_kind"):
        raise DataError(f"{where} holds {dtype}, but the model wants {declared.dtype}: convert it")


def to_array(value: Any, declared: Input, source: str) -> NDArray[Any]:
    """What was given for an input as an array, without a copy where it is one; tensors leave their graph and device."""
    try:
        return _to_array(value)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source}: '{declared.name}' cannot be read as an array ({reason})") from error


def _to_array(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def make_batch(feed: Mapping[str, Value], inputs: tuple[Input, ...], source: str, fixed: int | None = None) -> Batch:
    """Check a feed that has all of the model's inputs, and give it the declared types.

    It counts as `fixed` samples where the model leaves no batch open, and as one where an input is no tensor. Raises
    DataError for wrong shapes or types, empty arrays, NaN, and numbers beyond the declared type.
    """
    checked = {declared.name: _checked_value(feed[declared.name], declared, source) for declared in inputs}
    if any(declared.kind != TENSOR for declared in inputs):
        return Batch(checked, 1)
    along = frozenset(declared.name for declared in inputs if declared.is_open)
    if not along:
        return Batch(checked, fixed or fixed_batch(inputs))
    return Batch(checked, max(_rows(checked[name]) for name in along), along)


def fixed_batch(inputs: Iterable[Input]) -> int:
    """How many samples a feed holds where the model fixes all batches.

    The smallest axis 0: inputs that share a batch agree there, and what has another axis first (a recurrent state
    its layers, a table its rows) mostly has more. A vector has a batch axis only where all inputs are vectors.
    """
    sized = [declared for declared in inputs if declared.shape]
    sizes = [declared.batch or 1 for declared in sized if len(declared.shape or ()) > 1]
    return min(sizes or [declared.batch or 1 for declared in sized], default=1)


def _checked_value(value: Value, declared: Input, source: str) -> Value:
    if value is None:
        return None
    if isinstance(value, list):
        return [_checked(array, declared, source) for array in value]
    return _checked(value, declared, source)


def _checked(array: NDArray[Any], declared: Input, source: str) -> NDArray[Any]:
    where = f"{source}: '{declared.name}'"
    check_type(array.dtype, declared, where)
    if not declared.fits(array.shape):
        raise declared.misfit(array.shape, where)
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


def _rows(array: NDArray[Any]) -> int:
    return len(array) if array.ndim else 1
