"""onnxruntime sessions: the only room that opens one."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, TypeProto, helper

from ..bfloat16 import widened
from ..errors import DataError, ModelError, QdqError, nearest
from ..graph import every_node
from ..storage import fits_in_one_file, on_disk
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
_OF_TENSORS = re.compile(r"((seq|optional)\()*tensor\(\w+\)+")
_QUIET = 4  # onnxruntime's FATAL: what goes wrong arrives as an exception


class Session:
    """An onnxruntime session for a model, or for the file of one.

    `simulate` is for Q/DQ models: without the optimizations that would replace pairs by integer kernels, move them,
    or store float weights and biases as integers, so that each pair rounds exactly where it stands. `as_is` takes the
    graph as it stands. `threads` compute one run (0: as many as there are cores). `lean` gives memory back after
    every run. `mapped` computes on weights as they lie in their file, without a copy packed for the kernels; so does
    every model with weights outside. `save_to` keeps the optimized graph, its weights in a file beside it.
    `custom_ops` are libraries of operators.
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
        mapped: bool = False,
        save_to: Path | None = None,
        custom_ops: Iterable[Path] = (),
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = not lean
        if as_is:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save_to:
            options.optimized_model_filepath = str(save_to)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{save_to.name}.data"
            )
        for library in custom_ops:
            _register(options, library)
        providers = _providers(provider)
        in_memory = isinstance(model, ModelProto) and fits_in_one_file(model)
        mapped = mapped or (isinstance(model, ModelProto) and not in_memory)
        disabled = ["WeightBiasQuantization"] if simulate else []
        if simulate and mapped:  # what else keeps the pairs would fold the weights behind them into float copies
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        elif simulate:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        with contextlib.ExitStack() as opened:
            if isinstance(model, Path):
                source: str | bytes = str(model)
            elif in_memory:
                source = runnable(model).SerializeToString()
            else:
                source = str(opened.enter_context(on_disk(runnable(model))))
            try:
                self._session = ort.InferenceSession(source, options, providers, disabled_optimizers=disabled)
            except Exception as error:
                raise ModelError(f"onnxruntime refuses the model: {_reason(error)}") from error
        if PROVIDERS[provider] not in self._session.get_providers():
            raise QdqError(f"onnxruntime cannot start its {provider} provider here: check driver and libraries")
        self._types = {output.name: output.type for output in self._session.get_outputs()}
        self.outputs: tuple[str, ...] = tuple(self._types)
        floats = {"tensor(float16)": "float16", "tensor(float)": "float32"}
        self._floats = {i.name: floats[i.type] for i in self._session.get_inputs() if i.type in floats}
        self._whole = True
        self._lock = threading.Lock()

    @property
    def types(self) -> dict[str, TypeProto]:
        """The types of the outputs, as onnxruntime knows them, those of custom ops too; maps are left out."""
        return {name: _type(text) for name, text in self._types.items() if _OF_TENSORS.fullmatch(text)}

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
        """FP32 data for a model whose inputs were made FP16, and BF16 data for one that was widened."""
        return {
            name: array.astype(self._floats[name], copy=False) if name in self._floats else array
            for name, array in feed.items()
        }

    def runs(self, feed: dict[str, NDArray[Any]]) -> str | None:
        """None where the model runs on a feed, else onnxruntime's reason."""
        try:
            self._session.run(None, feed)
        except Exception as error:
            return _reason(error)
        return None


def _type(text: str) -> TypeProto:
    """What onnxruntime writes as 'tensor(float)' or 'seq(tensor(int64))'."""
    kind, _, inner = text.removesuffix(")").partition("(")
    if kind == "tensor":
        return helper.make_tensor_type_proto(TensorProto.DataType.Value(inner.upper()), None)
    make = {"seq": helper.make_sequence_type_proto, "optional": helper.make_optional_type_proto}[kind]
    return make(_type(inner))


def trial(proto: ModelProto, custom_ops: Iterable[Path] = ()) -> Trial:
    """`Session.runs` of one session, which is opened when the first feed is tried."""
    session = functools.cache(lambda: Session(proto, custom_ops=custom_ops))
    return lambda feed: session().runs(feed)


def runnable(proto: ModelProto) -> ModelProto:
    """The model for onnxruntime: without BF16, and without names where two nodes have the same, which ONNX allows."""
    proto = widened(proto)
    names = [node.name for node in every_node(proto) if node.name]
    return proto if len(set(names)) == len(names) else _nameless(proto)


def _register(options: ort.SessionOptions, library: Path) -> None:
    if not library.is_file():
        raise QdqError(f"{library}: no such library of custom ops")
    try:
        options.register_custom_ops_library(str(library.absolute()))
    except Exception as error:
        raise QdqError(f"{library} is no library of custom ops that onnxruntime can load: {_reason(error)}") from error


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
    for node in every_node(copy):
        node.ClearField("name")
    return copy


def _reason(error: BaseException) -> str:
    """onnxruntime's message without its prefix, on one line."""
    text = re.sub(r"Load model from .*? failed: ?", "", " ".join(str(error).split()))
    return text.split(" : ", 3)[-1][:300] if text.startswith("[ONNXRuntimeError]") else text[:300]
