"""BF16 models in FP32, for onnxruntime, whose CPU kernels do not know BF16. Every BF16 value is an FP32 value."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, ValueInfoProto, numpy_helper

from . import weights
from .graph import all_nodes, bodies

TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type"})
"""The attributes that hold an element type."""


def widened(proto: ModelProto) -> ModelProto:
    """The model with FP32 in the place of BF16, a copy; the model itself where it holds none."""
    if not any(value.elem_type == TensorProto.BFLOAT16 for value in _types(proto)) and not any(
        tensor.data_type == TensorProto.BFLOAT16 for tensor in _tensors(proto)
    ):
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    for tensor in _tensors(copy):
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(weights.array(tensor).astype(np.float32), tensor.name))
    for value in _types(copy):
        if value.elem_type == TensorProto.BFLOAT16:
            value.elem_type = TensorProto.FLOAT
    for attribute in _attributes(copy):
        if attribute.name in TYPE_ATTRIBUTES and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
    return copy


def _graphs(proto: ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for node in all_nodes(proto.graph):
        yield from (body for _, body in bodies(node))


def _attributes(proto: ModelProto) -> Iterator[AttributeProto]:
    for graph in (proto.graph, *proto.functions):
        for node in all_nodes(graph):
            yield from node.attribute


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    for graph in _graphs(proto):
        yield from graph.initializer
    yield from (attribute.t for attribute in _attributes(proto) if attribute.type == AttributeProto.TENSOR)


def _types(proto: ModelProto) -> Iterator[onnx.TypeProto.Tensor]:
    values: Iterator[ValueInfoProto] = (
        value for graph in _graphs(proto) for value in (*graph.input, *graph.output, *graph.value_info)
    )
    yield from (value.type.tensor_type for value in values if value.type.HasField("tensor_type"))
