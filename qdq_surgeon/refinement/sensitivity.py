"""Where quantizing hurts: what every pair and every op alone adds to the error of the model's results.

Pair by pair, the model runs with that one pair and all else in float. The errors of different pairs are taken as
independent, so that their powers add up: an op's contribution is the sum over the pairs that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from ..calibration.feeds import Batch
from ..calibration.sessions import Progress
from ..edges import Plan, Site, count
from ..graph import Graph, multiply_accumulates
from ..model import Model
from ..report.tables import decibels as in_decibels
from ..report.tables import table
from .judging import decibels, judged, relative_error
from .lockstep import Both
from .switches import Switched
from .trace import TensorError, trace

SHOWN = 20


@dataclass(frozen=True, slots=True)
class SiteNoise:
    """One pair alone: the SQNR of the results in dB, and its part in the sum of all pairs' errors (0 to 1)."""

    tensor: str
    axis: int | None
    weight: bool
    readers: tuple[str, ...]
    sqnr: float
    share: float


@dataclass(frozen=True, slots=True)
class OpNoise:
    """One op: its part in the sum of all errors (0 to 1), and its multiply-accumulates per sample (0: unknown or none).

    `output` is its first output, by which --exclude takes it.
    """

    op: str
    output: str
    share: float
    macs: int


@dataclass(frozen=True)
class Sensitivity:
    """Pairs and ops, worst first; `tensors` in the order of the graph, with all pairs at work.

    `sqnr`: that of the results with all pairs, in dB. `passes`: forward passes of the whole model for each sample.
    """

    sites: tuple[SiteNoise, ...]
    ops: tuple[OpNoise, ...]
    tensors: tuple[TensorError, ...]
    sqnr: float
    samples: int
    passes: int

    def __str__(self) -> str:
        head = (
            f"{self.passes} forward passes of {count(self.samples, 'sample')}; "
            f"SQNR with all {len(self.sites)} pairs {self.sqnr:.1f} dB"
        )
        ops = [
            (op.op, f"{op.share:.1%}", f"{op.macs:,}" if op.macs else "-", _sqnr_of(op.output, self.tensors))
            for op in self.ops[:SHOWN]
        ]
        sites = [
            (site.tensor, "weight" if site.weight else "activation", f"{site.share:.1%}", in_decibels(site.sqnr))
            for site in self.sites[:SHOWN]
        ]
        return (
            f"{head}\n\n{table(('op', 'of the error', 'MACs', 'SQNR of its output'), ops)}\n\n"
            f"{table(('pair', 'of', 'of the error', 'SQNR alone'), sites)}"
        )


def _sqnr_of(output: str, tensors: Sequence[TensorError]) -> str:
    return next((in_decibels(error.sqnr) for error in tensors if error.output == output), "-")


def measure(
    model: Model, plan: Plan, quantized: ModelProto, samples: Sequence[Batch], progress: Progress | None = None
) -> Sensitivity:
    """Measure every pair of the plan alone, then all of them together.

    `quantized`: the model with its pairs and without corrections. Raises ModelError where onnxruntime refuses it.
    """
    results = judged(model.graph)
    switched = Switched(quantized, results, model.custom_ops)
    sites = _pairs_of(plan, Graph(quantized, deep=True), set(switched.pairs))
    expected = [switched.run(sample, ()) for sample in samples]
    runs = [(pair,) for pair in sites] + [switched.pairs]
    errors = []
    for index, pairs in enumerate(runs):
        actual = [switched.run(sample, pairs) for sample in samples]
        columns = zip(results, zip(*expected, strict=True), zip(*actual, strict=True), strict=True)
        errors.append(relative_error(Both(name, list(left), list(right)) for name, left, right in columns))
        if progress:
            progress("sensitivity", index + 1, len(runs))
    total = sum(errors[:-1]) or 1.0
    alone = dict(zip(sites, errors, strict=False))
    noises = [
        SiteNoise(
            site.tensor, site.axis, site.weight, tuple(map(str, site.edges)), decibels(alone[pair]), alone[pair] / total
        )
        for pair, site in sites.items()
    ]
    tensors = trace(model, plan, quantized, samples)
    ops = _ops(model, sites, alone, total, samples[0])
    return Sensitivity(
        tuple(sorted(noises, key=lambda noise: -noise.share)),
        tuple(sorted(ops, key=lambda op: -op.share)),
        tensors,
        decibels(errors[-1]),
        sum(sample.samples for sample in samples),
        len(runs) + 3,
    )


def _pairs_of(plan: Plan, quantized: Graph, pairs: set[str]) -> dict[str, Site]:
    """The sites by what their pair's DequantizeLinear makes."""
    found: dict[str, Site] = {}
    for site in plan.sites:
        for edge in site.edges:
            node = quantized.producer(edge.key)
            name = node.proto.input[edge.slot] if node is not None and edge.slot < len(node.proto.input) else ""
            if name in pairs:
                found.setdefault(name, site)
    return found


def _ops(
    model: Model, sites: Mapping[str, Site], alone: Mapping[str, float], total: float, sample: Batch
) -> Iterator[OpNoise]:
    fed = model.graph.shapes_for(sample.shapes)
    shares: dict[str, float] = {}
    for pair, site in sites.items():
        for key in {edge.key for edge in site.edges}:
            shares[key] = shares.get(key, 0.0) + alone[pair] / total
    for node in model.graph.nodes:
        if node.first_output in shares:
            macs = multiply_accumulates(node, lambda name: fed.get(name) or model.graph.shape(name))
            yield OpNoise(node.label, node.first_output, shares[node.first_output], macs // sample.samples)
