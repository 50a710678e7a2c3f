"""Weights rounded for what the layer computes, not one by one.

After E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR
2023): columns are rounded in turn, those that carry most first, and what each loses is made up for by the columns
still to come, by the inverse Hessian of the layer's squared error. The grid is that of the scales, symmetric INT8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..calibration.feeds import Batch
from ..calibration.sessions import Progress
from ..edges import LEVELS, Plan, Site, count
from ..graph import Graph, Node
from ..model import Model
from ..scales import Scales
from .judging import gain, judged, number_of, parted
from .lockstep import Both, walk

Array: TypeAlias = NDArray[Any]

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean: it is never singular then."""
BLOCK = 128
"""Columns that are rounded before the rest hears of it."""
ROWS = 8192
"""Positions of one layer's input, over all samples, that the Hessian is made of."""
MOST_INPUTS = 8192
"""Layers with more inputs to a channel are left alone: their Hessian alone would take more than 512 MB."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weighted op whose weight nobody else reads: `data` and `weight` are the sites that it reads."""

    node: Node
    data: Site
    weight: Site


def layers(graph: Graph, sites: Iterable[Site]) -> Iterator[Layer]:
    """The Conv, Gemm and MatMul that read both inputs through pairs, the weight per output from an initializer."""
    initializers = {tensor.name for tensor in graph.proto.graph.initializer}
    by_edge = {(edge.key, edge.slot): site for site in sites for edge in site.edges if not edge.scope}
    for node in graph.nodes:
        data, weight = (by_edge.get((node.first_output, slot)) for slot in (0, 1))
        if data is None or weight is None or data.weight or weight.is_in_model or weight.axis is None:
            continue
        alone = len(graph.readers(weight.tensor)) == 1 and weight.tensor in initializers
        if alone and weight.axis == _output_axis(graph, node) and _inputs(graph, weight) <= MOST_INPUTS:
            yield Layer(node, data, weight)


def _output_axis(graph: Graph, node: Node) -> int | None:
    """The axis of the weight along which the outputs lie; None where a position's inputs are not a row of the data."""
    if node.op == "Conv":
        return 0
    if node.op == "Gemm" and not node.attribute("transA"):
        return 0 if node.attribute("transB") else 1
    return 1 if node.op == "MatMul" and len(graph.shape(node.inputs[1]) or ()) == 2 else None


def _inputs(graph: Graph, weight: Site) -> int:
    """How many inputs of a group make one output."""
    shape = graph.shape(weight.tensor) or ()
    return math.prod(size or 1 for axis, size in enumerate(shape) if axis != weight.axis)


@dataclass(frozen=True)
class WeightRounding:
    """Weights on their INT8 grid, as floats, by name.

    Made on `fitted` samples. On `judged` others (0: the same ones) the mean SQNR of the results is `after` dB with
    them and `before` dB with weights rounded to the nearest; `kept` says that they are used.
    """

    values: Mapping[str, Array] = field(default_factory=dict, repr=False)
    fitted: int = 0
    judged: int = 0
    before: float = 0.0
    after: float = 0.0

    @property
    def kept(self) -> bool:
        return self.after > self.before

    @property
    def weights(self) -> Mapping[str, Array]:
        """The weights to use: none where they do not help."""
        return self.values if self.kept else {}

    def __str__(self) -> str:
        if not self.values:
            return "nothing for GPTQ to round: no layer reads its data, and a weight of its own per channel, in INT8"
        verb = "rounded by GPTQ" if self.kept else "not rounded by GPTQ"
        others = count(self.judged, "other") if self.judged else "the same"
        return (
            f"{count(len(self.values), 'weight')} {verb}, on {count(self.fitted, 'sample')}: SQNR {self.after:.1f} dB "
            f"instead of {self.before:.1f} dB on {others}"
        )


def round_weights(
    model: Model,
    plan: Plan,
    scales: Scales,
    quantized: ModelProto,
    samples: Sequence[Batch],
    progress: Progress | None = None,
) -> WeightRounding:
    """Round the weights: each layer on what the layers before it really give."""
    graph, results = model.graph, judged(model.graph)
    by_data: dict[str, list[Layer]] = {}
    for layer in layers(graph, scales.sites(plan)):
        by_data.setdefault(layer.data.tensor, []).append(layer)
    if not by_data or not results:
        return WeightRounding()
    fitting, _ = parted(samples)
    values: dict[str, Array] = {}

    def visit(both: Both) -> Mapping[str, Array]:
        seen = both.int8[: len(fitting)]
        fresh = {layer.weight.tensor: _rounded_weight(graph, layer, scales, seen) for layer in by_data[both.name]}
        values.update(fresh)
        if progress:
            progress("gptq", len(values), sum(map(len, by_data.values())))
        return fresh

    for name in (name for name in by_data if name in graph.inputs):
        arrays = [sample.feed[name] for sample in samples]
        visit(Both(name, arrays, arrays))
    stops = [name for name in by_data if name not in graph.inputs]
    after = walk(model, quantized, samples, results, stops, visit, dict(values))
    return WeightRounding(
        values,
        number_of(fitting),
        number_of(samples) - number_of(fitting),
        *gain(model, quantized, samples, after),
    )


def _rounded_weight(graph: Graph, layer: Layer, scales: Scales, seen: Sequence[Array]) -> Array:
    """One weight on its grid, in its own shape and type."""
    weight, scale = graph.value(layer.weight.tensor), scales.of(layer.weight)
    first = layer.weight.axis == 0
    rows = (weight if first else weight.T).reshape(len(scale), -1).astype(np.float64)
    groups = int(layer.node.attribute("group")) if layer.node.op == "Conv" else 1
    rng = np.random.default_rng(0)
    most = -(-ROWS // max(len(seen), 1))
    read = [_patches(_levels(array, scales.of(layer.data)), layer.node, weight.shape, rng, most) for array in seen]
    parts = np.concatenate(read).reshape(-1, groups, rows.shape[1]).transpose(1, 0, 2)
    hessians = np.matmul(parts.transpose(0, 2, 1), parts).astype(np.float64)
    integers = rounded(rows.reshape(groups, -1, rows.shape[1]), scale.reshape(groups, -1), hessians)
    values = (integers.reshape(len(scale), -1) * scale[:, None].astype(np.float64)).astype(weight.dtype)
    shaped = values.reshape(weight.shape) if first else values.reshape(weight.T.shape).T
    return np.ascontiguousarray(shaped)


def _levels(array: Array, scale: Array) -> Array:
    """What the layer reads, in units of the scale: a factor on all of it does not change which integers are best."""
    units = np.rint(array.astype(np.float32) / scale.astype(np.float32))
    return np.asarray(np.clip(np.nan_to_num(units), -LEVELS - 1, LEVELS))


def _patches(array: Array, node: Node, shape: tuple[int, ...], rng: np.random.Generator, most: int) -> Array:
    """What at most so many positions of the output are computed from: (positions, inputs), of all groups side by side.

    Drawn, since evenly spaced ones may all lie in one column of the images.
    """
    windows = _windows(array, node, shape[2:]) if node.op == "Conv" else array
    sizes = windows.shape[: windows.ndim - max(len(shape) - 1, 1)]
    some = rng.permutation(math.prod(sizes))[:most]
    return np.asarray(windows[np.unravel_index(some, sizes)].reshape(len(some), math.prod(windows.shape[len(sizes) :])))


def _windows(array: Array, node: Node, kernel: tuple[int, ...]) -> Array:
    """A view of what a Conv reads: (samples, *positions, channels, *kernel)."""
    strides, dilations = (node.attribute(name) or [1] * len(kernel) for name in ("strides", "dilations"))
    reach = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    padded = np.pad(array, ((0, 0), (0, 0), *_padding(node, array.shape[2:], reach, strides)))
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, padded.ndim)))
    steps = (slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations)))
    return np.moveaxis(windows[steps], 1, 1 + len(kernel))


def _padding(node: Node, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Before and behind each spatial axis."""
    how = node.attribute("auto_pad") or "NOTSET"
    if how in ("NOTSET", "VALID"):
        pads = node.attribute("pads") if how == "NOTSET" else None
        pads = pads or [0] * 2 * len(sizes)
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    wanted = [
        max(0, (-(-size // step) - 1) * step + width - size)
        for size, width, step in zip(sizes, reach, strides, strict=True)
    ]
    less = [(total // 2, total - total // 2) for total in wanted]
    return [(high, low) for low, high in less] if how == "SAME_LOWER" else less


def rounded(weights: Array, scales: Array, hessians: Array) -> NDArray[np.int8]:
    """Weights (groups, outputs, inputs) as integers -127..127, for scales (groups, outputs), Hessians X'X by group.

    No worse than rounding each to the nearest: where it is, for an output, the nearest integers stay.
    """
    nearest = np.clip(np.rint(weights / scales[..., None]), -LEVELS, LEVELS)
    size = weights.shape[-1]
    diagonal = np.einsum("gii->gi", hessians)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    groups = np.arange(len(weights))[:, None]
    damped = hessians[groups[..., None], order[..., None], order[:, None, :]]
    np.einsum("gii->gi", damped)[...] += np.maximum(DAMPING * diagonal.mean(1), np.finfo(float).tiny)[:, None]
    upper = _upper_factor(damped)
    left = weights.transpose(0, 2, 1)[groups, order].transpose(0, 2, 1).copy()
    result = np.empty_like(left)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        lost = np.zeros_like(left[..., start:stop])
        for column in range(start, stop):
            values = left[..., column]
            result[..., column] = np.clip(np.rint(values / scales), -LEVELS, LEVELS)
            pivot = upper[:, column, column][:, None]
            error = (values - result[..., column] * scales) / pivot
            left[..., column:stop] -= error[..., None] * upper[:, None, column, column:stop]
            lost[..., column - start] = error
        left[..., stop:] -= lost @ upper[:, start:stop, stop:]
    back = np.argsort(order, axis=1)
    result = result.transpose(0, 2, 1)[groups, back].transpose(0, 2, 1)
    better = _loss(weights, result, scales, hessians) < _loss(weights, nearest, scales, hessians)
    return np.where(better[..., None], result, nearest).astype(np.int8)


def _upper_factor(matrices: Array) -> Array:
    """U with U'U the inverse of each matrix, upper triangular."""
    return _inverse(np.linalg.cholesky(matrices[:, ::-1, ::-1])[:, ::-1, ::-1])


def _inverse(upper: Array) -> Array:
    """The inverse of upper triangular matrices, by halves."""
    half = upper.shape[-1] // 2
    if half < BLOCK:
        return np.asarray(np.linalg.inv(upper))
    result = np.zeros_like(upper)
    result[:, :half, :half] = first = _inverse(upper[:, :half, :half])
    result[:, half:, half:] = last = _inverse(upper[:, half:, half:])
    result[:, :half, half:] = -first @ upper[:, :half, half:] @ last
    return result


def _loss(weights: Array, integers: Array, scales: Array, hessians: Array) -> Array:
    """The squared error of each output: e' H e."""
    error = weights - integers * scales[..., None]
    return np.asarray(np.einsum("goi,goi->go", error @ hessians, error))
