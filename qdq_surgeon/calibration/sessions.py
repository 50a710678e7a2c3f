"""onnxruntime sessions: the only room that opens one."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from ..errors import DataError, ModelError, QdqError, nearest
from ..model import all_nodes
from .feeds import Batch, Trial

log = logging.getLogger("qdq_surgeon")

Progress: TypeAlias = Callable[[str, int, "int | None"], None]
"""Called with a stage's name, the samples done and their total (None: unknown). It may raise to stop the run."""

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
DEFAULT_PROVIDER = "cpu"
_QUIET = 4  # onnxruntime's FATAL: what goes wrong arrives as an exception


class Session:
    """An onnxruntime session for a model, or for the file of one.

    `simulate` is for Q/DQ models: basic optimizations only, and without the one that would store float weights and
    biases behind a DQ as integers, so that each pair rounds exactly where it stands. `as_is` takes the graph as it
    stands. `threads` compute one run (0: as many as there are cores). `lean` gives memory back after every run.
    `save_to` keeps the optimized graph, its weights in a file beside it.
    """

    def __init__(
        self,
        model: ModelProto | Path,
        simulate: bool = False,
        *,
        as_is: bool = False,
        provider: str = DEFAULT_PROVIDER,
        threads: int = 0,
        lean: bool = False,
        save_to: Path | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = not lean
        disabled = []
        if simulate:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            disabled = ["WeightBiasQuantization"]
        if as_is:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save_to:
            options.optimized_model_filepath = str(save_to)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{save_to.name}.data"
            )
        source = str(model) if isinstance(model, Path) else runnable(model).SerializeToString()
        providers = _providers(provider)
        try:
            self._session = ort.InferenceSession(source, options, providers, disabled_optimizers=disabled)
        except Exception as error:
            raise ModelError(f"onnxruntime refuses the model: {_reason(error)}") from error
        if PROVIDERS[provider] not in self._session.get_providers():
            raise QdqError(f"onnxruntime cannot start its {provider} provider here: check driver and libraries")
        self.outputs: tuple[str, ...] = tuple(output.name for output in self._session.get_outputs())
        self._half_inputs = {i.name for i in self._session.get_inputs() if i.type == "tensor(float16)"}
        self._whole = True
        self._lock = threading.Lock()

    def run(self, batch: Batch, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        """The named outputs for one batch; once per sample where the model does not run on the whole batch."""
        if self._whole or not batch.divisible:
            try:
                return [self._session.run(list(names), self._typed(batch.feed))]
            except Exception as error:
                if not batch.divisible:
                    raise DataError(f"onnxruntime cannot run the model on the data: {_reason(error)}") from error
            with self._lock:
                news, self._whole = self._whole, False
            if news:
                log.info("the model does not run on %d samples at once: one at a time from here on", batch.samples)
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


def runnable(proto: ModelProto) -> ModelProto:
    """The model for onnxruntime, which refuses doubled node names: ONNX allows them, so then all go."""
    names = [node.name for node in _every_node(proto) if node.name]
    return proto if len(set(names)) == len(names) else _nameless(proto)


def _providers(provider: str) -> list[str]:
    if provider not in PROVIDERS:
        raise QdqError(
            f"unknown provider {provider!r}.{nearest(provider, PROVIDERS)} Providers: {', '.join(PROVIDERS)}"
        )
    available = ort.get_available_providers()
    if PROVIDERS[provider] not in available:
        here = ", ".join(name for name, full in PROVIDERS.items() if full in available)
        raise QdqError(
            f"this onnxruntime has no {provider} provider (it has: {here}): pip install onnxruntime-gpu, or use another"
        )
    return list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))


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
