"""Weights stored as INT8 with a DequantizeLinear alone: a quarter of the file, and the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from .existing import DEFAULT_AXIS, drop_constants, drop_items, graphs_of, is_linear
from .graph import Graph, Node, first_output_of


def store_weights(quantized: ModelProto) -> ModelProto:
    """A copy of a Q/DQ model in which no QuantizeLinear to 8 bits reads a constant: what it made is an initializer.

    One whose scale or zero point is computed, or that has a scale per block, stays.
    Source of the rounding: ONNX's QuantizeLinear, half to even, saturated.
    """
    view = Graph(quantized, deep=True)
    proto = ModelProto()
    proto.CopyFrom(quantized)
    graphs = list(reversed(list(graphs_of(proto.graph))))
    left_over: set[str] = set()
    for scope, graph in graphs:
        nodes = (view.producer(view.key(scope, first_output_of(node))) for node in graph.node)
        found = ((node, _integers(view, node)) for node in nodes if node and is_linear(node.proto, "QuantizeLinear"))
        stored = {node.proto.output[0]: values for node, values in found if values is not None}
        left_over |= {
            view.key(scope, name) for node in graph.node if first_output_of(node) in stored for name in node.input
        }
        drop_items(graph.node, stored, first_output_of)
        graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in stored.items())
    for scope, graph in graphs:
        drop_constants(view, scope, graph, left_over)
    return proto


def _integers(view: Graph, node: Node) -> NDArray[Any] | None:
    """What a QuantizeLinear makes, where it is 8-bit integers and follows from constants, with a scale per channel."""
    value, scale = (view.known_value(name) for name in node.inputs[:2])
    zero = _zero_point(view, node)
    if value is None or scale is None or zero is None or zero.dtype not in (np.int8, np.uint8):
        return None
    shape = [1] * value.ndim
    if scale.size > 1:
        axis = node.attribute("axis")
        axis = DEFAULT_AXIS if axis is None else axis
        if scale.ndim > 1 or value.shape[axis] != scale.size:
            return None
        shape[axis] = scale.size
    bounds = np.iinfo(zero.dtype)
    levels = np.rint(value.astype(np.float32) / scale.astype(np.float32).reshape(shape))
    levels += zero.reshape(shape if zero.size > 1 else [1] * value.ndim)
    return np.asarray(np.clip(levels, bounds.min, bounds.max), zero.dtype)


def _zero_point(view: Graph, node: Node) -> NDArray[Any] | None:
    if any(node.inputs[2:]):
        return view.known_value(node.inputs[2])
    kind = node.attribute("output_dtype") or TensorProto.UINT8
    return np.zeros((), helper.tensor_dtype_to_np_dtype(kind))
