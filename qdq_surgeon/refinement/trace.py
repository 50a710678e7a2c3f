"""The error of every quantized op's output, and where it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from ..calibration.feeds import Batch
from ..edges import Plan
from ..graph import Graph, Node
from ..model import Model
from .judging import BEST, decibels
from .lockstep import Both, walk

WORST = 3
JUMP = 4.0
"""The error jumps where its share of the signal grows by this factor, which is 6 dB."""
AUDIBLE = 0.01
"""A share of the signal below this (20 dB) is no jump worth naming."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """What an op makes in the Q/DQ model: its SQNR in dB against the float model, and that of what the op reads.

    `added` is the share of noise in the signal that it has and its inputs had not; `output` its first output.
    """

    op: str
    output: str
    sqnr: float
    before: float
    added: float

    def __str__(self) -> str:
        before = "exact" if self.before >= BEST else f"{self.before:.1f}"
        return f"{self.op} ({before} -> {self.sqnr:.1f} dB)"


class Trace:
    """Notes the error of each tensor that a walk stops at."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        readers = {edge.key for site in plan.sites for edge in site.edges if not edge.scope}
        self._graph = graph
        self._ops = {node.first_output: node for node in graph.nodes if node.first_output in readers}
        self._errors: dict[str, float] = {}

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(name for name in self._ops if self._graph.is_float(name))

    def visit(self, both: Both, op: str = "") -> None:
        """Note the error of a tensor as that of the op that makes it, or of `op`, whose bias was just added."""
        op = op or both.name
        if op not in self._ops:
            return
        arrays = ((np.asarray(side, np.float32) for side in each) for each in zip(both.float, both.int8, strict=True))
        pairs = [(left, left - right) for left, right in arrays]
        signal, noise = (sum(float(np.vdot(pair[side], pair[side])) for pair in pairs) for side in (0, 1))
        self._errors[op] = noise / signal if signal else float(noise > 0)

    def result(self) -> tuple[TensorError, ...]:
        """In the order of the graph."""
        level: dict[str, float] = {}
        found = []
        for node in self._graph.nodes:
            if node.scope:
                continue
            before = max((level.get(name, 0.0) for name in (*node.inputs, *node.captured)), default=0.0)
            after = self._errors.get(node.first_output, before)
            level.update(dict.fromkeys(node.outputs, after))
            if node.first_output in self._errors:
                found.append(_error(node, before, after))
        return tuple(found)


def _error(node: Node, before: float, after: float) -> TensorError:
    return TensorError(node.label, node.first_output, decibels(after), decibels(before), max(0.0, after - before))


def trace(model: Model, plan: Plan, quantized: ModelProto, samples: Sequence[Batch]) -> tuple[TensorError, ...]:
    """The errors along one walk over the samples."""
    noted = Trace(model.graph, plan)
    outputs = [name for name in model.graph.outputs if model.graph.producer(name) and not model.graph.is_constant(name)]
    walk(model, quantized, samples, outputs, noted.stops, noted.visit)
    return noted.result()


def worst(errors: Sequence[TensorError], number: int = WORST) -> tuple[TensorError, ...]:
    """The ops that add most to the error, worst first."""
    return tuple(sorted((error for error in errors if error.added > 0), key=lambda error: -error.added)[:number])


def first_jump(errors: Sequence[TensorError]) -> TensorError | None:
    """The first op behind which the error is several times what it was before, and can be heard."""
    for error in errors:
        after, before = 10 ** (-error.sqnr / 10), 10 ** (-error.before / 10)
        if after > AUDIBLE and after > JUMP * before:
            return error
    return None
