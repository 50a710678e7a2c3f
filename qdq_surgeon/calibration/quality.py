"""Data quality, said out loud: what the statistics of a run tell about the data. Pure NumPy, nothing runs.

A finding is a warning where the data look poor, and an error where no scale can be chosen. A report that cries wolf is
not read, so each limit stands beside what rightly prepared data gave, on 16 image models and 10 others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..edges import count
from ..errors import ModelError
from ..graph import Graph, Node
from ..model import Model
from ..rules.commuting import moved_from
from .ranges import _ENTROPY_BINS, DEFAULT_PERCENTILE, range_method
from .statistics import BUCKET_EDGES, FIRST_NON_FINITE, Statistic, Statistics

Severity: TypeAlias = Literal["warning", "error"]
Tensors: TypeAlias = Mapping[str, Statistic]
Array: TypeAlias = NDArray[np.float64]

ENOUGH_SAMPLES = 8
"""Fewer samples make ranges too narrow: 4 of them reach 0.86 of the range of 32 or more (median over models, tensors
and draws; 0.50 in the worst twentieth), 8 reach 0.92 (0.64), 16 reach 0.98 (0.82)."""
RECOMMENDED_SAMPLES = 500
"""Source: NVIDIA Model Optimizer, onnx_ptq/README.md: at least 500 for CNN and ViT models."""
TAIL = 10
"""How many values a percentile wants beyond it, and the entropy method in each of its bins."""

STEADY = 1.5
"""By how much a range must widen with each doubling of the data, twice in a row, to count as growing."""
GROWING_SHARE = 0.25
"""The share of the tensors that must grow, unless it is an input that does: bounded functions and biases hide drift."""
GROWTH_EPOCHS = 5
"""Growth is judged from 16 batches on: the fifth epoch begins with the sixteenth batch."""

SPIKE = 0.9
"""From which share of the non-zero values in one bucket (1/128 octave) on they count as alike. With rightly scaled
data no tensor of a trained model exceeded 0.4."""
SPIKE_VALUES = 100

STRONG = 30.0
"""By how much data must miss the scale that the graph speaks of. Rightly scaled data missed what a BatchNormalization
was trained on by at most 3.1, and lay below the bias of the first layer by at most 6."""
SATURATED = 100.0
"""Values of this order make no sense before the first Sigmoid, Softmax or Relu6: rightly scaled data gave up to 13."""
CLASSES = 10
"""A Gemm or MatMul that gives so many outputs of the model, or more, counts as a classifier."""

_SATURATING = frozenset({"HardSigmoid", "HardSwish", "LogSoftmax", "Sigmoid", "Softmax", "Tanh"})
_RELU6 = 6.0
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})
_TO_INPUT = _ARITHMETIC | {"Cast"}
_TO_LAYER = frozenset({"Add", "AveragePool", "GlobalAveragePool", "ReduceMean", "Relu"})
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the statistics say of the data: what was seen, with figures, and what to do."""

    code: str
    severity: Severity
    tensors: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def findings(model: Model, statistics: Statistics, method: str | None = None) -> tuple[Finding, ...]:
    """What the statistics say of the data that gave them, errors first; at most one finding of each code.

    `method` adds what that range method needs. Tensors without a histogram are judged by their ranges alone. Inputs
    that were made up are not blamed for their number or scale. Raises QdqError for an unknown method.
    """
    if method is not None:
        range_method(method)
    graph = model.graph
    order = sorted(statistics.tensors, key=lambda name: (graph.position(name), name))
    tensors = {name: statistics.tensors[name] for name in order}
    held = {name: statistic for name, statistic in tensors.items() if statistic.count}
    given = not statistics.origin.synthetic
    found = (
        never_finite(tensors, graph),
        never_run(tensors, graph),
        always_empty(tensors, graph),
        non_finite(held, graph),
        input_range(held, graph) if given else None,
        few_samples(held, statistics.origin.samples, method) if given else None,
        growing(held, graph),
        all_zero(held),
        constant(held),
        spike(held),
    )
    return tuple(finding for finding in found if finding)


def never_finite(tensors: Tensors, graph: Graph) -> Finding | None:
    """Tensors of which no finite value was seen: there is nothing to choose a scale from."""
    names = [name for name, statistic in tensors.items() if statistic.non_finite and not statistic.count]
    if not names:
        return None
    text = f"{_listed(names)} never held a finite number; {_origin(names[0], graph)}: check the data and the model"
    return Finding("never-finite", "error", tuple(names), text)


def never_run(tensors: Tensors, graph: Graph) -> Finding | None:
    """Bodies of If, Loop or Scan that no sample went into."""
    names = [name for name, statistic in tensors.items() if statistic.is_empty and graph.home(name)[0]]
    if not names:
        return None
    text = f"no sample ran the bodies that hold {_listed(names)}: they stay float; give data that take every branch"
    return Finding("never-run", "warning", tuple(names), text)


def always_empty(tensors: Tensors, graph: Graph) -> Finding | None:
    """Tensors without an element in every sample: a detector that found nothing, for example."""
    names = [name for name, statistic in tensors.items() if statistic.is_empty and not graph.home(name)[0]]
    if not names:
        return None
    them = "it" if len(names) == 1 else "them"
    text = f"{_listed(names)} had no element in any sample: what reads {them} stays float; give data that fill {them}"
    return Finding("always-empty", "warning", tuple(names), text)


def non_finite(tensors: Tensors, graph: Graph) -> Finding | None:
    """NaN or infinity among finite values, and where they were seen first."""
    names = [name for name, statistic in tensors.items() if statistic.non_finite]
    if not names:
        return None
    first, others = tensors[names[0]], names[1:]
    heirs = f", and {_listed(others)} behind it {'inherits' if len(others) == 1 else 'inherit'} them" if others else ""
    text = (
        f"{first.non_finite:,} of {first.count + first.non_finite:,} values of '{names[0]}' are NaN or infinite"
        f"{heirs}; {_origin(names[0], graph)}: scales ignore them, so find the samples that cause them"
    )
    return Finding("non-finite", "warning", tuple(names), text)


def all_zero(tensors: Tensors) -> Finding | None:
    """Tensors that held nothing but zeros."""
    names = [name for name, statistic in tensors.items() if not statistic.amax]
    if not names:
        return None
    text = (
        f"{_listed(names)} never held anything but zero, so the scale is a guess: the branch is dead, or the data "
        "leave it idle (an input or a recurrent state that is always zero); give data that use it, or exclude it"
    )
    return Finding("all-zero", "warning", tuple(names), text)


def constant(tensors: Tensors) -> Finding | None:
    """Tensors that held one single value, and not zero, all the time."""
    names = [name for name, known in tensors.items() if known.count > 1 and known.minimum == known.maximum != 0]
    if not names:
        return None
    values = {name: f"always {tensors[name].maximum:.4g}" for name in names}
    text = (
        f"{_listed(names, values)} held one single value, so the scale fits no other: give data that vary it, "
        "or exclude it"
    )
    return Finding("constant", "warning", tuple(names), text)


def spike(tensors: Tensors) -> Finding | None:
    """Tensors whose non-zero values are nearly all alike, and not quite.

    Where all of them are alike, as in a mask, the scale represents them exactly.
    """
    peaks = {name: _peak(statistic) for name, statistic in tensors.items()}
    names = sorted((name for name in peaks if peaks[name][0] >= SPIKE), key=lambda name: -peaks[name][0])
    if not names:
        return None
    figures = {
        name: f"{math.floor(1000 * share) / 10:g} % near {value:.3g}, range {tensors[name].amax:.3g}"
        for name, (share, value) in peaks.items()
    }
    text = (
        f"nearly all non-zero values of {_listed(names, figures)} are alike: padding, a fill value, or data so large "
        "that they saturate; check how the data are made and scaled"
    )
    return Finding("spike", "warning", tuple(names), text)


def few_samples(tensors: Tensors, samples: int, method: str | None) -> Finding | None:
    """Fewer samples than any method needs, or fewer values in a tensor than this method needs."""
    if tensors and samples < ENOUGH_SAMPLES:
        text = (
            f"only {count(samples, 'sample')} calibrated, which leaves ranges too narrow: give {ENOUGH_SAMPLES} or "
            f"more, if possible some hundred (NVIDIA recommends {RECOMMENDED_SAMPLES} for image models)"
        )
        return Finding("few-samples", "warning", (), text)
    needed = _values_needed(method or "")
    held = {name: statistic.count - _zeros(statistic, method or "") for name, statistic in tensors.items()}
    names = sorted((name for name in held if tensors[name].amax and held[name] < needed), key=held.__getitem__)
    if not names:
        return None
    figures = {name: f"{held[name]:,}" for name in names}
    text = (
        f"{method} needs some {needed:,} values of a tensor, and {_listed(names, figures)} held fewer: "
        "give more samples, or choose mse or max"
    )
    return Finding("few-samples", "warning", tuple(names), text)


def growing(tensors: Tensors, graph: Graph) -> Finding | None:
    """Ranges that further data still widen: the samples are sorted, drift, or are too few.

    Judged by the last three doublings of the data, of which the last may be incomplete. Of runs of 16 to 63 shuffled
    real samples 0.6 % gave it (no image model; speech and control models, fed single frames, in up to 7 %), of 12,000
    runs of Gaussian values none and of Laplace values one. Of runs whose volume rises steadily from 0.1 to 1, 96 % gave
    it where the inputs of the model were measured, 42 % where they were not.
    """
    names = [name for name, statistic in tensors.items() if statistic.growth.any()]
    epochs = max((int(np.flatnonzero(tensors[name].growth)[-1]) + 1 for name in names), default=0)
    if epochs < GROWTH_EPOCHS:
        return None
    reach = {name: np.maximum.accumulate(tensors[name].growth[:epochs])[-4:] for name in names}
    grew = {name: float(spans[-1] / spans[1]) for name, spans in reach.items() if _is_steady(spans)}
    if len(grew) < GROWING_SHARE * len(names) and not any(_path(name, graph) for name in grew):
        return None
    worst = sorted(grew, key=lambda name: -grew[name])
    figures = {name: f"{grew[name]:.3g} times" for name in worst}
    text = (
        f"{count(len(grew), 'range')} of {len(names)} still widened as the data went on, after the first "
        f"{2 ** (epochs - 2) - 1} batches: {_listed(worst, figures)}; shuffle the samples, and give more of them"
    )
    return Finding("growing", "warning", tuple(worst), text)


def input_range(tensors: Tensors, graph: Graph) -> Finding | None:
    """Data of another scale than the model was trained on, such as 0..255 where it takes 0..1.

    The graph tells that scale in three ways, and each speaks only where it is missed by STRONG: constants that
    normalise the input; the statistics that a BatchNormalization keeps; the bias of the first layer. Where it tells
    nothing, or nothing near the input was measured, there is no finding.
    """
    ways = (_against_constants, _against_normalization, _against_bias)
    with np.errstate(all="ignore"):  # a model may hold anything
        return next(itertools.chain.from_iterable(way(tensors, graph) for way in ways), None)


def _against_constants(tensors: Tensors, graph: Graph) -> Iterator[Finding]:
    """Constants such as (x - 127.5) / 127.5 say what they expect."""
    for path, _ in _first_layers(graph):
        expected, reach = _normalised(path, tensors, graph)
        if expected and reach and _misses(reach / expected):
            seen = f"reaches {reach:.3g}, but the graph normalises values of 0..{expected:g}"
            yield _misscaled(path[0], seen, reach / expected)


def _against_normalization(tensors: Tensors, graph: Graph) -> Iterator[Finding]:
    """The first BatchNormalization that can be judged: it, or the Conv before it, reads what was measured."""
    norms = [node for node in graph.nodes if node.op == "BatchNormalization"]
    for norm in norms:
        judged = _judged_by(norm, tensors, graph)
        if judged is None:
            continue
        tensor, factor = judged
        if _misses(factor):
            yield _misscaled(tensor, f"leads to values {_times(factor)} those that {norm.label} was trained on", factor)
        return


def _against_bias(tensors: Tensors, graph: Graph) -> Iterator[Finding]:
    """The first layer's bias: of the order of its response where a BatchNormalization was folded into it.

    Without normalization a bias is small on any data, so for data that are too large a second witness must agree.
    """
    for path, layer in _first_layers(graph):
        if any(edge.op == "BatchNormalization" for edge in graph.readers(layer.first_output)):
            continue
        bias, response = _bias(layer, graph), _response(layer, tensors, graph)
        if bias is None or response is None or not bias.any():
            continue
        factor = 1 / max(float(np.median(np.abs(bias) / response)), _TINY)
        witness = _overdriven(tensors, graph) if factor >= STRONG else ""
        if factor <= 1 / STRONG or witness:
            yield _misscaled(path[0], f"gives values {_times(factor)} the bias of {layer.label}{witness}", factor)


def _misscaled(tensor: str, seen: str, factor: float) -> Finding:
    size = "large" if factor > 1 else "small"
    text = f"'{tensor}' {seen}: the data look far too {size}; scale them as in training (0..255, 0..1 or normalised)"
    return Finding("input-range", "warning", (tensor,), text)


def _misses(factor: float) -> bool:
    return factor <= 1 / STRONG or factor >= STRONG


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor > 1 else f"1/{1 / factor:,.0f} of"


def _normalised(path: Sequence[str], tensors: Tensors, graph: Graph) -> tuple[float | None, float | None]:
    """What the constants on the way from an input expect of it (255, 1 or None), and the largest |x| that it held."""
    slope, offset = np.ones(1), np.zeros(1)
    reach = _input_reach(tensors.get(path[0]), slope, offset)
    for tensor in path[1:]:
        step = _step(graph.producer(tensor), slope, offset, graph)
        if step is None:
            return None, None
        slope, offset = step
        reach = reach or _input_reach(tensors.get(tensor), slope, offset)
    return _expected(-offset / slope, 1 / slope), reach


def _step(node: Node | None, slope: Array, offset: Array, graph: Graph) -> tuple[Array, Array] | None:
    """`slope * x + offset` behind one more node; None where the node turns, flattens or inverts x."""
    if node is None or node.op not in _ARITHMETIC:
        return slope, offset
    first = graph.is_constant(node.inputs[0])
    value = _constant(node.inputs[0 if first else 1], graph)
    if value is None or len({1, value.size, offset.size}) > 2 or (first and node.op in ("Div", "Sub")):
        return None
    if node.op in ("Add", "Sub"):
        return slope, offset + (value if node.op == "Add" else -value)
    if not value.all():
        return None
    factor = value if node.op == "Mul" else 1 / value
    return slope * factor, offset * factor


def _input_reach(statistic: Statistic | None, slope: Array, offset: Array) -> float | None:
    """The largest |x| of the input, from the range of `slope * x + offset`; all channels reach equally far."""
    if statistic is None or not (slope > 0).all():
        return None
    low, high = np.max((statistic.minimum - offset) / slope), np.min((statistic.maximum - offset) / slope)
    return float(max(abs(low), abs(high)))


def _expected(center: Array, width: Array) -> float | None:
    """255 or 1 where (x - center) / width is how pixels of 0..255 or of 0..1 are normalised, else None."""

    def within(values: Array, low: float, high: float) -> bool:
        return bool(np.all((values >= low) & (values <= high)))

    if (within(center, 80, 160) and within(width, 1, 300)) or (within(center, 0, 0) and within(width, 100, 300)):
        return 255.0
    return 1.0 if within(center, 0.1, 0.6) and within(width, 0.15, 0.6) else None


def _judged_by(norm: Node, tensors: Tensors, graph: Graph) -> tuple[str, float] | None:
    """The measured tensor at a BatchNormalization or at the Conv before it, and how many times too large it is."""
    mean, variance = (_constant(name, graph) for name in norm.inputs[3:5])
    if mean is None or variance is None:
        return None
    level, layer = _level(norm.inputs[0], tensors, graph), graph.producer(norm.inputs[0])
    if level:
        return norm.inputs[0], level / max(math.sqrt(float(np.mean(variance + mean**2))), _TINY)
    if layer is None or layer.op != "Conv" or not _is_layer(layer, graph):
        return None
    bias, response = _bias(layer, graph), _response(layer, tensors, graph)
    if response is None or response.size != mean.size:
        return None
    trained = np.sqrt(variance + (mean if bias is None else mean - bias) ** 2)
    return layer.inputs[0], 1 / max(float(np.median(trained / response)), _TINY)


def _overdriven(tensors: Tensors, graph: Graph) -> str:
    """Words for values too large to make sense before the first function that saturates, else at a classifier's end."""
    saturating = [node for node in graph.nodes if _saturates(node, graph)]
    ends = [(node.inputs[0], f"before {node.label}, which saturates") for node in saturating]
    ends += [(name, f"at the output '{name}'") for name in graph.outputs]
    for tensor, where in ends:
        layer = _layer_behind(tensor, graph)
        response = _response(layer, tensors, graph) if layer else None
        if layer is None or response is None:
            continue
        if tensor in graph.outputs and (layer.op == "Conv" or response.size < CLASSES):
            continue
        size = float(np.median(response))
        return f", and there are values of about {size:,.0f} {where}" if size >= SATURATED else ""
    return ""


def _saturates(node: Node, graph: Graph) -> bool:
    if node.op != "Clip":
        return node.op in _SATURATING
    largest = _constant(node.inputs[2], graph) if len(node.inputs) > 2 else None
    return largest is not None and bool(np.all(largest <= _RELU6))


def _first_layers(graph: Graph) -> Iterator[tuple[tuple[str, ...], Node]]:
    """The layers that read an input of the model, each with the tensors from that input to the layer."""
    for node in graph.nodes:
        path = _path(node.inputs[0], graph) if _is_layer(node, graph) else ()
        if path:
            yield path, node


def _path(tensor: str, graph: Graph) -> tuple[str, ...]:
    """From an input of the model through constants and data movement to `tensor`; () where more lies between."""
    path = [tensor]
    while path[-1] not in graph.inputs:
        source = _upstream(path[-1], _TO_INPUT, graph)
        if source is None:
            return ()
        path.append(source)
    return tuple(reversed(path))


def _layer_behind(tensor: str, graph: Graph) -> Node | None:
    """The layer that makes a tensor, up to its bias, pooling and data movement."""
    name: str | None = tensor
    while name is not None:
        node = graph.producer(name)
        if node is not None and _is_layer(node, graph):
            return node
        name = _upstream(name, _TO_LAYER, graph)
    return None


def _upstream(tensor: str, ops: Set[str], graph: Graph) -> str | None:
    """The one activation behind data movement or one of `ops`."""
    node = graph.producer(tensor)
    if node is None or node.op not in ops:
        return moved_from(tensor, graph)
    sources = [name for name in node.inputs if name and not graph.is_constant(name)]
    return sources[0] if len(sources) == 1 else None


def _is_layer(node: Node, graph: Graph) -> bool:
    return node.op in _LAYERS and graph.is_constant(node.inputs[1]) and not graph.is_constant(node.inputs[0])


def _response(layer: Node, tensors: Tensors, graph: Graph) -> Array | None:
    """The root mean square of each output channel, without bias, if the input's values were uncorrelated.

    For most channels of real layers the true one lies within a factor of 3.
    """
    level, weights = _level(layer.inputs[0], tensors, graph), _values(layer.inputs[1], graph)
    if level is None or weights is None or not weights.size or (layer.op != "Conv" and weights.ndim != 2):
        return None
    outputs_first = layer.op == "Conv" or layer.attribute("transB")
    rows = weights.reshape(len(weights), -1) if outputs_first else weights.T
    return np.asarray(np.maximum(level * np.sqrt(np.sum(rows**2, axis=1)), _TINY), np.float64)


def _bias(layer: Node, graph: Graph) -> Array | None:
    """A layer's own bias, or the constant that is added behind it."""
    if len(layer.inputs) > 2 and layer.inputs[2]:
        return _constant(layer.inputs[2], graph)
    readers = graph.readers(layer.first_output)
    add = graph.reading_node(readers[0]) if len(readers) == 1 else None
    if add is None or add.op != "Add":
        return None
    return _constant(add.inputs[1 - readers[0].slot], graph)


def _level(tensor: str, tensors: Tensors, graph: Graph) -> float | None:
    """The root mean square of a tensor, or of the one whose values it holds; None where unknown or 0."""
    name: str | None = tensor
    while name is not None and name not in tensors:
        name = moved_from(name, graph)
    histogram = tensors[name].histogram if name else None
    if histogram is None or not histogram.any():
        return None
    counts = histogram[:FIRST_NON_FINITE]
    return math.sqrt(float(counts @ BUCKET_EDGES**2) / float(counts.sum())) or None


def _constant(tensor: str, graph: Graph) -> Array | None:
    values = _values(tensor, graph)
    return None if values is None else values.reshape(-1)


def _values(tensor: str, graph: Graph) -> Array | None:
    """A constant's values; None where it is none, or cannot be read."""
    if not graph.is_constant(tensor):
        return None
    try:
        return np.asarray(graph.value(tensor), np.float64)
    except (ModelError, ValueError):
        return None


def _peak(statistic: Statistic) -> tuple[float, float]:
    """The share of the non-zero values in the fullest bucket, and about which |x| it holds; (0, 0) for few, or all."""
    if statistic.histogram is None:
        return 0.0, 0.0
    counts = statistic.histogram[1:FIRST_NON_FINITE]
    total, fullest = int(counts.sum()), int(np.argmax(counts))
    if total < SPIKE_VALUES or counts[fullest] == total:
        return 0.0, 0.0
    return float(counts[fullest] / total), min(float(BUCKET_EDGES[fullest + 1]) * (1 + 2**-8), statistic.amax)


def _is_steady(spans: Array) -> bool:
    """True where the last four epochs hold two doublings in a row that each widened the range by STEADY."""
    if not spans[0]:
        return False
    early, middle, late = spans[1:] / spans[:-1]
    return bool(middle >= STEADY and max(early, late) >= STEADY)


def _values_needed(method: str) -> int:
    """How many values of a tensor a range method needs."""
    name, _, parameter = method.partition(":")
    if name == "entropy":
        return TAIL * _ENTROPY_BINS
    beyond = 1 - float(parameter or DEFAULT_PERCENTILE) / 100 if name == "percentile" else 0.0
    return math.ceil(round(TAIL / beyond, 6)) if beyond else 0


def _zeros(statistic: Statistic, method: str) -> int:
    """How many values the method leaves out."""
    return 0 if statistic.histogram is None or method != "entropy" else int(statistic.histogram[0])


def _origin(tensor: str, graph: Graph) -> str:
    node = graph.producer(tensor)
    return f"they first appear at {node.label}, which makes '{tensor}'" if node else f"they come in with '{tensor}'"


def _listed(names: Sequence[str], figures: Mapping[str, str] | None = None) -> str:
    """Up to three names, each with its figures in brackets, and how many more there are."""
    shown = [f"'{name}' ({figures[name]})" if figures else f"'{name}'" for name in names[:3]]
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
