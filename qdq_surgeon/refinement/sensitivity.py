"""Where quantizing hurts: what every pair and every op alone adds to the error of the model's results.

Pair by pair, the model runs with that one pair and all else in float. Pairs between which only data moves round the
same values, so they are one. The errors of different pairs are taken as independent, so that their powers add up: an
op's contribution is the sum over the pairs that it reads, each divided equally among the ops that compute with it. An
op that only moves data has none.
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
from ..rules.commuting import commutes
from ..scales import Chains
from .judging import decibels, judged, number_of, relative_error
from .lockstep import Both
from .switches import Switched
from .trace import TensorError, trace

SHOWN = 20


@dataclass(frozen=True, slots=True)
class SiteNoise:
    """One pair alone: the SQNR of the results in dB, and its part in the sum of all pairs' errors (0 to 1).

    A pair that rounds again what another has rounded, with only data movement between, has its SQNR and no part.
    """

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
    `data`: where the samples come from.
    """

    sites: tuple[SiteNoise, ...]
    ops: tuple[OpNoise, ...]
    tensors: tuple[TensorError, ...]
    sqnr: float
    samples: int
    passes: int
    data: str = ""

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
    groups = _joined(plan, sites)
    expected = [switched.run(sample, ()) for sample in samples]
    runs = [*groups, switched.pairs]
    errors = []
    for index, pairs in enumerate(runs):
        actual = [switched.run(sample, pairs) for sample in samples]
        columns = zip(results, zip(*expected, strict=True), zip(*actual, strict=True), strict=True)
        errors.append(relative_error(Both(name, list(left), list(right)) for name, left, right in columns))
        if progress:
            progress("sensitivity", index + 1, len(runs))
    total = sum(errors[:-1]) or 1.0
    noises = [
        _of_site(sites[pair], error, 0.0 if number else error / total)
        for group, error in zip(groups, errors, strict=False)
        for number, pair in enumerate(group)
    ]
    tensors = trace(model, plan, quantized, samples)
    shares = _shares(model.graph, [[sites[pair] for pair in group] for group in groups], errors, total)
    ops = _ops(model, shares, samples[0])
    return Sensitivity(
        tuple(sorted(noises, key=lambda noise: -noise.share)),
        tuple(sorted(ops, key=lambda op: -op.share)),
        tensors,
        decibels(errors[-1]),
        number_of(samples),
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


def _joined(plan: Plan, sites: Mapping[str, Site]) -> list[tuple[str, ...]]:
    """The pairs that are measured together: those between which only data moves, the first of them first."""
    bases = Chains(plan).bases
    groups: dict[str, list[str]] = {}
    for pair, site in sites.items():
        groups.setdefault(pair if site.weight else bases[site.tensor], []).append(pair)
    return [tuple(sorted(group, key=lambda pair: sites[pair].tensor != base)) for base, group in groups.items()]


def _of_site(site: Site, error: float, share: float) -> SiteNoise:
    return SiteNoise(site.tensor, site.axis, site.weight, tuple(map(str, site.edges)), decibels(error), share)


def _shares(graph: Graph, groups: Sequence[Sequence[Site]], errors: Sequence[float], total: float) -> dict[str, float]:
    """Each op's part in the error, by its first output: of each pair an equal part with all that compute with it."""
    shares: dict[str, float] = {}
    for group, error in zip(groups, errors, strict=False):
        readers = {edge.key: graph.reading_node(edge) for site in group for edge in site.edges}
        computing = [key for key, node in readers.items() if node is not None and not commutes(node, graph)]
        for key in readers:
            part = error / total / len(computing) if key in computing else 0.0
            shares[key] = shares.get(key, 0.0) + part
    return shares


def _ops(model: Model, shares: Mapping[str, float], sample: Batch) -> Iterator[OpNoise]:
    fed = model.graph.shapes_for(sample.shapes)
    for node in model.graph.nodes:
        if node.first_output in shares:
            macs = multiply_accumulates(node, lambda name: fed.get(name) or model.graph.shape(name))
            yield OpNoise(node.label, node.first_output, shares[node.first_output], macs // sample.samples)
