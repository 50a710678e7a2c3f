"""How far the Q/DQ model's results are from the float model's, in one number to choose by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..calibration.feeds import Batch
from ..graph import Graph
from ..model import Model
from .lockstep import Both, results_of

Array: TypeAlias = NDArray[np.float64]

SQUASHING = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
"""Behind these an error shows only where it flips a decision, so the judging is done before them."""
PASSING = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast"})
PICKING = frozenset({"ArgMax", "ArgMin", "TopK"})
MOST_CHANNELS = 1024
BEST = 120.0
"""dB: more is no difference."""


JUDGED_EVERY = 3
"""One sample in so many is not chosen or fitted on, and judges."""


def parted(samples: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Samples to choose or fit on, and others to judge by; the same ones where there are too few."""
    fitted = len(samples) - len(samples) // JUDGED_EVERY
    return samples[:fitted], samples[fitted:] or samples


def number_of(samples: Sequence[Batch]) -> int:
    """How many samples the batches hold."""
    return sum(batch.samples for batch in samples)


def judged(graph: Graph) -> tuple[str, ...]:
    """The float tensors to judge by: the outputs, or what they are before a last Softmax, Sigmoid, ArgMax or TopK."""
    found = (_logits(graph, name) for name in graph.outputs if not graph.is_constant(name))
    return tuple(dict.fromkeys(name for name in found if name))


def _logits(graph: Graph, output: str) -> str | None:
    name, node = output, graph.producer(output)
    while node is not None and not node.scope and node.op in PASSING | PICKING and node.inputs[0]:
        name = node.inputs[0]
        node = graph.producer(name)
    if node is not None and node.op in SQUASHING and graph.producer(node.inputs[0]) is not None:
        name = node.inputs[0]
    elif graph.is_float(output):
        return output
    return name if graph.is_float(name) and graph.producer(name) is not None else None


def relative_error(boths: Iterable[Both], samples: slice = slice(None)) -> float:
    """Noise by signal power, from 0 to 1: the mean over the tensors, and over the channels of each.

    So an output of which a few channels are lost cannot hide behind others with larger values, as class scores hide
    behind the boxes of a detector. Class scores (samples, classes) count as one channel, each sample centred.
    """
    found = [_of_channels(both.float[samples], both.int8[samples]) for both in boths]
    return float(np.mean(found)) if found else 0.0


def gain(model: Model, quantized: ModelProto, samples: Sequence[Batch], after: Sequence[Both]) -> tuple[float, float]:
    """The SQNR in dB of the samples that judge: of `quantized` as it is, and `after` what a walk changed."""
    judging = parted(samples)[1]
    unseen = slice(len(samples) - len(judging), None)
    plain = results_of(model, quantized, judging, [both.name for both in after])
    before = [Both(both.name, both.float[unseen], arrays) for both, arrays in zip(after, plain, strict=True)]
    return decibels(relative_error(before)), decibels(relative_error(after, unseen))


def decibels(error: float) -> float:
    """A relative error as SQNR in dB."""
    return min(BEST, -10 * math.log10(error)) if error > 0 else BEST


def channel_axis(shapes: Sequence[Sequence[int]]) -> int | None:
    """Along which axis an output holds different things; None for class scores, vectors and numbers.

    Axis 1 or the last, so that neither layout (channels first or last) need be told: of images the one that leaves
    sides more alike, of sequences the shorter one; only one that is equally long in all samples.
    """
    first = shapes[0]
    if len(first) < 3 or all(size == 1 for size in first[2:]):
        return None
    last = len(first) - 1
    alike = [axis for axis in (1, last) if len({shape[axis : axis + 1] for shape in map(tuple, shapes)}) == 1]
    return min(
        (axis for axis in alike if first[axis] <= MOST_CHANNELS), key=lambda axis: _oddity(first, axis), default=None
    )


def _oddity(shape: Sequence[int], axis: int) -> float:
    """How unlike a channel axis it is."""
    if len(shape) == 3:
        return shape[axis]
    sides = [size for index, size in enumerate(shape) if index not in (0, axis)]
    return max(sides) / max(min(sides), 1)


def _of_channels(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> float:
    signal, noise = np.zeros(1), np.zeros(1)
    axis = channel_axis([array.shape for array in expected])
    for left, right in zip(expected, actual, strict=True):
        if left.shape != right.shape:
            return 1.0
        left, right = (_centred(np.asarray(values, np.float64)) if axis is None else values for values in (left, right))
        channels = powers(left, right, axis)
        signal, noise = signal + channels[0], noise + channels[1]
    heard = (signal > 0) | (noise > 0)
    if not heard.any():
        return 0.0
    with np.errstate(over="ignore", divide="ignore"):
        return float(np.minimum(noise[heard] / signal[heard], 1).mean())


def powers(expected: NDArray[Any], actual: NDArray[Any], axis: int | None) -> tuple[Array, Array]:
    """The power of the signal and of the error, per channel: (channels,), or (1,) without an axis.

    What is not finite counts nothing where it is the same in both, else as an error without bound.
    """
    left, right = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore", over="ignore"):
        signal = np.where(finite, np.square(left), 0.0)
        noise = np.where(finite, np.square(left - right), np.where(same, 0.0, np.inf))
    others = tuple(index for index in range(left.ndim) if index != axis)
    return np.atleast_1d(signal.sum(others)), np.atleast_1d(noise.sum(others))


def _centred(scores: Array) -> Array:
    """Class scores without what all of a sample have in common, which changes no decision."""
    if scores.ndim < 2 or scores.shape[1] < 2 or any(size != 1 for size in scores.shape[2:]):
        return scores
    if not np.isfinite(scores).all():
        return scores
    return np.asarray(scores - scores.mean(1, keepdims=True))
