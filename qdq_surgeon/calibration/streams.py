"""Batches as code gives them: mappings of arrays, bare arrays, or tuples with the labels behind, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from ..errors import DataError
from .batches import OPTIONAL, SEQUENCE, Batch, Input, Value, check_names, make_batch, to_array


def stream(items: Iterable[Any], inputs: tuple[Input, ...], source: str = "") -> Iterator[Batch]:
    """One batch per item, read no earlier than it is asked for.

    An item is a mapping of input names to arrays; for a model with one input, an array; or a tuple or list that begins
    with one of these, as (images, labels). A tuple serves a model with several inputs only where each of these has the
    type and shape of one element, and they come in the model's order. An array whose rank is one lower than declared
    is one sample: it gets the axis. For a sequence a mapping has a list of arrays, for an optional tensor an array or
    None. Raises DataError for anything else; what the items' own code raises passes.
    """
    for index, item in enumerate(items):
        where = f"{source}, batch {index}" if source else f"batch {index}"
        feed = _feed(item, inputs, where)
        check_names(feed, inputs, where)
        yield make_batch({d.name: _value(feed[d.name], d, where) for d in inputs}, inputs, where)


def is_array(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def _feed(item: Any, inputs: tuple[Input, ...], where: str) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if is_array(item) and len(inputs) == 1:
        return {inputs[0].name: item}
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], Mapping):
        return item[0]
    if isinstance(item, (tuple, list)) and item and _is_in_order(item, inputs, where):
        return {declared.name: value for declared, value in zip(inputs, item, strict=False)}
    raise DataError(_advice(item, inputs, where))


def _is_in_order(item: tuple[Any, ...] | list[Any], inputs: tuple[Input, ...], where: str) -> bool:
    """True where nothing but the first elements, in order, can be what the inputs want."""
    if len(inputs) == 1:
        return is_array(item[0])
    arrays = [(place, value) for place, value in enumerate(item) if is_array(value)]
    suits = [[place for place, value in arrays if _suits(value, declared, where)] for declared in inputs]
    return suits == [[place] for place in range(len(inputs))]


def _suits(value: Any, declared: Input, where: str) -> bool:
    array = to_array(value, declared, where)
    return array.dtype == declared.dtype and declared.fits(array.shape)


def _value(value: Any, declared: Input, where: str) -> Value:
    if declared.kind == OPTIONAL and value is None:
        return None
    if declared.kind != SEQUENCE:
        return _array(value, declared, where)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: '{declared.name}' is a sequence, and got a {type(value).__name__}: give a list")
    return [to_array(item, declared, where) for item in value]


def _array(value: Any, declared: Input, where: str) -> NDArray[Any]:
    array = to_array(value, declared, where)
    return array[None] if declared.lacks_axis(array.shape) else array


def _advice(item: Any, inputs: tuple[Input, ...], where: str) -> str:
    elements = item if isinstance(item, (tuple, list)) else ()
    arrays = [f"item[{place}]" for place, value in enumerate(elements) if is_array(value)]
    values = arrays if len(arrays) >= len(inputs) else ["item"] if len(inputs) == 1 else ["..."] * len(inputs)
    feed = ", ".join(f"{declared.name!r}: {value}" for declared, value in zip(inputs, values, strict=False))
    return (
        f"{where} is a {type(item).__name__}, which does not say what is for which input: "
        f"give one mapping of input names to arrays per batch, such as ({{{feed}}} for item in data)"
    )
