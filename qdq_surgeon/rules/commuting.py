"""Ops that only move or select data: Q and DQ pass through them unchanged.

Source: NVIDIA TensorRT documentation, "Explicit Quantization": a layer commutes with quantization when
quantizing its input or its output gives the same; max pooling and data movement do.
"""

from __future__ import annotations

from ..graph import Graph, Node

MOVES = frozenset(
    {
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Each moves the tensor in slot 0; its other inputs are integers."""


def commutes(node: Node, graph: Graph) -> bool:
    """True where every value of the node's float outputs is a value of its input 0 (or zero, for Pad)."""
    if node.op == "Pad":
        return bool(node.attribute("mode") != "constant") or _pads_with_zero(node, graph)
    if node.op == "Resize":
        return bool(node.attribute("mode") == "nearest")
    return node.op in MOVES


def moved_from(tensor: str, graph: Graph) -> str | None:
    """The activation whose values `tensor` holds, one commuting op upstream, or None."""
    node = graph.producer(tensor)
    if node is None or not commutes(node, graph):
        return None
    source = node.inputs[0]
    return source if graph.is_float(source) and not graph.is_constant(source) else None


def _pads_with_zero(node: Node, graph: Graph) -> bool:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return True
    return graph.is_constant(node.inputs[2]) and not graph.value(node.inputs[2]).any()
