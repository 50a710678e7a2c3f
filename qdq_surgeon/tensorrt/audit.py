"""What the engine did with every pair: engine layers mapped back to ONNX nodes.

INT8 means INT8 data and INT8 weights in a kernel that computes in INT8 (`Layer.computes_int8`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from ..edges import count
from ..insertion import PREFIX, strip_pairs
from ..model import QDQ_OPS, Graph, Model, Node, Source, all_nodes, load, metadata
from ..report.tables import table
from ..rules.placement import DEFAULT, load_placement, presets
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

    `conversions` counts kernels that hold nothing but quantizing, dequantizing and casting.
    """

    kernels: int
    int8_ops: int
    int8_macs: float
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

    @property
    def planned(self) -> tuple[OpAudit, ...]:
        return tuple(op for op in self.ops if op.planned)

    @property
    def in_float(self) -> tuple[OpAudit, ...]:
        """The planned ops that did not run in INT8."""
        return tuple(op for op in self.planned if not op.int8)

    def __str__(self) -> str:
        done = len(self.planned) - len(self.in_float)
        parts = [
            f"engine of {self.backend}",
            f"{done} of {count(len(self.planned), 'planned op')} run in INT8: INT8 data and INT8 weights",
        ]
        parts += [f"  in float: {op.node}: {op.reason}" for op in self.in_float]
        rest = [op for op in self.ops if not op.planned]
        parts += [f"{count(len(rest), 'weighted op')} not planned"] if rest else []
        parts += [f"  {op.node}: {op.reason}" for op in rest]
        columns = [("INT8", self.figures)] + ([("float", self.float_figures)] if self.float_figures else [])
        rows = [
            ("kernels", *(str(figures.kernels) for _, figures in columns)),
            ("weighted ops in INT8", *(str(figures.int8_ops) for _, figures in columns)),
            ("multiply-accumulates in INT8", *(f"{figures.int8_macs:.1%}" for _, figures in columns)),
            ("activation bytes moved", *(f"{figures.bytes_moved:,}" for _, figures in columns)),
            ("kernels that only convert", *(str(figures.conversions) for _, figures in columns)),
        ]
        parts.append(table(("engine", *(name for name, _ in columns)), rows))
        parts += [f"  a kernel of its own: {text}" for text in self.conversions]
        return "\n".join(parts)


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
    engine, graph, named = _built(source.original, backend, shapes, tf32)
    ops = tuple(_ops(source, engine, graph, named))
    conversions = tuple(_conversions(engine.layers, named))
    float_figures = None
    if beside_float:
        stripped = strip_pairs(source.original)
        float_engine, float_graph, float_named = _built(stripped, backend, shapes, tf32)
        float_figures = _figures(float_engine, float_graph, float_named)
    return Audit(engine.backend, ops, _figures(engine, graph, named), float_figures, conversions)


def _built(
    proto: ModelProto, backend: str | None, shapes: GivenShapes | None, tf32: bool
) -> tuple[Engine, Graph, Mapping[str, Node]]:
    """The engine of a copy whose nodes have names of ours, so that its layers lead back to them without doubt."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for number, node in enumerate(all_nodes(copy.graph)):
        node.name = f"n{number}"
    engine = build(copy, backend=backend, shapes=shapes, tf32=tf32)
    for value in copy.graph.input:
        if value.name in engine.shapes:
            usual = engine.shapes[value.name][1]
            for dim, size in zip(value.type.tensor_type.shape.dim, usual, strict=True):
                dim.dim_value = size
    del copy.graph.value_info[:]
    graph = Graph(copy)
    return engine, graph, {node.name: node for node in graph.nodes}


def _ops(source: Model, engine: Engine, graph: Graph, named: Mapping[str, Node]) -> Iterable[OpAudit]:
    labels = {node.first_output: node.label for node in source.graph.nodes}
    findings = lint(source).findings
    rules = _kept_rules(source)
    for node in graph.nodes:
        if node.op not in WEIGHTED:
            continue
        label = labels.get(node.first_output, node.label)
        layers = _layers_of(node, engine.layers)
        int8 = any(layer.computes_int8(_weight_elements(node, graph)) for layer in layers)
        planned = any(_reads_pair(name, graph) for name in node.inputs[:2])
        reason = ""
        if planned and not int8:
            found = dict.fromkeys(f.code for f in findings if label == f.node or (f.node and f.detail.endswith(label)))
            reason = ", ".join(found) or NO_INT8_KERNEL.get((engine.backend.name, node.op), UNEXPLAINED)
        elif not planned:
            reason = rules.get(node.first_output, "no rule speaks of it")
        kernels = tuple(layer.name for layer in layers)
        yield OpAudit(label, node.first_output, planned, int8, _macs(node, graph), kernels, reason)


def _kept_rules(source: Model) -> dict[str, str]:
    """For each op that the placement left in float: the rule, from the plan of the model without its pairs."""
    name = metadata(source.original).get(f"{PREFIX}placement", DEFAULT)
    known = all(part in presets() or Path(part).is_file() for part in name.split(","))
    stripped = load(strip_pairs(source.original))
    plan = make_plan(stripped, load_placement(name if known else DEFAULT))
    kept = {
        item.edge.reader: f"{item.rule}: {plan.because[item.rule]}"
        for item in reversed(plan.kept)
        if item.edge.slot in (0, 1)
    }
    missed = {miss.edge.reader: f"{miss.rule} does not apply: {miss.reason}" for miss in plan.near_misses}
    return missed | kept


def _figures(engine: Engine, graph: Graph, named: Mapping[str, Node]) -> Figures:
    kernels = [layer for layer in engine.layers if layer.is_kernel]
    ops = [node for node in graph.nodes if node.op in WEIGHTED]
    macs = {node.first_output: _macs(node, graph) for node in ops}
    int8 = [n for n in ops if any(k.computes_int8(_weight_elements(n, graph)) for k in _layers_of(n, kernels))]
    total = sum(macs.values())
    return Figures(
        kernels=len(kernels),
        int8_ops=len(int8),
        int8_macs=sum(macs[node.first_output] for node in int8) / total if total else 0.0,
        bytes_moved=sum(tensor.nbytes for layer in kernels for tensor in (*layer.inputs, *layer.outputs)),
        conversions=len(list(_conversions(kernels, named))),
    )


def _layers_of(node: Node, layers: Iterable[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.is_kernel and node.name in layer.nodes]


def _conversions(layers: Iterable[Layer], named: Mapping[str, Node]) -> Iterable[str]:
    """Kernels in which nothing but Q, DQ and casts are left, by the tensor that they convert."""
    for layer in layers:
        nodes = [named[name] for name in layer.nodes if name in named]
        if layer.is_kernel and nodes and all(node.op in CONVERTERS for node in nodes):
            first = min(nodes, key=lambda node: int(node.name[1:]))
            yield f"{first.op} of '{first.inputs[0]}'"


def _reads_pair(tensor: str, graph: Graph) -> bool:
    node = graph.producer(tensor)
    return node is not None and node.op == "DequantizeLinear"


def _weight_elements(node: Node, graph: Graph) -> int:
    """How many elements the op's weight has; 1 where that is unknown."""
    shapes = [graph.shape(name) for name in node.inputs[:2]]
    constant = [shape for shape, name in zip(shapes, node.inputs, strict=False) if _is_weight(name, graph)]
    sizes = [math.prod(size or 1 for size in shape) for shape in constant if shape]
    return max(sizes, default=1)


def _is_weight(tensor: str, graph: Graph) -> bool:
    return graph.is_constant(tensor)


def _macs(node: Node, graph: Graph) -> int:
    """Multiply-accumulates at the profile's usual shape; 0 where a shape is unknown."""
    left, right = (graph.shape(name) for name in node.inputs[:2])
    out = graph.shape(node.first_output)
    if left is None or right is None or out is None or None in (*left, *right, *out):
        return 0
    sizes = [math.prod(size or 0 for size in shape) for shape in (left, right, out)]
    if node.op == "Conv":
        return sizes[2] * math.prod(size or 0 for size in right[1:])
    if node.op == "ConvTranspose":
        return sizes[0] * math.prod(size or 0 for size in right[1:])
    inner = left[-2] if node.op == "Gemm" and node.attribute("transA") else left[-1]
    return sizes[2] * (inner or 0)
