"""Weights rounded for what the layer computes, not one by one.

After E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR
2023): columns are rounded in turn, those that carry most first, and what each loses is made up for by the columns
still to come, by the inverse Hessian of the layer's squared error. The grid is that of the scales, symmetric INT8.
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
from ..edges import LEVELS, Plan, Site, count
from ..graph import Graph, Node
from ..model import Model
from ..scales import Scales
from .judging import decibels, judged, number_of, parted, relative_error
from .lockstep import Both, walk

Array: TypeAlias = NDArray[Any]

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean: it is never singular then."""
BLOCK = 128
"""Columns that are rounded before the rest hears of it."""
ROWS = 8192
"""Positions of one layer's input, over all samples, that the Hessian is made of."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weighted op whose weight nobody else reads: `data` and `weight` are the sites that it reads."""

    node: Node
    data: Site
    weight: Site


def layers(graph: Graph, plan: Plan) -> Iterator[Layer]:
    """The Conv, Gemm and MatMul of the plan that read both inputs through pairs, the weight from an initializer."""
    initializers = {tensor.name for tensor in graph.proto.graph.initializer}
    sites = {(edge.key, edge.slot): site for site in plan.sites for edge in site.edges if not edge.scope}
    for node in graph.nodes:
        data, weight = (sites.get((node.first_output, slot)) for slot in (0, 1))
        if node.op not in ("Conv", "Gemm", "MatMul") or data is None or weight is None:
            continue
        alone = len(graph.readers(weight.tensor)) == 1 and weight.tensor in initializers
        straight = node.op != "Gemm" or not node.attribute("transA")
        matrix = node.op == "Conv" or len(graph.shape(weight.tensor) or ()) == 2
        if alone and straight and matrix and not weight.is_in_model and not data.weight and weight.axis is not None:
            yield Layer(node, data, weight)


@dataclass(frozen=True)
class WeightRounding:
    """Weights on their INT8 grid, as floats, by name.

    Made on `fitted` samples. On `judged` others the mean SQNR of the results is `after` dB with them and `before` dB
    with weights rounded to the nearest; `kept` says that they are used.
    """

    values: Mapping[str, Array] = field(repr=False)
    fitted: int
    judged: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after > self.before

    @property
    def weights(self) -> Mapping[str, Array]:
        """The weights to use: none where they do not help."""
        return self.values if self.kept else {}

    def __str__(self) -> str:
        verb = "rounded by GPTQ" if self.kept else "not rounded by GPTQ"
        return (
            f"{count(len(self.values), 'weight')} {verb}, on {count(self.fitted, 'sample')}: SQNR {self.after:.1f} dB "
            f"instead of {self.before:.1f} dB on {count(self.judged, 'other')}"
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
    fitting, judging = parted(samples)
    values = _rounded_weights(model, plan, scales, quantized, fitting, progress)
    results = judged(model.graph)
    before, after = (
        decibels(relative_error(walk(model, quantized, judging, results, weights=weights))) for weights in ({}, values)
    )
    return WeightRounding(values, number_of(fitting), number_of(judging), before, after)


def _rounded_weights(
    model: Model,
    plan: Plan,
    scales: Scales,
    quantized: ModelProto,
    samples: Sequence[Batch],
    progress: Progress | None,
) -> dict[str, Array]:
    graph = model.graph
    by_data: dict[str, list[Layer]] = {}
    for layer in layers(graph, plan):
        by_data.setdefault(layer.data.tensor, []).append(layer)
    found: dict[str, Array] = {}

    def visit(both: Both) -> Mapping[str, Array]:
        fresh = {}
        for layer in by_data[both.name]:
            scale = float(scales.of(layer.data))
            seen = [_fake_quantized(array, scale) for array in both.int8]
            fresh[layer.weight.tensor] = _rounded_weight(graph, layer, scales.of(layer.weight), seen)
        found.update(fresh)
        if progress:
            progress("gptq", len(found), None)
        return fresh

    stops = [name for name in by_data if name not in graph.inputs]
    fed = [name for name in by_data if name in graph.inputs]
    for name in fed:
        arrays = [sample.feed[name] for sample in samples]
        visit(Both(name, arrays, arrays))
    walk(model, quantized, samples, stops[-1:], stops, visit, dict(found))
    return found


def _fake_quantized(array: Array, scale: float) -> Array:
    return np.asarray(np.clip(np.rint(array / scale), -LEVELS - 1, LEVELS) * scale, np.float32)


def _rounded_weight(graph: Graph, layer: Layer, scale: Array, seen: Sequence[Array]) -> Array:
    """One weight on its grid, in its own shape and type."""
    weight = graph.value(layer.weight.tensor)
    first = layer.weight.axis == 0
    rows = (weight if first else weight.T).reshape(len(scale), -1).astype(np.float64)
    groups = int(layer.node.attribute("group")) if layer.node.op == "Conv" else 1
    inputs = [_patches(array, layer.node, weight.shape) for array in seen]
    hessian = sum(np.matmul(part.transpose(0, 2, 1), part) for part in _thinned(inputs, groups))
    integers = rounded(rows.reshape(groups, -1, rows.shape[1]), scale.reshape(groups, -1), np.asarray(hessian))
    values = (integers.reshape(len(scale), -1) * scale[:, None].astype(np.float64)).astype(weight.dtype)
    shaped = values.reshape(weight.shape) if first else values.reshape(weight.T.shape).T
    return np.ascontiguousarray(shaped)


def _patches(array: Array, node: Node, shape: tuple[int, ...]) -> Array:
    """What a position of the output is computed from: (positions, inputs), of all groups side by side."""
    if node.op != "Conv":
        return np.asarray(array.reshape(-1, array.shape[-1]))
    kernel = shape[2:]
    strides, dilations = (node.attribute(name) or [1] * len(kernel) for name in ("strides", "dilations"))
    reach = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    padded = np.pad(array, ((0, 0), (0, 0), *_padding(node, array.shape[2:], reach, strides)))
    axes = tuple(range(2, padded.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
    steps = (slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations)))
    windows = np.moveaxis(windows[steps], 1, 1 + len(kernel))  # (samples, positions, channels, kernel)
    return windows.reshape(-1, array.shape[1] * int(np.prod(kernel)))


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


def _thinned(inputs: Sequence[Array], groups: int) -> Iterator[Array]:
    """Some of the positions of each sample, as (groups, positions, inputs of a group)."""
    step = max(1, -(-sum(map(len, inputs)) // ROWS))
    for array in inputs:
        some = array[::step].astype(np.float64)
        yield some.reshape(len(some), groups, -1).transpose(1, 0, 2)


def rounded(weights: Array, scales: Array, hessians: Array) -> NDArray[np.int8]:
    """Weights (groups, outputs, inputs) as integers -127..127, for scales (groups, outputs), Hessians X'X by group.

    No worse than rounding each to the nearest: where it is, for an output, the nearest integers stay.
    """
    nearest = np.clip(np.rint(weights / scales[..., None]), -LEVELS, LEVELS)
    size = weights.shape[-1]
    diagonal = np.einsum("gii->gi", hessians)
    damped = hessians + np.eye(size) * np.maximum(DAMPING * diagonal.mean(1), np.finfo(float).tiny)[:, None, None]
    order = np.argsort(-diagonal, axis=1, kind="stable")
    groups = np.arange(len(weights))[:, None]
    damped = damped[groups[..., None], order[..., None], order[:, None, :]]
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
    return np.asarray(np.linalg.cholesky(np.linalg.inv(matrices)).transpose(0, 2, 1))


def _loss(weights: Array, integers: Array, scales: Array, hessians: Array) -> Array:
    """The squared error of each output: e' H e."""
    error = weights - integers * scales[..., None]
    return np.asarray(np.einsum("goi,goi->go", error @ hessians, error))
