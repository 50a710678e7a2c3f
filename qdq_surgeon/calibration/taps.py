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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import psutil
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..errors import DataError
from ..model import Graph, Model, Node, all_nodes
from .feeds import Batch
from .sessions import DEFAULT_PROVIDER, Session, runnable

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
_OUTSIDE_BYTES = 1024  # larger weights go into the file beside the graph
_SESSION_COPIES = 2  # onnxruntime holds weights as stored, and packed for its kernels
_WORKING = 3  # what a run is fed and computes with takes about twice as much again as what it gives
_RESERVE = 64 << 20

Array = NDArray[Any]

log = logging.getLogger("qdq_surgeon")


@dataclass(frozen=True)
class _Stage:
    """One part of the graph, in a session of its own. `tapped`: tensor -> the session's output that holds it."""

    session: Session
    inputs: tuple[str, ...]
    tapped: Mapping[str, str]
    passed: tuple[str, ...]
    """What later stages read."""


class Reader:
    """Runs the float model and gives the tensors of every run. Several threads may read at once. Close it after use.

    `rows` samples are best fed together, and `workers` threads may read at a time: what the first batch tells, in
    `memory` bytes for the whole process (None: RUN_BYTES for the tensors alone).
    """

    def __init__(
        self,
        model: Model,
        tensors: Sequence[str],
        first: Batch,
        provider: str = DEFAULT_PROVIDER,
        memory: int | None = None,
    ) -> None:
        self._graph = model.graph
        self._fed = frozenset(model.graph.inputs) & set(tensors)
        self._names = [name for name in tensors if name not in self._fed]
        self._nodes = _leading_to(model.graph, self._names)
        self._provider = provider
        self._memory = memory
        self._lock = threading.Lock()
        self._stages: list[_Stage] = []
        self.rows, self.workers = first.samples, 1
        with tempfile.TemporaryDirectory(prefix="qdq_surgeon.", ignore_cleanup_errors=True) as folder:
            self._store = _Store(model.graph, Path(folder), self._nodes)
            if self._names:
                self._open(first)
            if self.rows < first.samples and not self._runs(first.part(0, self.rows)):
                self.rows = sys.maxsize

    def read(self, batch: Batch) -> Iterator[tuple[str, Array]]:
        """Run one batch; the tensors as they come: name and values, in no particular layout."""
        for name in self._fed:
            yield name, batch.feed[name]
        values = dict(batch.feed)
        for index, stage in enumerate(self._stages):
            names = list(dict.fromkeys((*stage.tapped.values(), *stage.passed)))
            along = batch.along if index == 0 else frozenset()
            feed = Batch({name: values[name] for name in stage.inputs}, batch.samples, along & set(stage.inputs))
            for outputs in stage.session.run(feed, names):
                values.update(zip(names, outputs, strict=True))
                for tensor, name in stage.tapped.items():
                    yield tensor, values[name]
            ahead = {name for later in self._stages[index + 1 :] for name in later.inputs}
            values = {name: array for name, array in values.items() if name in ahead}
            if self._stages[1:]:
                outputs = []
                _give_back()
        self._check_memory()

    def _check_memory(self) -> None:
        """Say once that the process takes more than it should."""
        taken = psutil.Process().memory_info().rss
        with self._lock:
            allowed = self._memory
            if allowed is None or taken <= allowed:
                return
            self._memory = None
        log.warning(
            "the run takes %d MB, more than the %d MB allowed: a single layer of one sample needs that much",
            taken >> 20,
            allowed >> 20,
        )

    def _runs(self, part: Batch) -> bool:
        """True where the model runs on a part of a batch: some want a whole one, whatever their inputs declare."""
        try:
            return all(True for _ in self.read(part))
        except DataError:
            return False

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
        parts = _cut(self._graph, self._nodes, sizes, budget // _WORKING)
        threads = max(1, cores // self.workers)
        for index, part in enumerate(parts):
            self._stages.append(self._stage(part, parts[index + 1 :], threads, lean=len(parts) > 1))

    def _stage(self, nodes: list[Node], later: list[list[Node]], threads: int, lean: bool) -> _Stage:
        made = {output for node in nodes for output in node.outputs}
        tapped = [name for name in self._names if name in made]
        ahead = {name for part in later for name in _reads(self._graph, part)}
        passed = sorted((made & ahead) - {name for name in made if self._graph.is_constant(name)})
        path = self._store.write(nodes, list(dict.fromkeys((*tapped, *passed))))
        outputs = {name: name for name in tapped}
        blocked = self._provider == "cpu" and any(node.op in _BLOCKED_OPS for node in nodes)
        if blocked:
            path, outputs = _in_kernel_layout(path, outputs, passed)
        session = Session(path, as_is=blocked, provider=self._provider, threads=threads, lean=lean)
        return _Stage(session, self._store.inputs(nodes), outputs, tuple(passed))

    def _sizes(self, sample: Batch) -> dict[str, int]:
        """The bytes of every tensor for one sample: by shape inference, else by running it once."""
        shapes = self._graph.shapes_for({name: array.shape for name, array in sample.feed.items()})
        found = {name: size for name in self._names if (size := _size(shapes.get(name))) is not None}
        unknown = [name for name in self._names if name not in found]
        if unknown:
            path = self._store.write(self._nodes, unknown, sizes=True)
            session = Session(path, provider=self._provider)
            feed = {name: sample.feed[name] for name in self._store.inputs(self._nodes)}
            outputs = session.run(Batch(feed, sample.samples), list(session.outputs))[0]
            found |= {name: int(size) for name, size in zip(unknown, outputs, strict=True)}
        return {name: 4 * size for name, size in found.items()}


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
    while node is not None and node.op in SAME_VALUES and node.inputs[0]:
        tensor = node.inputs[0]
        node = graph.producer(tensor)
    return tensor


def _leading_to(graph: Graph, tensors: Iterable[str]) -> list[Node]:
    wanted, nodes = set(tensors), []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            nodes.append(node)
            wanted.update(filter(None, (*node.inputs, *node.captured)))
    return nodes[::-1]


def _reads(graph: Graph, nodes: Iterable[Node]) -> set[str]:
    """What the nodes read that is fed or computed from it."""
    names = {name for node in nodes for name in (*node.inputs, *node.captured)}
    return {name for name in names if (graph.producer(name) or name in graph.inputs) and not graph.is_constant(name)}


def _cut(graph: Graph, nodes: Sequence[Node], sizes: Mapping[str, int], budget: int) -> list[list[Node]]:
    """Parts of the graph, in order, of which none gives more to read than the budget, if it can be helped."""
    last = {name: index for index, node in enumerate(nodes) for name in _reads(graph, [node])}
    live: set[str] = set()
    parts: list[list[Node]] = [[]]
    held = 0
    for index, node in enumerate(nodes):
        size = sum(sizes.get(name, 0) for name in node.outputs)
        if held and held + size > budget and all(graph.element_type(name) for name in live):
            parts.append([])
            held = 0
        parts[-1].append(node)
        held += size
        live.update(name for name in node.outputs if last.get(name, -1) > index)
        live = {name for name in live if last[name] > index}
    return parts


def _size(shape: tuple[int | None, ...] | None) -> int | None:
    """The number of elements; None where a dimension is unknown."""
    known = [dim for dim in shape or () if dim is not None]
    return math.prod(known) if shape is not None and len(known) == len(shape) else None


class _Store:
    """A folder with the weights in one file and graphs beside it that refer to it, so that no copy is held twice."""

    def __init__(self, graph: Graph, folder: Path, nodes: Sequence[Node]) -> None:
        self._graph = graph
        self._folder = folder
        self._written = 0
        self.weight_bytes = 0
        read = {name for node in nodes for name in (*node.inputs, *node.captured)}
        self._initializers: dict[str, TensorProto] = {}
        with (folder / "weights").open("wb") as file:
            for tensor in graph.proto.graph.initializer:
                if tensor.name in read:
                    self._initializers[tensor.name] = self._outside(tensor, file)

    def _outside(self, tensor: TensorProto, file: Any) -> TensorProto:
        self.weight_bytes += tensor.ByteSize()
        if tensor.ByteSize() < _OUTSIDE_BYTES or tensor.data_type == TensorProto.STRING:
            return tensor
        data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        outside = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        outside.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", file.tell()), ("length", len(data))):
            outside.external_data.add(key=key, value=str(value))
        file.write(data)
        return outside

    def inputs(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """What must be fed to run these nodes alone."""
        made = {output for node in nodes for output in node.outputs}
        return tuple(sorted(_reads(self._graph, nodes) - made))

    def write(self, nodes: Sequence[Node], outputs: Sequence[str], sizes: bool = False) -> Path:
        """The file of a graph of these nodes, and of the constants they read, with these outputs (or their sizes)."""
        whole = self._graph.proto
        proto = ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
        graph = proto.graph
        graph.name = whole.graph.name or "graph"
        graph.sparse_initializer.extend(whole.graph.sparse_initializer)
        constants = [name for node in nodes for name in (*node.inputs, *node.captured) if self._graph.is_constant(name)]
        both = _leading_to(self._graph, constants) + list(nodes)
        every = list({node.first_output: node for node in both}.values())
        graph.node.extend(node.proto for node in every)
        used = {name for node in every for name in (*node.inputs, *node.captured)}
        graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in used)
        declared = {value.name: value for value in whole.graph.input}
        for name in self.inputs(nodes):
            value = declared.get(name) or helper.make_tensor_value_info(name, self._type(name), None)
            graph.input.append(value)
        for index, name in enumerate(outputs):
            if sizes:
                graph.node.append(helper.make_node("Size", [name], [f"qdq_surgeon/size_{index}"]))
            element = TensorProto.INT64 if sizes else self._type(name)
            output = f"qdq_surgeon/size_{index}" if sizes else name
            graph.output.append(helper.make_tensor_value_info(output, element, None))
        self._written += 1
        path = self._folder / f"{self._written}.onnx"
        path.write_bytes(runnable(proto).SerializeToString())
        return path

    def _type(self, name: str) -> int:
        return self._graph.element_type(name) or TensorProto.FLOAT


def _in_kernel_layout(path: Path, tapped: dict[str, str], passed: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The graph as onnxruntime optimizes it, with the taps put before the reordering from the blocked layout.

    onnxruntime's convolutions write blocks of 8 or 16 channels, and a ReorderOutput node makes the ordinary layout of
    what leaves the graph. Statistics do not ask for an order, so what is only read for them is not reordered.
    """
    optimized = path.with_suffix(".optimized.onnx")
    Session(path, threads=1, save_to=optimized)
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
