"""Parts of a graph as models of their own, in a folder where the weights lie once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from .. import weights
from ..graph import Graph, Node
from ..storage import WeightFolder
from .sessions import Session, runnable


def leading_to(graph: Graph, tensors: Iterable[str]) -> list[Node]:
    """The nodes of the top graph that lead to the tensors."""
    wanted, nodes = set(tensors), []
    for node in reversed(graph.nodes):
        if not node.scope and wanted.intersection(node.outputs):
            nodes.append(node)
            wanted.update(filter(None, (*node.inputs, *node.captured)))
    return nodes[::-1]


def reads(graph: Graph, nodes: Iterable[Node]) -> set[str]:
    """What the nodes read that is fed or computed from it."""
    names = {name for node in nodes for name in (*node.inputs, *node.captured)}
    return {name for name in names if (graph.producer(name) or name in graph.inputs) and not graph.is_constant(name)}


def size_of(shape: tuple[int | None, ...] | None) -> int | None:
    """The number of elements; None where a dimension is unknown."""
    known = [dim for dim in shape or () if dim is not None]
    return math.prod(known) if shape is not None and len(known) == len(shape) else None


class Parts:
    """A folder with the weights in one file and graphs beside it that refer to it, so that no copy is held twice."""

    def __init__(self, graph: Graph, folder: Path, nodes: Sequence[Node]) -> None:
        self._graph = graph
        self._folder = folder
        self._written = 0
        self._learned: dict[str, TypeProto] = {}
        read = {name for node in nodes for name in (*node.inputs, *node.captured)}
        needed = [tensor for tensor in graph.proto.graph.initializer if tensor.name in read]
        self.weight_bytes = sum(map(weights.size, needed))
        self.mapped = any(map(weights.is_outside, needed))
        with WeightFolder(folder) as beside:
            self._initializers = {tensor.name: beside.put(tensor) for tensor in needed}

    def replace(self, name: str, values: NDArray[Any]) -> None:
        """Write later parts with another value of an initializer."""
        self._initializers[name] = numpy_helper.from_array(values, name)

    def inputs(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """What must be fed to run these nodes alone."""
        made = {output for node in nodes for output in node.outputs}
        return tuple(sorted(reads(self._graph, nodes) - made))

    def write(self, nodes: Sequence[Node], outputs: Sequence[str], sizes: bool = False) -> Path:
        """The file of a graph of these nodes, and of the constants they read, with these outputs (or their sizes)."""
        whole = self._graph.proto
        proto = ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
        graph = proto.graph
        graph.name = whole.graph.name or "graph"
        graph.sparse_initializer.extend(whole.graph.sparse_initializer)
        constants = [name for node in nodes for name in (*node.inputs, *node.captured) if self._graph.is_constant(name)]
        both = leading_to(self._graph, constants) + list(nodes)
        every = list({node.first_output: node for node in both}.values())
        graph.node.extend(node.proto for node in every)
        used = {name for node in every for name in (*node.inputs, *node.captured)}
        graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in used)
        declared = {value.name: value for value in whole.graph.input}
        for name in self.inputs(nodes):
            graph.input.append(declared.get(name) or helper.make_value_info(name, self.type(name)))
        for index, name in enumerate(outputs):
            output = f"qdq_surgeon/size_{index}" if sizes else name
            if sizes:
                graph.node.append(helper.make_node("Size", [name], [output]))
            graph.output.append(ValueInfoProto(name=output))  # onnxruntime finds the type
        self._written += 1
        path = self._folder / f"{self._written}.onnx"
        path.write_bytes(runnable(proto).SerializeToString())
        return path

    def learn(self, session: Session) -> None:
        """Note the types of what a part makes: shape inference does not know those of custom ops."""
        self._learned |= session.types

    def type(self, name: str) -> TypeProto:
        """The type of what a part reads; an FP32 tensor where neither inference nor an earlier part told."""
        known = self._graph.type(name) or self._learned.get(name)
        return known or helper.make_tensor_type_proto(TensorProto.FLOAT, None)
