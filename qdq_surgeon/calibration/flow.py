"""If, Loop and Scan run step by step, so that the tensors inside their bodies can be read.

onnxruntime gives nothing of what is inside a body, so the body becomes a model of its own, which is run as often as
the node would run it. Semantics: ONNX operator documentation of If, Loop (opset 13) and Scan (opset 9).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, TypeProto, helper, numpy_helper

from ..graph import Graph, Node, bodies, captured_edges
from ..model import Model
from .feeds import Batch

Values: TypeAlias = Mapping[str, Any]
"""Tensors by name; a sequence is a list of arrays."""
Visit: TypeAlias = Callable[[str, NDArray[Any]], None]
"""Takes the name and the values of a tensor that was to be read."""


class Runner(Protocol):
    """Runs a model on one feed, lets `visit` see what is to be read, and gives the results asked for."""

    def run(self, batch: Batch, visit: Visit) -> Values: ...


Opener: TypeAlias = Callable[[Model, Sequence[str], Sequence[str], Batch], Runner]
"""Opens a model: the tensors to read, the results to give, the first feed."""

TypeOf: TypeAlias = Callable[[str], TypeProto]
"""The type of a tensor that a body captures."""


class Flow:
    """One control-flow node, with the tensors inside its bodies that are to be read."""

    def __init__(self, node: Node, graph: Graph, tensors: Sequence[str], opener: Opener, type_of: TypeOf) -> None:
        self._node = node
        self._graph = graph
        self._bodies = {
            name: _Body(node, name, body, graph, tensors, opener, type_of) for name, body in bodies(node.proto)
        }
        reads = dict.fromkeys((*node.inputs, *node.captured))
        self.inputs = tuple(name for name in reads if name and not graph.is_constant(name))

    def run(self, values: Values, visit: Visit) -> dict[str, Any]:
        """The node's outputs for these inputs."""
        how = {"If": self._if, "Loop": self._loop, "Scan": self._scan}[self._node.op]
        given = [self._value(name, values) for name in self._node.inputs]
        outputs = how(given, values, visit)
        return {name: value for name, value in zip(self._node.outputs, outputs, strict=True) if name}

    def _value(self, name: str, values: Values) -> Any:
        if not name:
            return None
        return values[name] if name in values else self._graph.value(name)

    def _if(self, given: list[Any], values: Values, visit: Visit) -> list[Any]:
        branch = "then_branch" if np.all(given[0]) else "else_branch"
        return self._bodies[branch].run([], values, visit)

    def _loop(self, given: list[Any], values: Values, visit: Visit) -> list[Any]:
        limit, state = given[0], given[2:]
        going = given[1] is None or bool(np.all(given[1]))
        steps: list[list[Any]] = []
        for index in itertools.count() if limit is None else range(int(np.asarray(limit).item())):
            if not going:
                break
            first, *results = self._bodies["body"].run(
                [np.array(index, np.int64), np.array(going), *state], values, visit
            )
            going = bool(np.all(first))
            state, made = results[: len(state)], results[len(state) :]
            steps.append(made)
        return [*state, *self._stacked(steps, len(state))]

    def _scan(self, given: list[Any], values: Values, visit: Visit) -> list[Any]:
        number = len(given) - int(self._node.attribute("num_scan_inputs"))
        state, scanned = given[:number], given[number:]
        axes = self._each("scan_input_axes", len(scanned))
        backward = self._each("scan_input_directions", len(scanned))
        rows = [
            np.flip(np.moveaxis(array, axis, 0), 0) if turned else np.moveaxis(array, axis, 0)
            for array, axis, turned in zip(scanned, axes, backward, strict=True)
        ]
        steps: list[list[Any]] = []
        for index in range(len(rows[0])):
            slices = [np.ascontiguousarray(row[index]) for row in rows]
            results = self._bodies["body"].run([*state, *slices], values, visit)
            state, made = results[:number], results[number:]
            steps.append(made)
        stacked = list(self._stacked(steps, number))
        axes = self._each("scan_output_axes", len(stacked))
        backward = self._each("scan_output_directions", len(stacked))
        turned = [np.flip(array, 0) if back else array for array, back in zip(stacked, backward, strict=True)]
        return [*state, *(np.moveaxis(array, 0, axis) for array, axis in zip(turned, axes, strict=True))]

    def _each(self, attribute: str, number: int) -> list[int]:
        return list(self._node.attribute(attribute) or [0] * number)

    def _stacked(self, steps: list[list[Any]], carried: int) -> Iterator[NDArray[Any]]:
        """What every step gave, along a new first axis; empty where there was no step."""
        for index, name in enumerate(self._node.outputs[carried:]):
            if steps:
                yield np.stack([made[index] for made in steps])
                continue
            dims = self._graph.shape(name) or (0,)
            dtype = helper.tensor_dtype_to_np_dtype(self._graph.element_type(name) or TensorProto.FLOAT)
            yield np.zeros((0, *(dim or 0 for dim in dims[1:])), dtype)


class _Body:
    """One body as a model of its own, whose inputs are its formal inputs and what it captures."""

    def __init__(
        self,
        node: Node,
        name: str,
        body: onnx.GraphProto,
        graph: Graph,
        tensors: Sequence[str],
        opener: Opener,
        type_of: TypeOf,
    ) -> None:
        path = f"{node.first_output}.{name}"
        captured = {tensor for tensor, edge in captured_edges(node.proto, ()) if edge.scope[0] == path}
        self._model = _standalone(body, path, captured, graph, type_of)
        self._formal = [value.name for value in body.input]
        self._captured = [tensor for tensor in sorted(captured) if not graph.is_constant(tensor)]
        self._outputs = [value.name for value in body.output]
        self._read = {key.removeprefix(f"{path}/"): key for key in tensors if key.startswith(f"{path}/")}
        inner = self._model.graph
        given = {*inner.inputs, *(output for output in self._outputs if inner.is_constant(output))}
        self._results = [output for output in dict.fromkeys(self._outputs) if output not in given]
        self._opener = opener
        self._runner: Runner | None = None
        self._lock = threading.Lock()

    def run(self, given: Sequence[Any], values: Values, visit: Visit) -> list[Any]:
        """The body's outputs, in order."""
        feed = dict(zip(self._formal, given, strict=True)) | {name: values[name] for name in self._captured}
        batch = Batch(feed, 1)
        with self._lock:
            if self._runner is None:
                self._runner = self._opener(self._model, list(self._read), self._results, batch)
        results = self._runner.run(batch, lambda name, array: visit(self._read[name], array))
        return [self._output(name, feed, results) for name in self._outputs]

    def _output(self, name: str, feed: Values, results: Values) -> Any:
        for known in (results, feed):
            if name in known:
                return known[name]
        return self._model.graph.value(name)


def _standalone(body: onnx.GraphProto, path: str, captured: set[str], graph: Graph, type_of: TypeOf) -> Model:
    """A body as a model. What it captures comes in as an input, or as an initializer where it is constant."""
    whole = graph.proto
    proto = ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
    proto.graph.CopyFrom(body)
    del proto.graph.input[:]
    for value in body.input:
        proto.graph.input.append(_untied(value, graph.type(f"{path}/{value.name}")))
    for name in sorted(captured):
        if graph.is_constant(name):
            proto.graph.initializer.append(numpy_helper.from_array(graph.value(name), name))
        else:
            proto.graph.input.append(helper.make_value_info(name, type_of(name)))
    return Model(proto, proto)


def _untied(value: onnx.ValueInfoProto, known: TypeProto | None) -> onnx.ValueInfoProto:
    """A formal input without its declared shape, which may change from step to step."""
    element = value.type.tensor_type.elem_type or TensorProto.FLOAT
    return helper.make_value_info(value.name, known or helper.make_tensor_type_proto(element, None))
