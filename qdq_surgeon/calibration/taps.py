"""A float model, opened so that the tensors inside it can be read.

What the taps cost is mostly memory traffic, so: one sample at a time where the model allows it (its activations stay
in the cache), equal tensors are read once, and convolutions are read in the blocked layout that their kernels write.
Where one sample's tensors exceed the budget, the graph runs in stages, each holding only its own.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..errors import DataError
from ..graph import Graph, Node, all_nodes, bodies
from ..model import Model
from .feeds import Batch
from .flow import Flow, Values, Visit
from .parts import Parts, leading_to, reads, size_of
from .sessions import DEFAULT_PROVIDER, Session

RUN_BYTES = 256 << 20
"""How much the tensors read by all runs in flight may take, where the user gives no limit."""
LEAST_BYTES = 32 << 20
"""With less than this for its tensors a run would be cut into too many stages."""
RUN_ELEMENTS = 1 << 18
"""Samples are fed together as long as they give no more elements than this to read."""
SAME_VALUES = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
"""Ops whose output holds the elements of their first input, each once."""
BLOCK = 16
"""Blocked layouts pad channels to a multiple of 8 or 16, after the CPU; whole multiples of 16 are never padded."""
_BLOCKED_OPS = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalAveragePool"})
_SESSION_COPIES = 2  # onnxruntime holds weights as stored, and packed for its kernels
_WORKING = 3  # what a run is fed and computes with takes about twice as much again as what it gives
_RESERVE = 64 << 20
_ROUNDING = 1e-3  # kernels for one sample and for several may round differently

Array = NDArray[Any]

log = logging.getLogger("qdq_surgeon")


@dataclass(frozen=True)
class _Stage:
    """One part of the graph, in a session of its own. `tapped`: tensor -> the session's output that holds it."""

    session: Session
    inputs: tuple[str, ...]
    tapped: Mapping[str, str]
    passed: tuple[str, ...]
    """What later stages read, or the caller wants."""

    def run(self, values: Values, batch: Batch, visit: Visit) -> dict[str, Any]:
        """Run the part on what it reads, and give what it passes on."""
        names = list(dict.fromkeys((*self.tapped.values(), *self.passed)))
        feed = {name: values[name] for name in self.inputs}
        for outputs in self.session.run(replace(batch, feed=feed, along=batch.along & set(feed)), names):
            found = dict(zip(names, outputs, strict=True))
            for tensor, name in self.tapped.items():
                visit(tensor, found[name])
        return {name: found[name] for name in self.passed}


@dataclass(frozen=True)
class _FlowStage:
    """A control-flow node with tensors to read inside."""

    flow: Flow
    tapped: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.flow.inputs

    def run(self, values: Values, batch: Batch, visit: Visit) -> dict[str, Any]:
        found = self.flow.run(values, visit)
        for name in self.tapped:
            visit(name, found[name])
        return found


class Reader:
    """Runs the float model and shows the tensors of every run. Several threads may run it at once.

    `rows` samples are best fed together, and `workers` threads may run at a time: what the first batch tells, in
    `memory` bytes for the whole process (None: RUN_BYTES for the tensors alone). `results` are tensors that `run`
    gives back.
    """

    def __init__(
        self,
        model: Model,
        tensors: Sequence[str],
        first: Batch,
        provider: str = DEFAULT_PROVIDER,
        memory: int | None = None,
        results: Sequence[str] = (),
    ) -> None:
        self._graph = model.graph
        self._custom_ops = model.custom_ops
        self._fed = frozenset(model.graph.inputs) & set(tensors)
        self._names = [name for name in tensors if name not in self._fed]
        self._results = frozenset(results)
        self._flows = _flows(model.graph, self._names)
        self._nodes = leading_to(model.graph, (*self._names, *self._flows, *results))
        self._provider = provider
        self._memory = memory
        self._lock = threading.Lock()
        self._stages: list[_Stage | _FlowStage] = []
        self.rows, self.workers = first.samples, 1
        with tempfile.TemporaryDirectory(prefix="qdq_surgeon.", ignore_cleanup_errors=True) as folder:
            self._store = Parts(model.graph, Path(folder), self._nodes)
            if self._nodes:
                self._open(first)
            if self.rows < first.samples and not self._is_the_same_in_parts(first.part(0, 2 * self.rows)):
                log.info("the model's tensors depend on which samples are fed together: batches are fed whole")
                self._stages.clear()
                self._open(replace(first, along=frozenset()))
                self.rows = sys.maxsize

    def run(self, batch: Batch, visit: Visit) -> Values:
        """Run one batch. `visit` takes the tensors as they come: name and values, in no particular layout."""
        for name in self._fed:
            visit(name, batch.feed[name])
        values: dict[str, Any] = dict(batch.feed)
        for index, stage in enumerate(self._stages):
            values |= stage.run(values, batch, visit)
            self._check_memory()
            wanted = {name for later in self._stages[index + 1 :] for name in later.inputs} | self._results
            values = {name: array for name, array in values.items() if name in wanted}
            if self._stages[1:]:
                _give_back()
        return values

    def _check_memory(self) -> None:
        """Say once that the process takes more than it should."""
        if self._memory is None:
            return
        taken = psutil.Process().memory_info().rss
        with self._lock:
            allowed = self._memory
            if allowed is None or taken <= allowed:
                return
            self._memory = None
        log.warning(
            "the process takes %d MB, more than the %d MB allowed: with less the model cannot be run in stages",
            taken >> 20,
            allowed >> 20,
        )

    def _is_the_same_in_parts(self, whole: Batch) -> bool:
        """True where two parts of a batch, fed one by one, give what they give together.

        They do not where axis 0 is no batch: tokens, points or steps that a layer puts in relation to each other.
        """
        try:
            together = self._summary([whole])
            apart = self._summary([whole.part(0, self.rows), whole.part(self.rows, whole.samples)])
        except DataError:
            return False
        return all(_agree(together[name], apart[name]) for name in together)

    def _summary(self, batches: Iterable[Batch]) -> dict[str, tuple[int, float, float]]:
        """Size, minimum and maximum of every tensor over some batches."""
        found: dict[str, tuple[int, float, float]] = {}

        def note(name: str, array: Array) -> None:
            size, low, high = found.get(name, (0, math.inf, -math.inf))
            values = np.asarray(array, np.float32)
            low, high = min(low, float(np.min(values, initial=low))), max(high, float(np.max(values, initial=high)))
            found[name] = size + values.size, low, high

        for batch in batches:
            self.run(batch, note)
        return found

    def _open(self, first: Batch) -> None:
        """Size the tensors by one sample, then open as many stages as the budget asks for."""
        sample = first.part(0, 1)
        try:
            sizes = self._sizes(sample)
        except DataError:  # the model wants a whole batch
            sample = replace(first, along=frozenset())
            sizes = self._sizes(sample)
        total = sum(sizes.values())
        if self._memory is None:
            budget = RUN_BYTES
        else:
            used = psutil.Process().memory_info().rss + _SESSION_COPIES * self._store.weight_bytes + _RESERVE
            budget = max(self._memory - used, LEAST_BYTES)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = cores if self._provider == "cpu" else 1
        self.workers = max(1, min(wanted, budget // max(_WORKING * total, 1)))
        self.rows = max(1, RUN_ELEMENTS * 4 // max(total, 1)) if sample.samples == 1 else sys.maxsize
        parts = _cut(self._graph, self._nodes, sizes, budget // _WORKING, self._flows)
        if len(parts) > 1 and sample.samples == 1:
            self.rows = 1
        threads = max(1, cores // self.workers)
        for index, part in enumerate(parts):
            inside = self._flows.get(part[0].first_output)
            if inside:
                tapped = tuple(name for name in part[0].outputs if name in self._names)
                flow = Flow(part[0], self._graph, inside, self._opened, self._store.type)
                self._stages.append(_FlowStage(flow, tapped))
            else:
                self._stages.append(self._stage(part, parts[index + 1 :], threads, lean=len(parts) > 1))

    def _opened(self, model: Model, tensors: Sequence[str], results: Sequence[str], first: Batch) -> Reader:
        model = replace(model, custom_ops=self._custom_ops)
        return Reader(model, tensors, first, self._provider, self._memory, results)

    def _stage(self, nodes: list[Node], later: list[list[Node]], threads: int, lean: bool) -> _Stage:
        made = {output for node in nodes for output in node.outputs}
        tapped = [name for name in self._names if name in made]
        ahead = {name for part in later for name in reads(self._graph, part)} | self._results
        passed = sorted((made & ahead) - {name for name in made if self._graph.is_constant(name)})
        path = self._store.write(nodes, list(dict.fromkeys((*tapped, *passed))))
        outputs = {name: name for name in tapped}
        # onnxruntime's optimizer gives one name twice where bodies hold convolutions too
        plain = not any(bodies(node.proto) for node in nodes)
        blocked = plain and self._provider == "cpu" and any(node.op in _BLOCKED_OPS for node in nodes)
        if blocked:
            path, outputs = _in_kernel_layout(path, outputs, passed, self._custom_ops)
        session = Session(
            path,
            as_is=blocked,
            provider=self._provider,
            threads=threads,
            lean=lean,
            mapped=self._store.mapped,
            custom_ops=self._custom_ops,
        )
        self._store.learn(session)
        return _Stage(session, self._store.inputs(nodes), outputs, tuple(passed))

    def _sizes(self, first: Batch) -> dict[str, int]:
        """The bytes of every tensor for one sample, or one batch that cannot be cut: by shape inference, else a run."""
        shapes = self._graph.shapes_for(first.shapes)
        names = [name for name in self._names if not self._graph.home(name)[0]]
        found = {name: size for name in names if (size := size_of(shapes.get(name))) is not None}
        unknown = [name for name in names if name not in found]
        if unknown:
            path = self._store.write(self._nodes, unknown, sizes=True)
            session = Session(path, provider=self._provider, custom_ops=self._custom_ops)
            feed = {name: first.feed[name] for name in self._store.inputs(self._nodes)}
            runs = session.run(replace(first, feed=feed, along=first.along & set(feed)), list(session.outputs))
            found |= {name: sum(map(int, sizes)) for name, sizes in zip(unknown, zip(*runs, strict=True), strict=True)}
        samples = first.samples if first.divisible else 1
        return {name: 4 * size // samples for name, size in found.items()}


def _agree(one: tuple[int, float, float], other: tuple[int, float, float]) -> bool:
    """True where two summaries are the same but for rounding."""
    reach = max(map(abs, one[1:]))
    close = all(abs(a - b) <= _ROUNDING * reach or a == b for a, b in zip(one[1:], other[1:], strict=True))
    return one[0] == other[0] and (close or not math.isfinite(reach))


def _give_back() -> None:
    """Hand freed memory back to the system at once: glibc keeps blocks of up to 32 MB for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def same_values(graph: Graph, tensors: Iterable[str]) -> dict[str, str]:
    """For every tensor the one to read in its place: tensors that hold the same elements are read once."""
    roots = {tensor: _root(graph, tensor) for tensor in tensors}
    chosen: dict[str, str] = {root: root for root in roots.values() if root in roots or root in graph.inputs}
    for tensor, root in roots.items():
        chosen.setdefault(root, tensor)
    return {tensor: chosen[root] for tensor, root in roots.items()}


def _root(graph: Graph, tensor: str) -> str:
    node = graph.producer(tensor)
    while node is not None and node.op in SAME_VALUES and graph.home(node.inputs[0])[0] == node.scope:
        tensor = node.inputs[0]
        node = graph.producer(tensor)
    return tensor


def _flows(graph: Graph, tensors: Iterable[str]) -> dict[str, list[str]]:
    """The control-flow nodes of the top graph with tensors inside, by their first output."""
    holders = {
        f"{node.first_output}.{name}": node.first_output
        for node in graph.nodes
        if node.results and not node.scope
        for name, _ in bodies(node.proto)
    }
    inside: dict[str, list[str]] = {}
    for tensor in tensors:
        scope, _ = graph.home(tensor)
        if scope:
            inside.setdefault(holders[scope[0]], []).append(tensor)
    return inside


def _cut(
    graph: Graph, nodes: Sequence[Node], sizes: Mapping[str, int], budget: int, alone: Collection[str]
) -> list[list[Node]]:
    """Parts of the graph, in order, of which none gives more to read than the budget, if it can be helped.

    Nodes whose first output is in `alone` get a part of their own.
    """
    last = {name: index for index, node in enumerate(nodes) for name in reads(graph, [node])}
    live: set[str] = set()
    parts: list[list[Node]] = [[]]
    held = 0
    for index, node in enumerate(nodes):
        size = sum(sizes.get(name, 0) for name in node.outputs)
        full = held and held + size > budget and all(graph.type(name) for name in live)
        if parts[-1] and (full or node.first_output in alone or parts[-1][-1].first_output in alone):
            parts.append([])
            held = 0
        parts[-1].append(node)
        held += size
        live.update(name for name in node.outputs if last.get(name, -1) > index)
        live = {name for name in live if last[name] > index}
    return parts


def _in_kernel_layout(
    path: Path, tapped: dict[str, str], passed: Sequence[str], custom_ops: Iterable[Path]
) -> tuple[Path, dict[str, str]]:
    """The graph as onnxruntime optimizes it, with the taps put before the reordering from the blocked layout.

    onnxruntime's convolutions write blocks of 8 or 16 channels, and a ReorderOutput node makes the ordinary layout of
    what leaves the graph. Statistics do not ask for an order, so what is only read for them is not reordered.
    """
    optimized = path.with_suffix(".optimized.onnx")
    Session(path, threads=1, save_to=optimized, custom_ops=custom_ops)
    proto = onnx.load(optimized, load_external_data=False)
    graph = proto.graph
    readers = {name for node in all_nodes(graph) for name in node.input} | set(passed)
    blocked = {node.output[0]: node for node in graph.node if node.op_type == "ReorderOutput"}
    free = {name for name in tapped if name in blocked and _channels(blocked[name]) % BLOCK == 0}
    outputs = {name: blocked[name].input[0] if name in free else name for name in tapped}
    nodes = [node for node in graph.node if node.output[0] not in free - readers]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [value for value in graph.output if value.name not in free or value.name in passed]
    del graph.output[:]
    graph.output.extend(kept)
    for name in dict.fromkeys(outputs[name] for name in free):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    optimized.write_bytes(proto.SerializeToString())
    return optimized, outputs


def _channels(reorder: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in reorder.attribute if attribute.name == "channels"), 1)
