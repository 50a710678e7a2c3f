"""Biases with a shift: put into a Q/DQ model, and taken out again.

A corrected bias keeps its name where nobody else reads it. The node carries what it read before, so that stripping
the pairs gives the float model back, bit for bit.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections import Counter
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
    initializers = {tensor.name: (index, tensor) for index, tensor in enumerate(proto.graph.initializer)}
    listed = {value.name for value in proto.graph.input}
    read = {edge: _bias_name(nodes[edge.reader], edge.slot) for edge in shifts}
    shifted_by = Counter(read.values())
    gone = set()
    for edge, shift in shifts.items():
        node, name = nodes[edge.reader], read[edge] or ""
        ours = name in initializers and len(graph.readers(name)) == shifted_by[name]
        record: dict[str, Any] = {"slot": edge.slot, "name": read[edge]}
        tensor = numpy_helper.from_array(_shifted(graph, node, name, shift), name)
        alone = ours and shifted_by[name] == 1
        if alone or (ours and name not in listed):
            record["tensor"] = _text(graph, initializers[name][1])
        if alone:
            initializers[name][1].CopyFrom(tensor)
        else:
            tensor.name = names.fresh(f"{name or edge.reader + '_bias'}_corrected")
            proto.graph.initializer.append(tensor)
            node.input.extend([""] * (edge.slot + 1 - len(node.input)))
            node.input[edge.slot] = tensor.name
            if "tensor" in record:
                record["index"] = initializers[name][0]
                gone.add(name)
        node.metadata_props.add(key=BIAS_KEY, value=json.dumps(record))
    for name in gone:
        proto.graph.initializer.remove(initializers[name][1])


def _bias_name(node: NodeProto, slot: int) -> str | None:
    """What a node reads; None where it has no such input."""
    return str(node.input[slot]) if slot < len(node.input) else None


def _text(graph: Graph, tensor: TensorProto) -> str:
    whole = numpy_helper.from_array(graph.value(tensor.name), tensor.name) if weights.is_outside(tensor) else tensor
    return base64.b64encode(whole.SerializeToString()).decode()


def _shifted(graph: Graph, node: NodeProto, name: str, shift: NDArray[Any]) -> NDArray[Any]:
    beta = next((item.f for item in node.attribute if item.name == "beta"), 1.0)
    if name:
        before = graph.value(name)
    else:
        kind = helper.tensor_dtype_to_np_dtype(graph.element_type(node.output[0]) or TensorProto.FLOAT)
        before = np.zeros(shift.shape, kind)
    return np.asarray(before.astype(np.float64) + shift.reshape(before.shape) / beta, before.dtype)


def restore_biases(graph: GraphProto, readers: Collection[str] | None = None) -> None:
    """Let every node that reads a shifted bias (of those among `readers`) read what it read before.

    A record that was edited by hand, or is not ours, is dropped, and its bias stays.
    """
    made: set[str] = set()
    for node in graph.node:
        entry = next((entry for entry in node.metadata_props if entry.key == BIAS_KEY), None)
        if entry is not None and (readers is None or first_output_of(node) in readers):
            node.metadata_props.remove(entry)
            with contextlib.suppress(Exception):
                _restore(graph, made, node, **json.loads(entry.value))
        made.update(node.output)


def _restore(
    graph: GraphProto,
    made: Collection[str],
    node: NodeProto,
    slot: int,
    name: str | None,
    tensor: str = "",
    index: int = 0,
) -> None:
    initializers = {item.name: item for item in graph.initializer}
    current = initializers[node.input[slot]]
    before = _tensor(tensor, current) if tensor else None
    if name == current.name:
        current.CopyFrom(before)
        return
    if name and name not in initializers:
        if before is None and name not in made:
            raise ValueError(name)
        if before is not None:
            before.name = name
            graph.initializer.insert(index, before)
    if name is None:
        del node.input[slot]
    else:
        node.input[slot] = name
    if not any(current.name in other.input for other in graph.node):
        graph.initializer.remove(next(item for item in graph.initializer if item.name == current.name))


def _tensor(text: str, current: TensorProto) -> TensorProto:
    """The bias as it was, in the type that the model has now. Raises ValueError for what is no such bias."""
    before: TensorProto = TensorProto.FromString(base64.b64decode(text, validate=True))
    if weights.is_outside(before) or math.prod(before.dims) != math.prod(current.dims):
        raise ValueError(before.name)
    values = numpy_helper.to_array(before)
    if before.data_type != current.data_type:  # the model was put into FP16
        before = numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(current.data_type)))
    before.name = current.name
    return before
