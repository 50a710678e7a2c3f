"""The one pass of onnxruntime: sessions, and the statistics of tapped tensors."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..errors import DataError, ModelError
from ..model import Model, all_nodes
from .feeds import Batch, Trial
from .statistics import Accumulator, Statistic

log = logging.getLogger("qdq_surgeon")

Progress: TypeAlias = Callable[[str, int, "int | None"], None]
"""Called with a stage's name, the samples done and their total (None: unknown). It may raise to stop the run."""

RANGE_SAMPLES = 16
"""How many samples tell which activations exceed FP16's range."""
_QUIET = 4  # onnxruntime's FATAL: what goes wrong arrives as an exception


class Session:
    """An onnxruntime session on the CPU.

    `simulate` is for Q/DQ models: basic optimizations only, and without the one that would store float weights and
    biases behind a DQ as integers, so that each pair rounds exactly where it stands.
    """

    def __init__(self, proto: ModelProto, simulate: bool = False) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        disabled = []
        if simulate:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            disabled = ["WeightBiasQuantization"]
        try:
            self._session = ort.InferenceSession(
                _serialized(proto), options, ["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except Exception as error:
            raise ModelError(f"onnxruntime refuses the model: {_reason(error)}") from error
        self.outputs: tuple[str, ...] = tuple(output.name for output in self._session.get_outputs())
        self._half_inputs = {i.name for i in self._session.get_inputs() if i.type == "tensor(float16)"}
        self._whole = True

    def run(self, batch: Batch, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        """The named outputs for one batch; once per sample where the model does not run on the whole batch."""
        if self._whole or not batch.divisible:
            try:
                return [self._session.run(list(names), self._typed(batch.feed))]
            except Exception as error:
                if not batch.divisible:
                    raise DataError(f"onnxruntime cannot run the model on the data: {_reason(error)}") from error
            log.info("the model does not run on %d samples at once: one at a time from here on", batch.samples)
            self._whole = False
        single = [batch.part(index, index + 1) for index in range(batch.samples)]
        return [outputs for part in single for outputs in self.run(part, names)]

    def _typed(self, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """FP32 data for a model whose inputs were made FP16."""
        return {name: array.astype("float16") if name in self._half_inputs else array for name, array in feed.items()}

    def runs(self, feed: dict[str, NDArray[Any]]) -> str | None:
        """None where the model runs on a feed, else onnxruntime's reason."""
        try:
            self._session.run(None, feed)
        except Exception as error:
            return _reason(error)
        return None


def trial(proto: ModelProto) -> Trial:
    """`Session.runs` of one session, which is opened when the first feed is tried."""
    session = functools.cache(lambda: Session(proto))
    return lambda feed: session().runs(feed)


def tap(model: Model, tensors: Iterable[str]) -> ModelProto:
    """A copy of the model in which the tensors are outputs too."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    have = {value.name for value in proto.graph.output}
    for name in tensors:
        if name not in have:
            element = model.graph.element_type(name) or TensorProto.FLOAT
            proto.graph.output.append(helper.make_tensor_value_info(name, element, None))
    return proto


def collect(
    model: Model, tensors: Sequence[str], batches: Iterable[Batch], total: int | None, progress: Progress | None = None
) -> dict[str, Statistic]:
    """Run the float model once over the batches and keep one statistic per tensor, never an activation."""
    fed = set(model.graph.inputs)
    names = [name for name in tensors if name not in fed]
    counted = {name: Accumulator() for name in tensors}
    session = Session(tap(model, names)) if names else None
    done = 0
    for batch in batches:
        for name in counted.keys() & fed:
            counted[name].add(batch.feed[name])
        for outputs in session.run(batch, names) if session else ():
            for name, array in zip(names, outputs, strict=True):
                counted[name].add(array)
        done += batch.samples
        if progress:
            progress("calibrate", done, None if total is None else max(done, total))
    statistics = {name: accumulator.result() for name, accumulator in counted.items()}
    for name, statistic in statistics.items():
        if statistic.non_finite:
            text = "'%s' held %d NaN or infinite values during calibration: its scale ignores them"
            log.warning(text, name, statistic.non_finite)
    return statistics


def largest(model: Model, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest finite |x| of every float activation over a few samples, one at a time to keep memory low."""
    graph = model.graph
    made = {output for node in graph.nodes for output in node.outputs if graph.is_float(output)}
    names = sorted(name for name in made if not graph.is_constant(name))
    session = Session(tap(model, names))
    found = dict.fromkeys(names, 0.0)
    counts = ((batch, batch.samples if batch.divisible else 1) for batch in batches)
    samples = (batch.part(index, index + 1) for batch, number in counts for index in range(number))
    for sample in itertools.islice(samples, RANGE_SAMPLES):
        for outputs in session.run(sample, names):
            for name, array in zip(names, outputs, strict=True):
                found[name] = max(found[name], float(np.max(np.abs(array), initial=0, where=np.isfinite(array))))
    return found


def _serialized(proto: ModelProto) -> bytes:
    """The model for onnxruntime, which refuses doubled node names: ONNX allows them, so then all go."""
    names = [node.name for node in _every_node(proto) if node.name]
    return bytes((proto if len(set(names)) == len(names) else _nameless(proto)).SerializeToString())


def _nameless(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    for node in _every_node(copy):
        node.ClearField("name")
    return copy


def _every_node(proto: ModelProto) -> Iterator[NodeProto]:
    """The nodes of the graph and of the model's own functions."""
    for graph in (proto.graph, *proto.functions):
        yield from all_nodes(graph)


def _reason(error: BaseException) -> str:
    """onnxruntime's message without its prefix, on one line."""
    text = " ".join(str(error).split())
    return text.split(" : ", 3)[-1][:300] if text.startswith("[ONNXRuntimeError]") else text[:300]
