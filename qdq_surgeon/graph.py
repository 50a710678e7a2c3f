"""A read-only view of a model's graph: nodes in an order that does not depend on how they are stored, who produces and
who reads each tensor, element types, shapes, constants. The rules work on it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, TypeProto, helper

from . import folding, weights
from .edges import GRAPH_OUTPUT, Edge, count, scoped
from .errors import ModelError

MIN_OPSET = 13
"""Per-channel QuantizeLinear and DequantizeLinear exist from opset 13."""
HALF_OPSET = 19
"""QuantizeLinear and DequantizeLinear take FP16 and BF16 scales from opset 19."""
PER_TENSOR_OPSET = 10
"""QuantizeLinear and DequantizeLinear exist from opset 10, per tensor."""
MIN_IR = 4
"""Below IR 4 every initializer must be a graph input too, so new ones would be invalid."""

HALF_TYPES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
FLOAT_TYPES = frozenset({TensorProto.FLOAT}) | HALF_TYPES
"""The element types that Q/DQ can read. DOUBLE is not among them."""

QDQ_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})
INTEGER_OPS = re.compile(
    r"QLinear\w+|QGemm|QAttention|\w+Integer(ToFloat)?|DynamicQuantize\w+|QEmbedLayerNormalization|QOrdered\w+"
)
"""Ops of models that are quantized in operator form, ONNX's and onnxruntime's. TensorRT refuses them."""

NOT_FOLDABLE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
DATA_FREE_OPS = frozenset({"Shape", "Size"})
"""Ops that read a float tensor without its values."""

ONNX_DOMAINS = frozenset({"", "ai.onnx"})
CONTROL_OPS = frozenset({"If", "Loop", "Scan"})
"""The ops whose bodies are planned."""


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One node. `op` carries the domain where it is not ONNX's own: 'com.microsoft::FusedConv'.

    Tensors inside a control-flow body go by their name with the body's scope before it. `edges` holds the edge of
    each input slot, `captured` the outer tensors that the node's own bodies read, `results` what its bodies give.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    first_output: str
    edges: tuple[Edge, ...]
    captured: tuple[str, ...]
    proto: NodeProto
    scope: tuple[str, ...] = ()
    results: tuple[str, ...] = ()

    @staticmethod
    def of(proto: NodeProto, scope: _Scope | None = None) -> Node:
        scope = scope or _Scope(onnx.GraphProto())
        op = proto.op_type if proto.domain in ONNX_DOMAINS else f"{proto.domain}::{proto.op_type}"
        first = first_output_of(proto)
        edges = tuple(Edge(scope.path, first, slot, op, proto.name) for slot in range(len(proto.input)))
        captured = tuple(dict.fromkeys(scope.key(tensor) for tensor, _ in captured_edges(proto, scope.path)))
        return Node(
            op,
            proto.name,
            tuple(map(scope.key, proto.input)),
            tuple(map(scope.key, proto.output)),
            scope.key(first),
            edges,
            captured,
            proto,
            scope.path,
            tuple(key for inner in scope.inner(proto) for key in inner.results),
        )

    @property
    def own_edge(self) -> Edge:
        """An edge that a report can point to for the whole node, inputs or none."""
        return Edge(self.scope, first_output_of(self.proto), 0, self.op, self.name)

    @property
    def label(self) -> str:
        return self.own_edge.label

    def attribute(self, name: str) -> Any:
        """The attribute's value, or the schema's default, or None."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                return _plain(helper.get_attribute_value(attribute))
        return _default(self.proto.op_type, self.proto.domain, name)


class _Scope:
    """The names that can be read in one graph: its own, and those of the graphs around it."""

    def __init__(self, graph: onnx.GraphProto, path: tuple[str, ...] = (), outer: _Scope | None = None) -> None:
        self.graph = graph
        self.path = path
        local = _local_names(graph) if outer else ()
        own = {name: scoped(path, name) for name in local}
        self._keys: ChainMap[str, str] = outer._keys.new_child(own) if outer else ChainMap(own)

    def key(self, name: str) -> str:
        """The name by which the whole model knows a tensor that is read here."""
        return self._keys.get(name, name)

    def inner(self, node: NodeProto) -> list[_Scope]:
        """The scopes of a control-flow node's bodies."""
        first = first_output_of(node)
        return [_Scope(body, (*self.path, f"{first}.{name}"), self) for name, body in entered(node)]

    @property
    def results(self) -> tuple[str, ...]:
        return tuple(self.key(value.name) for value in self.graph.output)


class Graph:
    """A read-only view of a model's graph, with the bodies of its If, Loop and Scan nodes where `deep` asks for them.

    `nodes` holds the nodes that lead to an output, producers first, in an order that follows from the graph's
    structure alone (depth first from the outputs, inputs by slot); the nodes of bodies come before the node that
    holds them. Tensors inside bodies go by `scoped` names. Without `deep`, what bodies read from outside counts as
    read by an edge with their scope.
    """

    def __init__(self, proto: ModelProto, deep: bool = False) -> None:
        self.proto = proto
        self.opset = default_opset(proto)
        self._deep = deep
        self._quantizable = FLOAT_TYPES if self.opset >= HALF_OPSET else FLOAT_TYPES - HALF_TYPES
        self._initializers: dict[str, TensorProto] = {}
        self._sparse: dict[str, SparseTensorProto] = {}
        self._producers: dict[str, Node] = {}
        self._homes: dict[str, tuple[tuple[str, ...], str]] = {}
        self._bodies: dict[str, list[_Scope]] = {}
        self._scopes: dict[tuple[str, ...], _Scope] = {}
        self._enter(_Scope(proto.graph))
        fed = [value.name for value in proto.graph.input if value.name not in self._initializers]
        self.inputs: tuple[str, ...] = tuple(fed)
        self.outputs: tuple[str, ...] = tuple(value.name for value in proto.graph.output)
        self.nodes: tuple[Node, ...] = tuple(self._ordered())
        self._positions = {node.first_output: index for index, node in enumerate(self.nodes)}
        self._readers: dict[str, tuple[Edge, ...]] = self._read()
        found = _inferred(proto, self._top())
        self._types, self._shapes, self._containers = found.types, found.shapes, found.containers
        self._complete_types()
        self._constants = self._find_constants()
        self.notes: tuple[str, ...] = (*found.notes, *self._notes())

    def _enter(self, scope: _Scope) -> None:
        """Take in a graph's nodes and initializers, and those of its bodies."""
        self._scopes[scope.path] = scope
        if scope.path:
            self._homes |= {scope.key(name): (scope.path, name) for name in _local_names(scope.graph)}
        self._initializers |= {scope.key(tensor.name): tensor for tensor in scope.graph.initializer}
        self._sparse |= {scope.key(tensor.values.name): tensor for tensor in scope.graph.sparse_initializer}
        for proto in scope.graph.node:
            node = Node.of(proto, scope)
            for output in filter(None, node.outputs):
                if output in self._producers:
                    raise ModelError(f"two nodes make the tensor '{output}': it is not a valid ONNX model")
                self._producers[output] = node
            if self._deep and node.results:
                self._bodies[node.first_output] = scope.inner(proto)
            for inner in self._bodies.get(node.first_output, ()):
                self._enter(inner)

    def _top(self) -> list[Node]:
        return [node for node in self.nodes if not node.scope]

    def home(self, tensor: str) -> tuple[tuple[str, ...], str]:
        """The scope in which a tensor is made or declared, and its name there."""
        return self._homes.get(tensor, ((), tensor))

    def key(self, scope: tuple[str, ...], name: str) -> str:
        """The name by which the whole model knows what is called `name` in a scope."""
        return self._scopes[scope].key(name)

    def producer(self, tensor: str) -> Node | None:
        """The node that makes `tensor`; None for graph inputs and initializers."""
        return self._producers.get(tensor)

    def readers(self, tensor: str) -> tuple[Edge, ...]:
        """The edges that read `tensor`: in the order of `nodes`, then those of the graph's own outputs."""
        return self._readers.get(tensor, ())

    def reading_node(self, edge: Edge) -> Node | None:
        """The node of an edge; None for the output of a graph or body (and, unless `deep`, inside bodies)."""
        if edge.slot == GRAPH_OUTPUT or (edge.scope and not self._deep):
            return None
        return self._producers.get(edge.key)

    def position(self, tensor: str) -> int:
        """Where in `nodes` the tensor is made; -1 for graph inputs and initializers."""
        node = self._producers.get(tensor)
        return self._positions.get(node.first_output, -1) if node else -1

    def is_constant(self, tensor: str) -> bool:
        """True for initializers and tensors that follow from them alone (Constant, Cast, Transpose, Reshape ...)."""
        return tensor in self._constants and tensor not in self._containers

    def is_float(self, tensor: str) -> bool:
        """True for the tensors that Q/DQ can read: FP32, and from opset 19 on FP16 and BF16."""
        return self._types.get(tensor) in self._quantizable

    def element_type(self, tensor: str) -> int | None:
        """The TensorProto.DataType of a tensor, None where it is unknown."""
        return self._types.get(tensor)

    def type(self, tensor: str) -> TypeProto | None:
        """The type without dimensions, of sequences and optional values too; None where it is unknown."""
        element = self._types.get(tensor)
        return helper.make_tensor_type_proto(element, None) if element else self._containers.get(tensor)

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """The dimensions (None: dynamic), or None where the rank is unknown."""
        return self._shapes.get(tensor)

    def shapes_for(self, fed: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int | None, ...]]:
        """The dimensions of all tensors when the inputs have these shapes, as far as inference finds them."""
        return _inferred(self.proto, self._top(), fed).shapes

    def value(self, tensor: str) -> NDArray[Any]:
        """The value of a constant tensor. Raises ModelError where it cannot be computed."""
        literal = self._initializers.get(tensor) or self._sparse.get(tensor) or self._literal(tensor)
        if literal is None:
            return self._fold(tensor)
        try:
            if isinstance(literal, SparseTensorProto):
                return folding.dense(literal, self._most_folded)
            return weights.array(literal)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the values of '{tensor}' cannot be read: {one_line(error)}") from error

    def known_value(self, tensor: str) -> NDArray[Any] | None:
        """The value of a constant tensor; None where it is none, or cannot be computed."""
        if not tensor or not self.is_constant(tensor):
            return None
        try:
            return self.value(tensor)
        except ModelError:
            return None

    def _literal(self, tensor: str) -> TensorProto | None:
        """The tensor in a Constant node, where it is written as one."""
        node = self._producers.get(tensor)
        value = node.attribute("value") if node is not None and node.op == "Constant" else None
        return value if isinstance(value, TensorProto) else None

    def _fold(self, tensor: str) -> NDArray[Any]:
        chain: dict[str, Node] = {}
        pending = [tensor]
        while pending:
            node = self._producers.get(pending.pop())
            if node is not None and node.first_output not in chain:
                chain[node.first_output] = node
                pending.extend(name for name in node.inputs if not self._literal(name))
        protos = [_with_keys(chain[name]) for name in sorted(chain, key=self._positions.__getitem__)]
        return folding.fold(tensor, protos, self.value, self.proto.opset_import, self._most_folded)

    @cached_property
    def _most_folded(self) -> int:
        return folding.limit(sum(math.prod(tensor.dims) for tensor in self._initializers.values()))

    def _ordered(self) -> Iterator[Node]:
        done: set[str] = set()
        open_: set[str] = set()
        known = set(self.inputs) | self._initializers.keys() | self._sparse.keys() | self._homes.keys()
        stack = [(name, False) for name in reversed(self.outputs)]
        while stack:
            tensor, leaving = stack.pop()
            node = self._producers.get(tensor)
            if node is None:
                self._check_known(tensor, known)
                continue
            key = node.first_output
            if leaving:
                open_.discard(key)
                done.add(key)
                yield node
                continue
            if key in done:
                continue
            if key in open_:
                raise ModelError(f"the graph has a cycle through {node.label}: it is not a valid ONNX model")
            open_.add(key)
            stack.append((tensor, True))
            stack.extend((name, False) for name in reversed(self._needs(node)) if name)

    def _needs(self, node: Node) -> tuple[str, ...]:
        return (*node.inputs, *node.captured, *(node.results if self._deep else ()))

    @staticmethod
    def _check_known(tensor: str, known: set[str]) -> None:
        if tensor not in known:
            raise ModelError(f"the tensor '{tensor}' is read, but no node, input or initializer gives it")

    def _read(self) -> dict[str, tuple[Edge, ...]]:
        readers: dict[str, list[Edge]] = {}
        for node in self.nodes:
            for tensor, edge in zip(node.inputs, node.edges, strict=True):
                readers.setdefault(tensor, []).append(edge)
            for tensor, edge in self._edges_of_bodies(node):
                readers.setdefault(tensor, []).append(edge)
        for name in self.outputs:
            readers.setdefault(name, []).append(Edge((), name, GRAPH_OUTPUT))
        readers.pop("", None)
        return {tensor: tuple(edges) for tensor, edges in readers.items()}

    def _edges_of_bodies(self, node: Node) -> Iterator[tuple[str, Edge]]:
        """What is read inside a node's bodies beside their own nodes: their outputs, or all that comes from outside."""
        inner = self._bodies.get(node.first_output, ())
        if not inner:
            key = self._scopes[node.scope].key
            yield from ((key(tensor), edge) for tensor, edge in captured_edges(node.proto, node.scope))
        for body in inner:
            for value in body.graph.output:
                yield body.key(value.name), Edge(body.path, value.name, GRAPH_OUTPUT)

    def _complete_types(self) -> None:
        """Where inference stopped (a custom op), inputs and outputs under one type variable share their type."""
        for node in self.nodes:
            variables = _type_variables(node.proto.op_type, node.proto.domain, len(node.inputs), len(node.outputs))
            if variables is None:
                continue
            tensors = (*node.inputs, *node.outputs)
            pairs = list(zip(variables, tensors, strict=True))
            known = {variable: self._types[name] for variable, name in pairs if variable and name in self._types}
            for variable, tensor in pairs:
                if tensor and variable in known:
                    self._types.setdefault(tensor, known[variable])

    def _find_constants(self) -> set[str]:
        constants = {*self._initializers, *self._sparse}
        for node in self.nodes:
            inputs = [name for name in node.inputs if name]
            if not inputs and node.op != "Constant":
                continue
            if node.op in NOT_FOLDABLE or node.captured or "::" in node.op or bodies(node.proto):
                continue
            if all(name in constants for name in inputs):
                constants.update(node.outputs)
        return constants

    def _notes(self) -> Iterator[str]:
        """What stays float because nothing here looks into it."""
        others = Counter(node.proto.domain for node in self.nodes if "::" in node.op)
        for domain, number in sorted(others.items()):
            yield f"{count(number, 'node')} of the domain {domain} left float: only ONNX's own operators are planned"
        for function in self.proto.functions:
            if _has_linear(function):
                yield (
                    f"the function {function.domain}.{function.name} holds Q/DQ pairs, which stay: what reads its "
                    "results may get a second pair (inline the function to have its pairs taken into account)"
                )
        for node in self.nodes:
            if not entered(node.proto) and any(_has_linear(body) for _, body in bodies(node.proto)):
                yield f"{node.label} holds Q/DQ pairs in a body that is not planned: they stay"


def multiply_accumulates(node: Node, shape: Callable[[str], tuple[int | None, ...] | None]) -> int:
    """Those of a Conv, ConvTranspose, Gemm or MatMul; 0 for other ops, and where a shape is unknown."""
    if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    left, right, out = (shape(name) for name in (*node.inputs[:2], node.first_output))
    if left is None or right is None or out is None or None in (*left, *right, *out):
        return 0
    sizes = [math.prod(size or 0 for size in dims) for dims in (left, right, out)]
    if node.op == "Conv":
        return sizes[2] * math.prod(size or 0 for size in right[1:])
    if node.op == "ConvTranspose":
        return sizes[0] * math.prod(size or 0 for size in right[1:])
    inner = left[-2] if node.op == "Gemm" and node.attribute("transA") else left[-1]
    return sizes[2] * (inner or 0)


def default_opset(proto: ModelProto) -> int:
    """The version of ONNX's own operators that the model imports."""
    return max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def tensor_type(value: onnx.ValueInfoProto) -> tuple[int | None, tuple[int | str | None, ...] | None]:
    """Element type and dimensions of a declared tensor: an int, a symbol's name, or None for each dimension."""
    if not value.type.HasField("tensor_type"):
        return None, None
    declared = value.type.tensor_type
    if not declared.HasField("shape"):
        return declared.elem_type, None
    dims = tuple(_dimension(dim) for dim in declared.shape.dim)
    return declared.elem_type, dims


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """A size, a symbol, or None; exporters write -1 for what is open."""
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return dim.dim_value
    return dim.dim_param or None


def _with_keys(node: Node) -> NodeProto:
    """The node with the names by which the whole model knows its tensors."""
    proto = NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[:], proto.output[:] = node.inputs, node.outputs
    return proto


def _local_names(graph: onnx.GraphProto) -> set[str]:
    """What a graph declares or makes itself."""
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    names |= {tensor.values.name for tensor in graph.sparse_initializer}
    return names | {output for node in graph.node for output in node.output if output}


def first_output_of(node: NodeProto) -> str:
    """The name by which an edge knows its reader: the node's first output that has a name."""
    return next(filter(None, node.output), "")


def bodies(node: NodeProto) -> list[tuple[str, onnx.GraphProto]]:
    """A node's control-flow bodies, each with the name of its attribute."""
    return [(item.name, item.g) for item in node.attribute if item.type == AttributeProto.GRAPH] + [
        (f"{item.name}[{index}]", graph)
        for item in node.attribute
        if item.type == AttributeProto.GRAPHS
        for index, graph in enumerate(item.graphs)
    ]


def entered(node: NodeProto) -> list[tuple[str, onnx.GraphProto]]:
    """The bodies that are planned, and in which pairs are found: those of ONNX's If, Loop and Scan."""
    return bodies(node) if node.op_type in CONTROL_OPS and node.domain in ONNX_DOMAINS else []


def is_integer_op(node: NodeProto) -> bool:
    """True for the ops of models that are quantized in operator form."""
    known = node.domain in ONNX_DOMAINS or node.domain == "com.microsoft"
    return known and INTEGER_OPS.fullmatch(node.op_type) is not None


def _has_linear(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    return any(node.op_type in QDQ_OPS for node in all_nodes(graph))


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[NodeProto]:
    """The nodes of a graph or function, each followed by those of its control-flow bodies."""
    for node in graph.node:
        yield node
        for _, body in bodies(node):
            yield from all_nodes(body)


def every_node(proto: ModelProto) -> Iterator[NodeProto]:
    """The nodes of a model: those of its graph, of the bodies in it, and of its own functions."""
    for graph in (proto.graph, *proto.functions):
        yield from all_nodes(graph)


class FreshNames:
    """Gives names that are free in the whole model, control-flow bodies included."""

    def __init__(self, proto: ModelProto) -> None:
        nodes = list(all_nodes(proto.graph))
        graphs = [proto.graph, *(body for node in nodes for _, body in bodies(node))]
        self._taken = {
            value.name
            for graph in graphs
            for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        }
        self._taken.update(*((node.name, *node.input, *node.output) for node in nodes))

    def fresh(self, wanted: str) -> str:
        """`wanted`, with a number behind it where it is taken; it is taken from now on."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def captured_edges(node: NodeProto, scope: tuple[str, ...]) -> Iterator[tuple[str, Edge]]:
    """What the bodies of a control-flow node read from outside, each with the edge that reads it."""
    for name, body in bodies(node):
        inner = (*scope, f"{first_output_of(node)}.{name}")
        local = _local_names(body)
        for child in body.node:
            first = first_output_of(child)
            reads = [
                (tensor, Edge(inner, first, slot, child.op_type, child.name)) for slot, tensor in enumerate(child.input)
            ]
            reads += captured_edges(child, inner)
            yield from (read for read in reads if read[0] and read[0] not in local)
        for value in body.output:
            if value.name not in local:
                yield value.name, Edge(inner, value.name, GRAPH_OUTPUT)


@dataclass(frozen=True)
class _Inferred:
    """What shape inference found of all tensors. `containers`: the types of sequences and optional values."""

    types: dict[str, int]
    shapes: dict[str, tuple[int | None, ...]]
    containers: dict[str, TypeProto]
    notes: tuple[str, ...]
    """Why there is little of all that, where inference failed."""


def _inferred(proto: ModelProto, nodes: Iterable[Node], fed: Mapping[str, tuple[int, ...]] | None = None) -> _Inferred:
    """onnx's shape inference on a sorted copy without the weights' data. `fed` states the shapes of inputs."""
    bare = skeleton(proto, nodes)
    if fed is not None:
        _state_shapes(bare.graph, fed)
    notes: tuple[str, ...] = ()
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except Exception as error:
        notes = (f"shapes could not be inferred, so rules that need them do not apply: {one_line(error)}",)
        inferred = bare.graph
    types: dict[str, int] = {}
    shapes: dict[str, tuple[int | None, ...]] = {}
    containers: dict[str, TypeProto] = {}
    for scope in _all_scopes(_Scope(inferred)):
        for value in (*scope.graph.value_info, *scope.graph.output, *scope.graph.input):
            key, (element, dims) = scope.key(value.name), tensor_type(value)
            if element:
                types[key] = element
            if dims is not None:
                shapes[key] = tuple(dim if isinstance(dim, int) else None for dim in dims)
            if value.type.WhichOneof("value") in _CONTAINERS:
                containers[key] = _without_dims(value.type)
    for scope in _all_scopes(_Scope(proto.graph)):
        for tensor in scope.graph.initializer:
            types[scope.key(tensor.name)], shapes[scope.key(tensor.name)] = tensor.data_type, tuple(tensor.dims)
        for sparse in scope.graph.sparse_initializer:
            key = scope.key(sparse.values.name)
            types[key], shapes[key] = sparse.values.data_type, tuple(sparse.dims)
    return _Inferred(types, shapes, containers, notes)


_CONTAINERS = {"sequence_type": helper.make_sequence_type_proto, "optional_type": helper.make_optional_type_proto}


def _without_dims(kind: TypeProto) -> TypeProto:
    which = kind.WhichOneof("value")
    if which in _CONTAINERS:
        return _CONTAINERS[which](_without_dims(getattr(kind, which).elem_type))
    return helper.make_tensor_type_proto(kind.tensor_type.elem_type, None) if which == "tensor_type" else kind


def _all_scopes(scope: _Scope) -> Iterator[_Scope]:
    yield scope
    for node in scope.graph.node:
        for inner in scope.inner(node):
            yield from _all_scopes(inner)


def _state_shapes(graph: onnx.GraphProto, fed: Mapping[str, tuple[int, ...]]) -> None:
    """Give the inputs these shapes, and forget what was declared of everything behind them."""
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in graph.input:
        if value.name in fed:
            value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, fed[value.name]))


def skeleton(proto: ModelProto, nodes: Iterable[Node] = ()) -> ModelProto:
    """A copy in which large weights are inputs, with these nodes in this order (none given: as stored)."""
    bare = ModelProto(ir_version=proto.ir_version)
    bare.opset_import.extend(proto.opset_import)
    bare.functions.extend(proto.functions)
    graph = bare.graph
    graph.name = proto.graph.name
    graph.node.extend([node.proto for node in nodes] or proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    listed = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if weights.size(tensor) <= weights.SMALL and not weights.is_outside(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for sparse in proto.graph.sparse_initializer:
        values = sparse.values
        if values.name not in listed:
            graph.input.append(helper.make_tensor_value_info(values.name, values.data_type, list(sparse.dims)))
    return bare


_schemas: dict[tuple[str, str], Any] = {}


def _schema(op: str, domain: str) -> Any:
    key = (op, "" if domain == "ai.onnx" else domain)
    if key not in _schemas:
        with contextlib.suppress(Exception):  # an unknown op, or a name that is no text
            _schemas[key] = onnx.defs.get_schema(*key)
    return _schemas.get(key)


def _default(op: str, domain: str, attribute: str) -> Any:
    schema = _schema(op, domain)
    declared = schema.attributes.get(attribute) if schema else None
    if declared is None or declared.default_value.type == AttributeProto.UNDEFINED:
        return None
    return _plain(helper.get_attribute_value(declared.default_value))


def _type_variables(op: str, domain: str, inputs: int, outputs: int) -> list[str] | None:
    """The type variable of each input and output, '' where the schema fixes the type."""
    schema = _schema(op, domain)
    if schema is None or not schema.inputs:
        return None
    variables = {constraint.type_param_str for constraint in schema.type_constraints}

    def variable(declared: Any, index: int) -> str:
        if not declared:
            return ""
        parameter = declared[min(index, len(declared) - 1)]
        homogeneous = parameter.is_homogeneous
        return parameter.type_str if homogeneous and parameter.type_str in variables else ""

    return [variable(schema.inputs, i) for i in range(inputs)] + [variable(schema.outputs, i) for i in range(outputs)]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "add") else value


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
