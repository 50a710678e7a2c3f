"""Weights stored as INT8 with a DequantizeLinear alone: a quarter of the file, and the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from .existing import graphs_of, is_linear, names_read, replace_items
from .graph import Graph


def store_weights(quantized: ModelProto) -> ModelProto:
    """A copy of a Q/DQ model in which no QuantizeLinear reads a constant: what it made is an initializer.

    Source of the rounding: ONNX's QuantizeLinear, half to even, saturated to -128..127.
    """
    view = Graph(quantized, deep=True)
    proto = ModelProto()
    proto.CopyFrom(quantized)
    for scope, graph in graphs_of(proto.graph):
        stored = [node for node in graph.node if _is_weight(view, scope, node)]
        for node in stored:
            graph.initializer.append(numpy_helper.from_array(_integers(view, scope, node), node.output[0]))
        gone = {node.output[0] for node in stored}
        replace_items(graph.node, [node for node in graph.node if node.output[0] not in gone])
    _drop_unread(proto.graph, {name for node in view.nodes if is_linear(node.proto) for name in node.inputs[:1]})
    return proto


def _is_weight(view: Graph, scope: tuple[str, ...], node: NodeProto) -> bool:
    return is_linear(node, "QuantizeLinear") and view.is_constant(view.key(scope, node.input[0]))


def _integers(view: Graph, scope: tuple[str, ...], node: NodeProto) -> NDArray[Any]:
    value, scale, zero = (view.value(view.key(scope, name)) for name in node.input)
    axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
    shape = [1] * value.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    bounds = np.iinfo(zero.dtype)
    levels = np.rint(value.astype(np.float32) / scale.astype(np.float32).reshape(shape)) + zero.reshape(shape)
    return np.asarray(np.clip(levels, bounds.min, bounds.max), zero.dtype)


def _drop_unread(graph: GraphProto, candidates: set[str]) -> None:
    """Take out the float weights that nobody reads any more, and what declares them."""
    read = {name for node in graph.node for name in names_read(node)} | {output.name for output in graph.output}
    gone = candidates - read
    for field in (graph.initializer, graph.input, graph.value_info):
        replace_items(field, [item for item in field if item.name not in gone])
