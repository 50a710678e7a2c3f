"""Constants computed from other constants, node by node, none of them out of proportion to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, OperatorSetIdProto, SparseTensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from . import weights
from .errors import ModelError

LEAST_LIMIT = 1 << 26
"""So many elements (256 MB of FP32) may be held while a constant is computed, however small the model is."""
SIZES = 1024
"""No input that says how large an output becomes has more elements."""

NO_LARGER = frozenset(
    {
        "Compress",
        "ConcatFromSequence",
        "NonZero",
        "Optional",
        "OptionalGetElement",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceErase",
        "SequenceInsert",
        "SplitToSequence",
        "Unique",
    }
)
"""Ops whose sizes shape inference does not know, but which make no more elements than they read, times the rank."""

Value: TypeAlias = Any
"""An array; a list of arrays for a sequence; None for an empty optional."""


def limit(elements: int) -> int:
    """How many elements may be held while a constant of a model with so many weights is computed."""
    return max(LEAST_LIMIT, 2 * elements)


def fold(
    tensor: str,
    nodes: Sequence[NodeProto],
    leaf: Callable[[str], Value],
    opsets: Iterable[OperatorSetIdProto],
    most: int,
) -> NDArray[Any]:
    """The value of `tensor`, which these nodes (in order) compute from leaves.

    Raises ModelError where a node cannot be computed, or would make more than `most` elements be held.
    """
    opsets = list(opsets)
    last = {name: index for index, node in enumerate(nodes) for name in node.input}
    last[tensor] = len(nodes)
    values: dict[str, Value] = {}
    for index, node in enumerate(nodes):
        given = {name: values[name] if name in values else leaf(name) for name in node.input if name}
        size = _size(node, given, opsets)
        if size is None or size + sum(map(_elements, values.values())) > most:
            much = "an unknown number of elements" if size is None else f"{size} elements"
            raise ModelError(f"the constant '{tensor}' cannot be computed: '{node.output[0]}' has {much}")
        try:
            values |= _evaluated(node, given, opsets)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(f"the constant '{tensor}' cannot be computed ({reason})") from error
        values = {name: value for name, value in values.items() if last.get(name, -1) > index}
    return np.asarray(values[tensor])


def dense(sparse: SparseTensorProto, most: int) -> NDArray[Any]:
    """A sparse initializer as an array."""
    size = math.prod(sparse.dims)
    if size > most:
        raise ModelError(f"the sparse initializer '{sparse.values.name}' has {size} elements: too many to write out")
    values, places = weights.array(sparse.values), weights.array(sparse.indices)
    whole = np.zeros(size, values.dtype)
    whole[places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))] = values
    return whole.reshape(tuple(sparse.dims))


def _size(node: NodeProto, given: Mapping[str, Value], opsets: list[OperatorSetIdProto]) -> int | None:
    """How many elements a node makes from these inputs; None where nothing tells."""
    known = {name: value for name, value in given.items() if isinstance(value, np.ndarray) and value.size <= SIZES}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_value_info(name, _type(value)) for name, value in given.items()],
        [],
        [numpy_helper.from_array(value, name) for name, value in known.items()],
    )
    try:
        found = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets)).graph.value_info
    except Exception:
        return None
    sizes = {value.name: _declared_size(value.type) for value in found}
    made = [sizes.get(name) for name in node.output if name]
    if all(size is not None for size in made):
        return sum(size or 0 for size in made)
    if node.op_type not in NO_LARGER:
        return None
    return sum(_elements(value) * max(1, np.ndim(value)) for value in given.values())


def _declared_size(kind: TypeProto) -> int | None:
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or any(
        not dim.HasField("dim_value") or dim.dim_value < 0 for dim in dims
    ):
        return None
    return math.prod(int(dim.dim_value) for dim in dims)


def _elements(value: Value) -> int:
    return sum(map(_elements, value)) if isinstance(value, list) else int(np.size(value))


def _type(value: Value) -> TypeProto:
    if isinstance(value, list):
        return helper.make_sequence_type_proto(_type(value[0] if value else np.zeros(0, np.float32)))
    array = np.asarray(value)
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _evaluated(node: NodeProto, given: Mapping[str, Value], opsets: list[OperatorSetIdProto]) -> dict[str, Value]:
    from onnx.reference import ReferenceEvaluator  # slow to import, and most models never need it

    names = [name for name in node.output if name]
    inputs, outputs = ([ValueInfoProto(name=name) for name in side] for side in (given, names))
    graph = helper.make_graph([node], "one", inputs, outputs)
    made: Any = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets)).run(None, dict(given))
    return dict(zip(names, made, strict=True))
