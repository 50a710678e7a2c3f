"""The named conditions of placement files: each one function, one sentence.

A predicate reads a `View` (the graph, and the decisions made so far downstream) and the `Subject` that a name of
the pattern captured; a pair predicate compares two subjects. New knowledge about TensorRT is a new function here.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ..edges import Edge
from ..graph import DATA_FREE_OPS, Graph, Node
from .commuting import commutes, moved_from

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset(
    {
        "Celu",
        "Clip",
        "Elu",
        "Erf",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "PRelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    }
)
FUSED = ACTIVATIONS | {"BatchNormalization", "Dropout", "Identity", "Transpose"}
"""Ops that TensorRT fuses behind a Conv, Gemm or MatMul; each continues with its input 0."""
WITH_CONSTANT = frozenset({"Add", "Sub", "Mul", "Div"})
ON_SCORES = frozenset({"Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "Sub", "Sum", "Where"})
"""What scaling, masking and clamping do to attention scores before their Softmax."""
CLAMPS = frozenset({"Relu", "Clip"})
"""Activations that run in the kernel before them, so that the tensor behind is the one that counts."""

MIN_CHANNELS = 16
"""Below this many channels an INT8 kernel does not pay (NVIDIA ModelOpt, `modelopt/onnx/quantization`)."""
CHANNEL_STEP = 8
MAX_SEQUENCE = 512
"""The longest sequence for which TensorRT fuses INT8 attention (NVIDIA ModelOpt)."""
MAX_SEARCH = 512
"""How many tensors upstream the search for a common ancestor looks at."""
MAX_DIAMOND = 8
"""How long one side of an activation written as several ops may be."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One captured tensor, and the node that makes it (None for graph inputs and initializers)."""

    tensor: str
    node: Node | None


class View(Protocol):
    """What a predicate may read."""

    @property
    def graph(self) -> Graph: ...

    def is_quantized(self, edge: Edge) -> bool:
        """True where a rule decided, so far, that the edge reads a Q/DQ pair."""


Predicate: TypeAlias = Callable[[View, Subject], bool]
PairPredicate: TypeAlias = Callable[[View, Subject, Subject], bool]


def activation(view: View, it: Subject) -> bool:
    """The tensor is float and not constant."""
    return view.graph.is_float(it.tensor) and not view.graph.is_constant(it.tensor)


def constant(view: View, it: Subject) -> bool:
    """The tensor is a float constant: an initializer, or made from constants alone."""
    return view.graph.is_float(it.tensor) and view.graph.is_constant(it.tensor)


def single_use(view: View, it: Subject) -> bool:
    """The tensor is read exactly once; being a graph output counts as a reading, Shape and Size do not."""
    return _uses(it.tensor, view.graph) == 1


def fused_branch(view: View, it: Subject) -> bool:
    """The tensor comes from a Conv, Gemm or MatMul through nothing but ops that fuse with it."""
    return backbone(it.tensor, view.graph) is not None


def consumed_quantized(view: View, it: Subject) -> bool:
    """The tensor is read quantized, and by nothing in float, looking through data movement, Relu and Clip."""
    return _leads_to_pairs(view, it.tensor, through_clamps=True)


def moved_to_quantized(view: View, it: Subject) -> bool:
    """The tensor is read quantized, and by nothing in float, looking through data movement."""
    return _leads_to_pairs(view, it.tensor, through_clamps=False)


def _leads_to_pairs(view: View, tensor: str, through_clamps: bool) -> bool:
    quantized = False
    pending = [tensor]
    while pending:
        for edge in view.graph.readers(pending.pop()):
            node = view.graph.reading_node(edge)
            if view.is_quantized(edge):
                quantized = True
            elif node is None or not _passes_on(node, edge, view.graph, through_clamps):
                return False
            elif node.op not in DATA_FREE_OPS:
                pending.extend(output for output in node.outputs if view.graph.is_float(output))
    return quantized


def quantized_elsewhere(view: View, it: Subject) -> bool:
    """Another reader of the tensor has a Q/DQ pair on it."""
    return any(view.is_quantized(edge) for edge in view.graph.readers(it.tensor))


def small_conv(view: View, it: Subject) -> bool:
    """The Conv is too small or too odd for an INT8 kernel to pay (channels, alignment, kernel shape)."""
    shape = view.graph.shape(it.node.inputs[1]) if it.node else None
    if not it.node or shape is None or None in shape or len(shape) < 3:
        return False
    out_channels, in_group, *kernel = (int(size or 0) for size in shape)
    group = int(it.node.attribute("group") or 1)
    if group > 1:
        return out_channels % CHANNEL_STEP != 0 or min(kernel) < 3
    in_channels = in_group * group
    aligned = out_channels % CHANNEL_STEP == 0 or in_channels % CHANNEL_STEP == 0
    enough = max(out_channels, in_channels) >= MIN_CHANNELS or _is_first(it.node.inputs[0], view.graph)
    return not (aligned and enough and len(set(kernel)) == 1)


def small_matmul(view: View, it: Subject) -> bool:
    """The Gemm or MatMul has a static K or N below 16 (N == 1 included)."""
    if not it.node:
        return False
    left, right = (view.graph.shape(name) for name in it.node.inputs[:2])
    turned_left, turned_right = bool(it.node.attribute("transA")), bool(it.node.attribute("transB"))
    inner = [_dim(left, -2 if turned_left else -1), _dim(right, _inner(right, turned_right))]
    outer = 1 if right is not None and len(right) == 1 else _dim(right, -2 if turned_right else -1)
    return any(size is not None and size < MIN_CHANNELS for size in (*inner, outer))


def feeds_softmax(view: View, it: Subject) -> bool:
    """The tensor leads to a Softmax through arithmetic and data movement alone: it holds attention scores."""
    pending = [it.tensor]
    while pending:
        for edge in view.graph.readers(pending.pop()):
            node = view.graph.reading_node(edge)
            if node and node.op == "Softmax":
                return True
            if node and (node.op in ON_SCORES or (commutes(node, view.graph) and edge.slot == 0)):
                pending.extend(node.outputs)
    return False


def spatial(view: View, it: Subject) -> bool:
    """The node reduces all spatial axes of an image: every axis but the batch and the channels."""
    shape = view.graph.shape(it.node.inputs[0]) if it.node else None
    if not it.node or shape is None or len(shape) < 4:
        return False
    axes = it.node.attribute("axes")
    if len(it.node.inputs) > 1 and view.graph.is_constant(it.node.inputs[1]):
        axes = view.graph.value(it.node.inputs[1]).tolist()
    reduced = {int(axis) % len(shape) for axis in axes or ()}
    return len(reduced) == len(shape) - 2 and 0 not in reduced


def short_sequence(view: View, it: Subject) -> bool:
    """The tensor's last two dimensions are static and at most 512."""
    shape = view.graph.shape(it.tensor)
    return shape is not None and all(size is not None and size <= MAX_SEQUENCE for size in shape[-2:])


def deeper_than(view: View, it: Subject, other: Subject) -> bool:
    """The first branch has the longer path to the common ancestor, or is the only one that can fuse."""
    if not (single_use(view, other) and fused_branch(view, other)):
        return True
    depth, other_depth = _depths(it.tensor, other.tensor, view.graph)
    return depth >= other_depth


def same_as(view: View, it: Subject, other: Subject) -> bool:
    """The two names stand for one tensor."""
    return it.tensor == other.tensor


PREDICATES: dict[str, Predicate] = {
    function.__name__: function
    for function in (
        activation,
        constant,
        single_use,
        fused_branch,
        consumed_quantized,
        moved_to_quantized,
        quantized_elsewhere,
        small_conv,
        small_matmul,
        feeds_softmax,
        spatial,
        short_sequence,
    )
}
PAIR_PREDICATES: dict[str, PairPredicate] = {"deeper_than": deeper_than, "same_as": same_as}
LATE = frozenset({"quantized_elsewhere"})
"""Conditions on the decisions of other readers: their rules are tried after all others."""


def sentence(predicate: Callable[..., bool]) -> str:
    """The first line of a predicate's docstring, in the shape in which a report quotes it."""
    text = str(inspect.getdoc(predicate) or getattr(predicate, "__name__", "a condition of yours")).splitlines()[0]
    return text[:1].lower() + text[1:].rstrip(".")


def backbone(tensor: str, graph: Graph) -> Node | None:
    """The Conv, ConvTranspose, Gemm or MatMul whose kernel `tensor` can be the last output of, or None.

    Between them stand BN, activations, Dropout, Identity, Transpose, Add or Mul of a constant, and activations
    written as `x * f(x)`, whose inner split does not count as a second consumer. Each tensor between has one reader.
    """
    node = graph.producer(tensor)
    while node is not None and node.op not in WEIGHTED:
        inner = _fused_input(node, graph)
        node = graph.producer(inner) if inner else None
    return node


def _uses(tensor: str, graph: Graph) -> int:
    """How many edges read the tensor's values; counting stops at three."""
    reading = (edge for edge in graph.readers(tensor) if edge.op not in DATA_FREE_OPS)
    return sum(1 for _ in itertools.islice(reading, 3))


def _fused_input(node: Node, graph: Graph) -> str | None:
    inner = _pointwise_input(node, graph)
    if inner is not None:
        return inner if _uses(inner, graph) == 1 else None
    return _fork(node, graph) if node.op == "Mul" else None


def _pointwise_input(node: Node, graph: Graph) -> str | None:
    """The one activation that a fusable op reads, or None where it reads two or is no such op."""
    if node.op in FUSED:
        return node.inputs[0]
    if node.op not in WITH_CONSTANT:
        return None
    inputs = [name for name in node.inputs if not graph.is_constant(name)]
    return inputs[0] if len(inputs) == 1 else None


def _fork(node: Node, graph: Graph) -> str | None:
    """For `x * f(x)` (SiLU, HardSwish or GELU in several ops): x, where nothing else reads it."""
    left, right = (list(_climb(name, graph)) for name in node.inputs)
    fork = next((tensor for tensor in left if tensor in right), None)
    return fork if fork and _uses(fork, graph) == 2 else None


def _climb(tensor: str, graph: Graph) -> Iterator[str]:
    for _ in range(MAX_DIAMOND):
        yield tensor
        node = graph.producer(tensor)
        inner = _pointwise_input(node, graph) if node and _uses(tensor, graph) == 1 else None
        if inner is None:
            return
        tensor = inner


def _depths(left: str, right: str, graph: Graph) -> tuple[int, int]:
    """The longest paths, in nodes, from two tensors up to their nearest common ancestor (or as far as they go).

    The graph's inputs count as one ancestor, so that their names do not matter.
    """
    depths: dict[str, list[int]] = {_root(left, graph): [0, -1]}
    depths.setdefault(_root(right, graph), [-1, -1])[1] = 0
    heap = [(-graph.position(tensor), tensor) for tensor in depths]
    heapq.heapify(heap)
    deepest = [0, 0]
    for _ in range(MAX_SEARCH):
        if not heap:
            break
        tensor = heapq.heappop(heap)[1]
        here = depths[tensor]
        deepest = [max(pair) for pair in zip(deepest, here, strict=True)]
        if min(here) >= 0:
            return here[0], here[1]
        for name in _above(tensor, graph):
            if name not in depths:
                depths[name] = [-1, -1]
                heapq.heappush(heap, (-graph.position(name), name))
            above = depths[name]
            depths[name] = [max(a, h + 1 if h >= 0 else -1) for a, h in zip(above, here, strict=True)]
    return deepest[0], deepest[1]


def _above(tensor: str, graph: Graph) -> list[str]:
    node = graph.producer(tensor)
    return [_root(name, graph) for name in (node.inputs if node else ()) if name and not graph.is_constant(name)]


def _root(tensor: str, graph: Graph) -> str:
    return tensor if graph.producer(tensor) else ""


def _passes_on(node: Node, edge: Edge, graph: Graph, through_clamps: bool) -> bool:
    if node.op in DATA_FREE_OPS:
        return True
    return edge.slot == 0 and (commutes(node, graph) or (through_clamps and node.op in CLAMPS))


def _is_first(tensor: str, graph: Graph) -> bool:
    """True where only data movement, casts and pointwise ops lie between `tensor` and a graph input."""
    while tensor not in graph.inputs:
        node = graph.producer(tensor)
        inner = moved_from(tensor, graph) or (_pointwise_input(node, graph) if node else None)
        if node and node.op == "Cast":
            inner = node.inputs[0]
        if inner is None:
            return False
        tensor = inner
    return True


def _inner(shape: tuple[int | None, ...] | None, turned: bool) -> int:
    return -1 if turned or (shape is not None and len(shape) == 1) else -2


def _dim(shape: tuple[int | None, ...] | None, index: int) -> int | None:
    return shape[index] if shape is not None and len(shape) >= -index else None
