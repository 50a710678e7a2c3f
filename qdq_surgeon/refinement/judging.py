"""How far the Q/DQ model's results are from the float model's, in one number to choose by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..calibration.feeds import Batch
from ..graph import Graph
from .lockstep import Both

Array: TypeAlias = NDArray[np.float64]

SQUASHING = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
"""Behind these an error shows only where it flips a decision, so the judging is done before them."""
PASSING = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast"})
MOST_CHANNELS = 1024
BEST = 120.0
"""dB: more is no difference."""


JUDGED_EVERY = 4
"""One sample in so many is not chosen or fitted on, and judges."""


def parted(samples: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Samples to choose or fit on, and others to judge by; the same ones where there are too few."""
    fitted = len(samples) - len(samples) // JUDGED_EVERY
    return samples[:fitted], samples[fitted:] or samples


def number_of(samples: Sequence[Batch]) -> int:
    """How many samples the batches hold."""
    return sum(batch.samples for batch in samples)


def judged(graph: Graph) -> tuple[str, ...]:
    """The tensors to judge by: the float outputs, or what they are before a last Softmax or Sigmoid."""
    found = (_logits(graph, name) for name in graph.outputs if graph.is_float(name) and not graph.is_constant(name))
    return tuple(dict.fromkeys(found))


def _logits(graph: Graph, output: str) -> str:
    name, node = output, graph.producer(output)
    while node is not None and not node.scope and node.op in PASSING and graph.is_float(node.inputs[0]):
        name = node.inputs[0]
        node = graph.producer(name)
    if node is None or node.op not in SQUASHING or graph.producer(node.inputs[0]) is None:
        return output
    return node.inputs[0]


def relative_error(boths: Iterable[Both], samples: slice = slice(None)) -> float:
    """Noise by signal power, from 0 to 1: the mean over the tensors, and over the channels of each.

    So an output of which a few channels are lost cannot hide behind others with larger values, as class scores hide
    behind the boxes of a detector. Class scores (samples, classes) count as one channel, each sample centred.
    """
    found = [_of_channels(both.float[samples], both.int8[samples]) for both in boths]
    return float(np.mean(found)) if found else 0.0


def decibels(error: float) -> float:
    """A relative error as SQNR in dB."""
    return min(BEST, -10 * math.log10(error)) if error > 0 else BEST


def channel_axis(shapes: Sequence[Sequence[int]]) -> int | None:
    """Along which axis an output holds different things; None for class scores, vectors and numbers.

    The shorter one of axis 1 and the last, so that neither layout (channels first or last) need be told; among those
    that are equally long in all samples.
    """
    first = shapes[0]
    if len(first) < 3 or all(size == 1 for size in first[2:]):
        return None
    last = len(first) - 1
    fixed = [axis for axis in (1, last) if len({shape[axis] for shape in shapes}) == 1 and first[axis] <= MOST_CHANNELS]
    return min(fixed, key=lambda axis: first[axis], default=None)


def _of_channels(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> float:
    signal, noise = np.zeros(1), np.zeros(1)
    axis = channel_axis([array.shape for array in expected])
    for left, right in zip(expected, actual, strict=True):
        powers, errors = _powers(left, right, axis)
        signal, noise = signal + powers, noise + errors
    heard = (signal > 0) | (noise > 0)
    if not heard.any():
        return 0.0
    share = np.where(np.isfinite(noise), noise, np.inf)[heard] / np.maximum(signal[heard], np.finfo(float).tiny)
    return float(np.minimum(share, 1).mean())


def _powers(expected: NDArray[Any], actual: NDArray[Any], axis: int | None) -> tuple[Array, Array]:
    """The power of the signal and of the error, per channel."""
    left, right = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if axis is not None:
        others = tuple(index for index in range(left.ndim) if index != axis)
        return np.square(left).sum(others), np.square(left - right).sum(others)
    if left.ndim >= 2 and left.shape[1] >= 2 and all(size == 1 for size in left.shape[2:]):
        left, right = (values - values.mean(1, keepdims=True) for values in (left, right))
    return np.square(left).sum(keepdims=True).reshape(1), np.square(left - right).sum(keepdims=True).reshape(1)
