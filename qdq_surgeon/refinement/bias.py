"""Bias correction: quantized layers err on average, channel by channel, and their biases can take that back.

The rule after M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019),
in its empirical form: layers in the order of computation, each on what the layers before it, corrected, really give.
Here the error is judged behind the Relu or Clip that follows, where values that it cuts off do not count, and an
estimate is trusted only as far as the samples agree about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..calibration.feeds import Batch
from ..calibration.sessions import Progress
from ..edges import GRAPH_OUTPUT, Edge, Plan, count
from ..graph import Graph, Node
from ..model import Model
from .judging import gain, judged, number_of, parted
from .lockstep import Both, walk
from .trace import TensorError, Trace

Array: TypeAlias = NDArray[Any]

POSITIONS = 1024
"""Values of one channel, over all samples, that are looked at: more tell nothing new."""
SETTLED = 1e-3
"""A step that takes less than this share of the loss is the last."""
STEPS = 8
"""Newton steps: the loss is piecewise quadratic, so a few reach its minimum."""
NORMALIZATION = "BatchNormalization"


@dataclass(frozen=True, eq=False)
class Target:
    """A bias that can take a correction.

    `weighted` is the quantized op, `node` the one that holds the bias (the op itself, or the Add behind a MatMul) in
    `slot`, `bias` the constant's name ('' where there is none yet). `tensor` is what comes out, with `channels` along
    `axis`; `low` and `high` (channels,) bound the values that count behind the activation.
    """

    weighted: Node
    node: Node
    slot: int
    bias: str
    tensor: str
    channels: int
    axis: int
    low: Array
    high: Array

    @property
    def edge(self) -> Edge:
        """The edge by which the bias is read, be there one or not."""
        own = self.node.own_edge
        return Edge(own.scope, own.reader, self.slot, own.op, own.name)


@dataclass(frozen=True)
class BiasCorrection:
    """What to add to each bias, by the edge that reads it: one number per channel.

    `candidates` biases were looked at, `fitted` samples used. On `judged` others the mean SQNR of the results is
    `after` dB with the shifts and `before` dB without; `kept` says that they are used.
    """

    values: Mapping[Edge, NDArray[Any]] = field(default_factory=dict)
    candidates: int = 0
    fitted: int = 0
    judged: int = 0
    before: float = 0.0
    after: float = 0.0
    errors: tuple[TensorError, ...] = field(default=(), repr=False)
    """Those of the ops, with the shifts."""

    @property
    def kept(self) -> bool:
        return self.after > self.before

    @property
    def shifts(self) -> Mapping[Edge, NDArray[Any]]:
        """What to add to the biases; nothing where it does not help."""
        return self.values if self.kept else {}

    def __str__(self) -> str:
        unseen = (
            f"{count(self.judged, 'other')}, by which it was chosen" if self.judged else "the samples it was fitted on"
        )
        verb = "corrected" if self.kept else "not corrected"
        return (
            f"{len(self.values)} of {count(self.candidates, 'bias', 'biases')} {verb}, fitted on "
            f"{count(self.fitted, 'sample')}: SQNR {self.after:.1f} dB instead of {self.before:.1f} dB on {unseen}"
        )


def targets(graph: Graph, plan: Plan) -> Iterator[Target]:
    """The biases of the plan's quantized ops, in the order of the graph.

    Not those inside bodies, of which the samples cannot be told apart, and not those that are computed.
    """
    edges = {edge for site in plan.sites for edge in site.edges if not edge.scope}
    quantized = {edge.key for edge in edges}
    for node in graph.nodes:
        if node.first_output in quantized and not node.scope:
            target = _target(graph, node)
            if target is not None and target.edge not in edges:
                yield target


def _target(graph: Graph, node: Node) -> Target | None:
    if node.op in ("Conv", "ConvTranspose", "Gemm"):
        return _own_bias(graph, node)
    if node.op == "MatMul":
        return _added_bias(graph, node)
    return None


def _own_bias(graph: Graph, node: Node) -> Target | None:
    channels = _channels(graph, node)
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if channels is None or (bias and not _is_vector(graph, bias, channels)):
        return None
    if node.op == "Gemm" and not node.attribute("beta"):
        return None
    return _made(graph, node, node, 2, bias, channels, axis=1)


def _added_bias(graph: Graph, node: Node) -> Target | None:
    """The bias of a MatMul is the constant of the Add that alone reads it."""
    channels = _channels(graph, node)
    add = _only_reader(graph, node.first_output)
    if channels is None or add is None or add.op != "Add":
        return None
    slot = 1 - add.inputs.index(node.first_output)
    return (
        _made(graph, node, add, slot, add.inputs[slot], channels, axis=-1)
        if _is_vector(graph, add.inputs[slot], channels)
        else None
    )


def _channels(graph: Graph, node: Node) -> int | None:
    shape = graph.shape(node.inputs[1]) if graph.is_constant(node.inputs[1]) else None
    if not shape:
        return None
    if node.op == "ConvTranspose":
        size = shape[1] and shape[1] * int(node.attribute("group"))
    elif node.op == "Conv" or (node.op == "Gemm" and node.attribute("transB")):
        size = shape[0]
    else:
        size = shape[-1]
    return size if isinstance(size, int) else None


def _is_vector(graph: Graph, name: str, channels: int) -> bool:
    """True for a constant with one number per channel, and nothing along other axes."""
    shape = graph.shape(name) if name and graph.is_constant(name) else None
    return shape is not None and shape[-1:] == (channels,) and all(size == 1 for size in shape[:-1])


def _only_reader(graph: Graph, tensor: str) -> Node | None:
    edges = graph.readers(tensor)
    if len(edges) != 1 or edges[0].slot == GRAPH_OUTPUT or edges[0].scope:
        return None
    return graph.reading_node(edges[0])


def _made(graph: Graph, weighted: Node, node: Node, slot: int, bias: str, channels: int, axis: int) -> Target:
    low, high = _bounds(graph, node.first_output, channels, axis)
    return Target(weighted, node, slot, bias, node.first_output, channels, axis, low, high)


def _bounds(graph: Graph, tensor: str, channels: int, axis: int) -> tuple[Array, Array]:
    """Between which values of the tensor the activation behind it lets changes through, per channel."""
    gain, offset = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    reader = _only_reader(graph, tensor)
    if (
        reader is not None
        and reader.op == NORMALIZATION
        and axis == 1
        and all(map(graph.is_constant, reader.inputs[1:]))
    ):
        scale, shift, mean, variance = (graph.value(name).astype(np.float32) for name in reader.inputs[1:5])
        gain = scale / np.sqrt(variance + reader.attribute("epsilon"))
        offset = shift - gain * mean
        reader = _only_reader(graph, reader.first_output)
    low, high = _clip(graph, reader)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.stack([(low - offset) / gain, (high - offset) / gain])
    ends = np.where(gain == 0, np.array([[-np.inf], [np.inf]], np.float32), ends)
    return ends.min(0), ends.max(0)


def _clip(graph: Graph, node: Node | None) -> tuple[float, float]:
    if node is None or node.op not in ("Relu", "Clip"):
        return -np.inf, np.inf
    if node.op == "Relu":
        return 0.0, np.inf
    bounds = [graph.known_value(name) if name else None for name in (*node.inputs[1:], "", "")[:2]]
    if any(name and value is None for name, value in zip(node.inputs[1:], bounds, strict=False)):
        return -np.inf, np.inf
    low, high = (None if value is None else value.item() for value in bounds)
    return -np.inf if low is None else low, np.inf if high is None else high


def best_shift(expected: Sequence[Array], actual: Sequence[Array], low: Array, high: Array) -> Array:
    """What to add to `actual`, per channel, so that it agrees best with `expected` behind a clip to [low, high].

    One array (channels, positions) per sample. The least squares solution, found by Newton's method from zero, and
    drawn towards zero where the samples disagree: by the positive-part James-Stein factor 1 - variance / square,
    with the variance of the mean over samples.
    """
    left = np.concatenate(expected, 1).clip(low[:, None], high[:, None])
    right = np.concatenate(actual, 1)
    owner = np.repeat(np.arange(len(actual)), [array.shape[1] for array in actual])
    best = shift = np.zeros(len(left), left.dtype)
    least = _loss(left, right, low, high)
    for _ in range(STEPS):
        moved = right + shift[:, None]
        live = (moved > low[:, None]) & (moved < high[:, None])
        count = live.sum(1)
        shift = shift + np.where(live, left - moved, 0).sum(1) / np.maximum(count, 1)
        loss = _loss(left, right + shift[:, None], low, high)
        better = loss < least
        done = least - loss <= SETTLED * least
        best, least = np.where(better, shift, best), np.where(better, loss, least)
        if done.all():
            break
    trust = _trust(left, right + best[:, None], low, high, owner, best)
    return np.asarray(np.nan_to_num(best * trust, nan=0.0, posinf=0.0, neginf=0.0))


def _loss(expected: Array, actual: Array, low: Array, high: Array) -> Array:
    return np.asarray(np.square(expected - actual.clip(low[:, None], high[:, None])).mean(1))


def _trust(expected: Array, actual: Array, low: Array, high: Array, owner: NDArray[Any], shift: Array) -> Array:
    """How much of a shift to believe, 0 to 1."""
    samples = int(owner[-1]) + 1
    if samples < 2:
        return np.ones(len(expected))
    live = (actual > low[:, None]) & (actual < high[:, None])
    errors = np.where(live, expected - actual, 0)
    starts = np.searchsorted(owner, np.arange(samples))
    sums, counts = np.add.reduceat(errors, starts, 1), np.add.reduceat(live.astype(np.float32), starts, 1)
    total = np.maximum(counts.sum(1), 1)
    variance = np.square(sums).sum(1) / total**2 * samples / (samples - 1)
    return np.asarray(np.maximum(0, 1 - variance / np.maximum(shift**2, np.finfo(np.float32).tiny)))


def correct_biases(
    model: Model, plan: Plan, quantized: ModelProto, samples: Sequence[Batch], progress: Progress | None = None
) -> BiasCorrection:
    """The shifts for the biases of a Q/DQ model; none where they do not bring its results nearer to the float model's.

    Most of the samples are fitted on; on the others each shift must help, and all of them together.
    """
    found = {target.tensor: target for target in targets(model.graph, plan)}
    results = judged(model.graph)
    if not found or not results:
        return BiasCorrection()
    fitted = len(parted(samples)[0])
    values: dict[Edge, Array] = {}
    noted = Trace(model.graph, plan)
    added_to = {target.weighted.first_output for target in found.values() if target.weighted is not target.node}
    stops = dict.fromkeys((*found, *(name for name in noted.stops if name not in added_to)))
    passed = 0

    def visit(both: Both) -> None:
        nonlocal passed
        target = found.get(both.name)
        shift = _fitted(target, both, fitted) if target else np.zeros(1)
        if target and shift.any():
            values[target.edge] = shift
            _add(shift, target, both.int8)
        noted.visit(both, target.weighted.first_output if target else "")
        passed += 1
        if progress:
            progress("correct", passed, len(stops))

    after = walk(model, quantized, samples, results, stops, visit)
    return BiasCorrection(
        values,
        len(found),
        number_of(samples[:fitted]),
        number_of(samples[fitted:]),
        *gain(model, quantized, samples, after),
        noted.result(),
    )


def _fitted(target: Target, both: Both, fitted: int) -> Array:
    """The shift of one bias, from the first `fitted` samples; zeros where it does not help on the others."""
    expected, actual = (
        [_by_channel(array, target, len(arrays)) for array in arrays] for arrays in (both.float, both.int8)
    )
    shift = best_shift(expected[:fitted], actual[:fitted], target.low, target.high)
    if fitted == len(expected):
        return shift
    left, right = np.concatenate(expected[fitted:], 1), np.concatenate(actual[fitted:], 1)
    left = left.clip(target.low[:, None], target.high[:, None])
    before, after = (_loss(left, right + by[:, None], target.low, target.high) for by in (np.zeros_like(shift), shift))
    ratios = after[before > 0] / before[before > 0]
    return shift if ratios.size and ratios.mean() < 1 else np.zeros_like(shift)


def _add(shift: Array, target: Target, arrays: Sequence[NDArray[Any]]) -> None:
    for array in arrays:
        shape = [1] * array.ndim
        shape[target.axis] = -1
        array += shift.reshape(shape).astype(array.dtype)


def _by_channel(array: NDArray[Any], target: Target, samples: int) -> Array:
    """Some of the values, as (channels, positions)."""
    rows = np.moveaxis(array, target.axis, 0).reshape(target.channels, -1)
    step = rows.shape[1] * samples // POSITIONS | 1
    return np.asarray(rows[:, ::step], np.float32)
