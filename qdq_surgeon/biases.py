"""Biases with a shift: put into a Q/DQ model, and taken out again.

A corrected bias keeps its name where nobody else reads it. The node carries what it read before, so that stripping
the pairs gives the float model back, bit for bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from . import weights
from .edges import Edge
from .graph import FreshNames, Graph, first_output_of

BIAS_KEY = "qdq_surgeon.bias"


def shift_biases(proto: ModelProto, graph: Graph, shifts: Mapping[Edge, NDArray[Any]], names: FreshNames) -> None:
    """Add to each bias, by the edge that reads it, one number per channel; `graph` is the float model's."""
    nodes = {first_output_of(node): node for node in proto.graph.node}
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    left = {name: len(graph.readers(name)) for name in initializers}
    for edge, shift in shifts.items():
        node = nodes[edge.reader]
        name = node.input[edge.slot] if edge.slot < len(node.input) else ""
        tensor = numpy_helper.from_array(_shifted(graph, node, name, shift), name)
        record: dict[str, Any] = {"slot": edge.slot, "name": name}
        if left.get(name) == 1:
            before = initializers[name]
            whole = numpy_helper.from_array(graph.value(name), name) if weights.is_outside(before) else before
            record["tensor"] = base64.b64encode(whole.SerializeToString()).decode()
            before.CopyFrom(tensor)
        else:
            left[name] = left.get(name, 0) - 1
            tensor.name = names.fresh(f"{name or edge.reader + '_bias'}_corrected")
            proto.graph.initializer.append(tensor)
            node.input.extend([""] * (edge.slot + 1 - len(node.input)))
            node.input[edge.slot] = tensor.name
        node.metadata_props.add(key=BIAS_KEY, value=json.dumps(record))


def _shifted(graph: Graph, node: NodeProto, name: str, shift: NDArray[Any]) -> NDArray[Any]:
    beta = next((item.f for item in node.attribute if item.name == "beta"), 1.0)
    if name:
        before = graph.value(name)
    else:
        kind = helper.tensor_dtype_to_np_dtype(graph.element_type(node.output[0]) or TensorProto.FLOAT)
        before = np.zeros(shift.shape, kind)
    return np.asarray(before.astype(np.float64) + shift.reshape(before.shape) / beta, before.dtype)


def restore_biases(graph: GraphProto, readers: Collection[str] | None = None) -> None:
    """Let every node that reads a shifted bias (of those among `readers`) read what it read before."""
    for node in graph.node:
        entry = next((entry for entry in node.metadata_props if entry.key == BIAS_KEY), None)
        if entry is None or (readers is not None and first_output_of(node) not in readers):
            continue
        node.metadata_props.remove(entry)
        try:
            _restore(graph, node, **json.loads(entry.value))
        except Exception:  # edited by hand, or not ours: the bias stays as it is
            continue


def _restore(graph: GraphProto, node: NodeProto, slot: int, name: str, tensor: str = "") -> None:
    current = next(item for item in graph.initializer if item.name == node.input[slot])
    if tensor:
        before = TensorProto.FromString(base64.b64decode(tensor, validate=True))
        if weights.is_outside(before) or before.dims != current.dims:
            return
        if before.data_type != current.data_type:  # the model was put into FP16
            kind = helper.tensor_dtype_to_np_dtype(current.data_type)
            before = numpy_helper.from_array(numpy_helper.to_array(before).astype(kind))
        before.name = current.name
        current.CopyFrom(before)
        return
    if name:
        node.input[slot] = name
    else:
        del node.input[slot]
    if not any(current.name in other.input for other in graph.node):
        graph.initializer.remove(current)
