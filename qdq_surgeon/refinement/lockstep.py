"""The float and the Q/DQ model run side by side, part by part, over the same samples.

Between two parts a visitor sees what both made of every sample, and may change what the Q/DQ model goes on with. So
whatever is decided at one tensor is decided on what the model really computes there, with all earlier decisions in
force, and each model still runs only once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
from numpy.typing import NDArray
from onnx import ModelProto

from ..bfloat16 import widened
from ..calibration.feeds import Batch
from ..calibration.parts import Parts, leading_to, reads, size_of
from ..calibration.sessions import Session
from ..errors import QdqError
from ..existing import is_linear
from ..graph import Graph, Node
from ..model import Model

Array: TypeAlias = NDArray[Any]
Values: TypeAlias = dict[str, Any]
"""What one sample has computed so far: tensors by name."""

FEWEST_JUDGES = 16
FEWEST, ENOUGH, MOST_SAMPLES = 4, 30, 64
ONE_IN = 3
"""One sample in so many walks, but ENOUGH to MOST_SAMPLES of them: so it costs no more than the calibration did."""
BUDGET = 256 << 20
"""Bytes that the samples of both models may hold, where the user gives no limit."""
LEAST_BUDGET = 32 << 20
ROUNDING = 1e-3
"""Kernels for one sample and for several may round differently, by this share of the largest value."""


@dataclass(frozen=True)
class Both:
    """One tensor in both models, for every sample: arrays of equal shapes, in the order of the samples."""

    name: str
    float: list[Array]
    int8: list[Array]
    """What the Q/DQ model goes on with: a visitor may change the arrays in place."""


Visit: TypeAlias = Callable[[Both], "Mapping[str, Array] | None"]
"""What happens at a stop. It may give initializers by name with which the Q/DQ model goes on."""


def walk(
    model: Model,
    quantized: ModelProto,
    samples: Sequence[Batch],
    results: Sequence[str],
    stops: Iterable[str] = (),
    visit: Visit = lambda _: None,
    weights: Mapping[str, Array] | None = None,
) -> list[Both]:
    """Run both models over the samples, and stop at every tensor of `stops` (of the top graph) in the graph's order.

    `quantized` is the model with pairs, all other nodes as in `model`; `weights` are initializers that it has instead
    of its own. Returns the tensors `results`.
    Raises ModelError or DataError where onnxruntime does not run a part.
    """
    floats, pairs, stops = _view(model.proto, model.graph), _view(quantized), set(stops)
    nodes = leading_to(floats, results)
    parts = list(_parts(nodes, stops))
    with tempfile.TemporaryDirectory(prefix="qdq_surgeon.", ignore_cleanup_errors=True) as folder:
        sides = [
            _Side(floats, model, Path(folder) / "float", nodes, samples),
            _Side(pairs, model, Path(folder) / "int8", leading_to(pairs, results), samples, simulate=True),
        ]
        sides[1].replace(weights or {})
        for index, part in enumerate(parts):
            later = [node for following in parts[index + 1 :] for node in following]
            needed = reads(floats, later) | set(results)
            for side in sides:
                side.run(part, needed)
            for name in stops.intersection(part[-1].outputs):
                sides[1].replace(visit(sides[0].both(name, sides[1])) or {})
        return [sides[0].both(name, sides[1]) for name in results]


def results_of(
    model: Model, quantized: ModelProto, samples: Sequence[Batch], results: Sequence[str]
) -> list[list[Array]]:
    """What the Q/DQ model alone gives: for each of the tensors `results`, the arrays of all samples."""
    graph = _view(quantized)
    nodes = leading_to(model.graph, results)
    with tempfile.TemporaryDirectory(prefix="qdq_surgeon.", ignore_cleanup_errors=True) as folder:
        side = _Side(graph, model, Path(folder) / "int8", leading_to(graph, results), samples, simulate=True)
        side.run(nodes, set(results))
        return [side.arrays(name) for name in results]


def _view(proto: ModelProto, known: Graph | None = None) -> Graph:
    """A model in types that onnxruntime computes in; `known` is its graph as it is."""
    wide = widened(proto)
    return known if known and wide is proto else Graph(wide, deep=True)


def _parts(nodes: Sequence[Node], stops: set[str]) -> Iterator[list[Node]]:
    """The nodes, cut behind each that makes a tensor to stop at."""
    part: list[Node] = []
    for node in nodes:
        part.append(node)
        if stops.intersection(node.outputs):
            yield part
            part = []
    if part:
        yield part


class _Side:
    """One of the two models, and what its samples have computed so far."""

    def __init__(
        self,
        graph: Graph,
        model: Model,
        folder: Path,
        nodes: Sequence[Node],
        samples: Sequence[Batch],
        simulate: bool = False,
    ) -> None:
        folder.mkdir()
        self._graph = graph
        self._custom_ops = model.custom_ops
        self._simulate = simulate
        self._parts = Parts(graph, folder, nodes)
        self._nodes = {node.first_output: node for node in nodes}
        self._samples = samples
        self._values: list[Values] = [dict(sample.feed) for sample in samples]

    def both(self, name: str, other: _Side) -> Both:
        return Both(name, self.arrays(name), other.arrays(name))

    def arrays(self, name: str) -> list[Array]:
        return [values[name] for values in self._values]

    def replace(self, weights: Mapping[str, Array]) -> None:
        """Go on with other initializers."""
        for name, values in weights.items():
            self._parts.replace(name, values)

    def run(self, part: Sequence[Node], needed: set[str]) -> None:
        """Run one part, and keep what later ones need."""
        nodes = list(self._with_pairs(part))
        made = sorted({output for node in part for output in node.outputs if output in needed})
        if made:
            inputs = self._parts.inputs(nodes)
            session = Session(
                self._parts.write(nodes, made),
                simulate=self._simulate,
                threads=1,
                mapped=self._parts.mapped,
                custom_ops=self._custom_ops,
            )
            self._parts.learn(session)

            def one(index: int) -> None:
                feed = {name: self._values[index][name] for name in inputs}
                sample = replace(self._samples[index], feed=feed, along=frozenset())
                self._values[index].update(zip(made, session.run(sample, made)[0], strict=True))

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(one, range(len(self._samples))))
        for index, values in enumerate(self._values):
            self._values[index] = {name: array for name, array in values.items() if name in needed}

    def _with_pairs(self, part: Sequence[Node]) -> Iterator[Node]:
        """The nodes of a part on this side, each behind the pairs that it reads."""
        for node in part:
            own = self._nodes[node.first_output]
            for name in (*own.inputs, *own.captured):
                yield from self._pair(name)
            yield own

    def _pair(self, tensor: str) -> list[Node]:
        """The Q and the DQ that make a tensor, where they read one that is computed."""
        found: list[Node] = []
        maker = self._graph.producer(tensor)
        while maker is not None and is_linear(maker.proto) and not self._graph.is_constant(maker.first_output):
            found.insert(0, maker)
            maker = self._graph.producer(maker.inputs[0])
        return found


def fitting_samples(model: Model, batches: Iterable[Batch], memory: int | None = None) -> list[Batch]:
    """Some of the batches, evenly spread, to walk with: one sample each where the model allows it.

    As many as two walks hold in `memory` bytes for the whole process (None: BUDGET for the walks alone).
    """
    every = apart(model, batches)
    if not every:
        return []
    most = min(MOST_SAMPLES, max(ENOUGH, len(every) // ONE_IN))
    budget = BUDGET if memory is None else max(LEAST_BUDGET, (memory - psutil.Process().memory_info().rss) // 2)
    held = 2 * _held(model.graph, every[0])
    return evenly(every, max(FEWEST, min(most, budget // max(held, 1))))


def evenly(samples: Sequence[Batch], number: int) -> list[Batch]:
    """At most so many of them, evenly spread."""
    step = max(1.0, len(samples) / number)
    return [samples[int(index * step)] for index in range(min(number, len(samples)))]


def others(every: Sequence[Batch], some: Sequence[Batch]) -> list[Batch]:
    """Those of `every` that are not among `some`; all of them where too few are left to judge by."""
    taken = set(map(id, some))
    rest = [sample for sample in every if id(sample) not in taken]
    return rest if len(rest) >= FEWEST_JUDGES else list(every)


def _held(graph: Graph, sample: Batch) -> int:
    """The most bytes that one sample's tensors take at a time between two nodes; unknown shapes count nothing."""
    shapes = graph.shapes_for(sample.shapes)
    nodes = [node for node in graph.nodes if not node.scope]
    last = {name: index for index, node in enumerate(nodes) for name in reads(graph, [node])}
    live = most = 0
    leaving: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for name in node.outputs:
            size = 4 * (size_of(shapes.get(name)) or 0)
            live += size
            leaving[last.get(name, index)] = leaving.get(last.get(name, index), 0) + size
        most = max(most, live)
        live -= leaving.pop(index, 0)
    return most


def apart(model: Model, batches: Iterable[Batch]) -> list[Batch]:
    """The samples one by one where the model gives the same for them as for whole batches, else the batches."""
    batches = list(batches)
    first = next((batch for batch in batches if batch.divisible), None)
    if first is None:
        return batches
    some = first.part(0, 2)
    try:
        session = Session(model.original, custom_ops=model.custom_ops)
        together = session.run(some, session.outputs)
        alone = [session.run(some.part(index, index + 1), session.outputs)[0] for index in range(some.samples)]
    except QdqError:
        return batches
    if len(together) == 1 and not all(map(_is_joined, together[0], *alone)):
        return batches
    return [batch.part(index, index + 1) for batch in batches for index in range(batch.samples)]


def _is_joined(whole: Any, *parts: Any) -> bool:
    """True where the parts, one behind the other, are the whole but for rounding."""
    if not isinstance(whole, np.ndarray) or not whole.ndim:
        return False
    if any(part.shape[1:] != whole.shape[1:] for part in parts) or sum(map(len, parts)) != len(whole):
        return False
    if whole.dtype.kind not in "biuf":
        return True
    joined = np.concatenate(parts)
    reach = float(np.max(np.abs(whole, dtype=np.float64), initial=0, where=np.isfinite(whole)))
    return bool(np.allclose(joined, whole, rtol=0, atol=ROUNDING * reach, equal_nan=True))
