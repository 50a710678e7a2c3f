"""What the engine did with every pair: engine layers mapped back to ONNX nodes.

INT8 means INT8 data and INT8 weights in a kernel that computes in INT8 (`Layer.computes_int8`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from onnx import ModelProto

from ..edges import count
from ..errors import PlacementError
from ..existing import PREFIX, strip_pairs
from ..graph import QDQ_OPS, Graph, Node, all_nodes, multiply_accumulates
from ..model import Model, Source, load, metadata
from ..report.tables import table
from ..rules.commuting import commutes
from ..rules.placement import DEFAULT, load_placement
from ..rules.planner import make_plan
from ..rules.predicates import WEIGHTED
from .engine import TENSORRT_RTX, Backend, Engine, GivenShapes, build
from .layers import Layer
from .lint import lint

NO_INT8_KERNEL = {
    (TENSORRT_RTX, "ConvTranspose"): "TensorRT-RTX has no INT8 ConvTranspose (seen with 1.7.1, for every channel axis)"
}
UNEXPLAINED = "TensorRT chose so; no lint rule explains it"
CONVERTERS = frozenset({"Cast", "Identity", *QDQ_OPS})


@dataclass(frozen=True, slots=True)
class OpAudit:
    """One Conv, ConvTranspose, Gemm or MatMul. `planned`: one of its two operands reads a Q/DQ pair.

    `macs` counts its multiply-accumulates, `kernels` the engine's layers it is part of, `reason` says why it ran in
    float: lint codes for a planned op, else the placement rule that left it alone.
    """

    node: str
    output: str
    planned: bool
    int8: bool
    macs: int
    kernels: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Figures:
    """An engine in numbers. `bytes_moved`: what its kernels read and write of activations.

    `int8_macs` is the share of multiply-accumulates in INT8 among the ops whose shapes are known (None: of none);
    `unknown_macs` counts the others. `conversions` counts kernels that hold nothing but quantizing, dequantizing and
    casting.
    """

    kernels: int
    int8_ops: int
    int8_macs: float | None
    unknown_macs: int
    bytes_moved: int
    conversions: int


@dataclass(frozen=True)
class Audit:
    """The audit of a Q/DQ model, with the figures of its float engine beside it (None: not built)."""

    backend: Backend
    ops: tuple[OpAudit, ...]
    figures: Figures
    float_figures: Figures | None
    conversions: tuple[str, ...]
    in_bodies: int = 0
    """Weighted ops in control-flow bodies, which are not looked at."""

    @property
    def planned(self) -> tuple[OpAudit, ...]:
        return tuple(op for op in self.ops if op.planned)

    @property
    def in_float(self) -> tuple[OpAudit, ...]:
        """The planned ops that run in float: not those that TensorRT merged into others."""
        return tuple(op for op in self.planned if not op.int8 and op.kernels)

    def __str__(self) -> str:
        done = sum(op.int8 for op in self.planned)
        parts = [
            f"engine of {self.backend}",
            f"{done} of {count(len(self.planned), 'planned op')} run in INT8: INT8 data and INT8 weights",
        ]
        parts += [f"  in float: {op.node}: {op.reason}" for op in self.in_float]
        parts += [f"  no kernel of its own: {op.node}" for op in self.planned if not op.kernels]
        rest = [op for op in self.ops if not op.planned]
        parts += [f"{count(len(rest), 'weighted op')} not planned"] if rest else []
        parts += [f"  {op.node}: {op.reason}" for op in rest]
        if self.in_bodies:
            parts.append(f"{count(self.in_bodies, 'weighted op')} in control-flow bodies not looked at")
        columns = [("INT8", self.figures)] + ([("float", self.float_figures)] if self.float_figures else [])
        rows = [
            ("kernels", *(str(figures.kernels) for _, figures in columns)),
            ("weighted ops in INT8", *(str(figures.int8_ops) for _, figures in columns)),
            ("multiply-accumulates in INT8", *(share_of_macs(figures) for _, figures in columns)),
            ("activation bytes moved", *(f"{figures.bytes_moved:,}" for _, figures in columns)),
            ("kernels that only convert", *(str(figures.conversions) for _, figures in columns)),
        ]
        parts.append(table(("engine", *(name for name, _ in columns)), rows))
        parts += [f"  a kernel of its own: {text}" for text in self.conversions]
        return "\n".join(parts)


def share_of_macs(figures: Figures) -> str:
    """'98.0%', 'unknown', or what is known of it."""
    if figures.int8_macs is None:
        return "unknown"
    return f"{figures.int8_macs:.1%}" + (f" ({figures.unknown_macs} ops unknown)" if figures.unknown_macs else "")


def audit(
    model: Source,
    *,
    backend: str | None = None,
    shapes: GivenShapes | None = None,
    tf32: bool = False,
    beside_float: bool = True,
) -> Audit:
    """Build the engine of a Q/DQ model and say, for every weighted op, whether it runs in INT8, and if not, why.

    Raises EngineError where TensorRT is missing or refuses the model.
    """
    source = load(model)
    stripped = strip_pairs(source.original)
    built = _built(source.original, backend, shapes, tf32)
    beside = _built(stripped, backend, shapes, tf32) if beside_float else None
    weighted = sum(node.op_type in WEIGHTED for node in all_nodes(source.original.graph))
    in_bodies = weighted - sum(node.op_type in WEIGHTED for node in source.original.graph.node)
    return Audit(
        built.engine.backend,
        tuple(_ops(source, stripped, built)),
        _figures(built),
        _figures(beside) if beside else None,
        built.conversions,
        in_bodies,
    )


@dataclass(frozen=True)
class _Built:
    """An engine, the graph at the shapes it was built for, and its nodes by the names they had meanwhile."""

    engine: Engine
    graph: Graph
    named: Mapping[str, Node]

    @cached_property
    def kernels(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.engine.layers if layer.is_kernel)

    @cached_property
    def ops(self) -> tuple[Node, ...]:
        """The weighted ops."""
        return tuple(node for node in self.graph.nodes if node.op in WEIGHTED)

    @cached_property
    def _kernels_by_node(self) -> Mapping[str, list[Layer]]:
        found: dict[str, list[Layer]] = {}
        for kernel in self.kernels:
            for name in kernel.nodes:
                found.setdefault(name, []).append(kernel)
        return found

    @cached_property
    def conversions(self) -> tuple[str, ...]:
        """Kernels in which nothing but Q, DQ and casts are left, by the tensor that they convert."""
        found = []
        for kernel in self.kernels:
            nodes = [self.named[name] for name in kernel.nodes if name in self.named]
            if nodes and all(node.op in CONVERTERS for node in nodes):
                first = min(nodes, key=lambda node: int(node.name[1:]))
                found.append(f"{first.op} of '{first.inputs[0]}'")
        return tuple(found)

    def kernels_of(self, node: Node) -> list[Layer]:
        return self._kernels_by_node.get(node.name, [])

    def is_int8(self, node: Node) -> bool:
        elements = _weight_elements(node, self.graph)
        return any(kernel.computes_int8(elements) for kernel in self.kernels_of(node))


def _built(proto: ModelProto, backend: str | None, shapes: GivenShapes | None, tf32: bool) -> _Built:
    """The engine of a copy whose nodes have names of ours, so that its layers lead back to them without doubt."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for number, node in enumerate(all_nodes(copy.graph)):
        node.name = f"n{number}"
    usual = {name: (bounds[len(bounds) // 2],) for name, bounds in (shapes or {}).items()}
    engine = build(copy, backend=backend, shapes=usual, tf32=tf32)
    for value in copy.graph.input:
        if value.name in engine.shapes:
            sizes = engine.shapes[value.name][1]
            for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=True):
                dim.dim_value = size
    del copy.graph.value_info[:]
    graph = Graph(copy)
    return _Built(engine, graph, {node.name: node for node in graph.nodes})


def _ops(source: Model, stripped: ModelProto, built: _Built) -> Iterable[OpAudit]:
    labels = {node.first_output: node.label for node in source.graph.nodes}
    findings = lint(source).findings
    rules = _kept_rules(source, stripped)
    for node in built.ops:
        label = labels.get(node.first_output, node.label)
        kernels = tuple(kernel.name for kernel in built.kernels_of(node))
        int8 = built.is_int8(node)
        planned = any(_reads_pair(name, built.graph) for name in node.inputs[:2])
        reason = ""
        if planned and not kernels:
            reason = "no kernel of its own: TensorRT merged or removed it"
        elif planned and not int8:
            found = dict.fromkeys(f.code for f in findings if label == f.node or (f.node and f.detail.endswith(label)))
            reason = ", ".join(found) or NO_INT8_KERNEL.get((built.engine.backend.name, node.op), UNEXPLAINED)
        elif not planned:
            reason = rules.get(node.first_output, "no rule speaks of it")
        yield OpAudit(
            label, node.first_output, planned, int8, multiply_accumulates(node, built.graph.shape), kernels, reason
        )


def _kept_rules(source: Model, stripped: ModelProto) -> dict[str, str]:
    """For each op that the placement left in float: the rule, from the plan of the model without its pairs."""
    name = metadata(source.original).get(f"{PREFIX}placement", DEFAULT)
    try:
        placement = load_placement(name)
    except PlacementError:  # rules or predicates of the caller's own, which are not here
        placement = load_placement(DEFAULT)
    plan = make_plan(load(stripped), placement)
    kept = {
        item.edge.reader: f"{item.rule}: {plan.because[item.rule]}"
        for item in reversed(plan.kept)
        if item.edge.slot in (0, 1)
    }
    missed = {miss.edge.reader: f"{miss.rule} does not apply: {miss.reason}" for miss in plan.near_misses}
    return missed | kept


def _figures(built: _Built) -> Figures:
    macs = {node.first_output: multiply_accumulates(node, built.graph.shape) for node in built.ops}
    int8 = [node for node in built.ops if built.is_int8(node)]
    total = sum(macs.values())
    return Figures(
        kernels=len(built.kernels),
        int8_ops=len(int8),
        int8_macs=sum(macs[node.first_output] for node in int8) / total if total else None,
        unknown_macs=sum(not value for value in macs.values()),
        bytes_moved=sum(tensor.nbytes for kernel in built.kernels for tensor in (*kernel.inputs, *kernel.outputs)),
        conversions=len(built.conversions),
    )


def _reads_pair(tensor: str, graph: Graph) -> bool:
    """True where the tensor is dequantized, or data movement behind such a tensor."""
    node = graph.producer(tensor)
    while node is not None and commutes(node, graph):
        node = graph.producer(node.inputs[0])
    return node is not None and node.op == "DequantizeLinear"


def _weight_elements(node: Node, graph: Graph) -> int | None:
    """How many elements the op's weight has; None where it has none."""
    weights = [graph.shape(name) or () for name in node.inputs[:2] if graph.is_constant(name)]
    return max((math.prod(size or 1 for size in shape) for shape in weights), default=None)
