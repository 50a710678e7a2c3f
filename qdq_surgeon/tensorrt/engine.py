"""Builds engines with Polygraphy, for TensorRT 10 and 11 and for TensorRT-RTX.

Networks are strongly typed always, and no precision flag is ever set: the ONNX file says what runs in which type.
TensorRT-RTX builds on a machine without a GPU; TensorRT does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from onnx import ModelProto

from ..errors import QdqError, nearest
from ..graph import tensor_type
from ..model import Source, load
from ..storage import fits_in_one_file, on_disk
from .layers import Layer, from_inspector, from_log

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = (TENSORRT, TENSORRT_RTX)
MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
EXTRAS = {TENSORRT: "tensorrt", TENSORRT_RTX: "rtx"}
TITLES = {TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"}

ShapeRange: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The smallest, the usual and the largest shape of one input."""
GivenShapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], ...]]
"""For an input one shape, or the smallest, the usual and the largest."""


class EngineError(QdqError):
    """TensorRT is not there, or refuses the model."""


@dataclass(frozen=True, slots=True)
class Backend:
    """Which TensorRT builds: its name, its version, and whether a GPU is there to run engines on."""

    name: str
    version: str
    gpu: bool

    def __str__(self) -> str:
        where = "" if self.gpu else ", built on CPU: fusion and latency not visible"
        return f"{TITLES[self.name]} {self.version}{where}"


@dataclass(frozen=True)
class Engine:
    """A built engine: its bytes, its layers, what built it and how."""

    data: bytes
    layers: tuple[Layer, ...]
    backend: Backend
    shapes: Mapping[str, ShapeRange]
    seconds: float
    tf32: bool


def choose_backend(name: str | None = None) -> Backend:
    """The backend asked for, else TensorRT where it can work (it needs a GPU), else TensorRT-RTX.

    Raises EngineError, which names the install command, where it is missing.
    """
    if name is not None and name not in BACKENDS:
        raise EngineError(f"unknown backend {name!r}.{nearest(name, BACKENDS)} Backends: {', '.join(BACKENDS)}")
    installed = [backend for backend in BACKENDS if _is_installed(MODULES[backend])]
    usable = [backend for backend in installed if backend == TENSORRT_RTX or has_gpu()]
    chosen = name or next(iter(usable), TENSORRT_RTX)
    if chosen not in installed or not _is_installed("polygraphy"):
        raise EngineError(f"{TITLES[chosen]} is not installed: pip install 'qdq-surgeon[{EXTRAS[chosen]}]'")
    _select(chosen)
    try:
        module = importlib.import_module(MODULES[chosen])
    except Exception as error:
        raise EngineError(f"{TITLES[chosen]} is installed but does not load ({error})") from error
    return Backend(chosen, str(module.__version__), has_gpu())


def _is_installed(module: str) -> bool:
    """True for a package with code; a folder that happens to have its name does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def has_gpu() -> bool:
    """True where the CUDA driver loads and sees a device."""
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number = ctypes.c_int()
        return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(number)) and number.value > 0
    return False


def build(
    model: Source,
    *,
    backend: str | None = None,
    shapes: GivenShapes | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    tf32: bool = False,
) -> Engine:
    """Build a strongly typed engine from a model as it is.

    `shapes` gives, for each input with open dimensions, one shape or the smallest, usual and largest; an open batch
    (axis 0) is 1 by default. `timing_cache` is read and written where the version has one. `tf32` lets FP32 matrix
    products use TF32, which is off by default. Raises EngineError with TensorRT's own words where it refuses.
    """
    chosen = choose_backend(backend)
    proto = load(model).original
    ranges = profile_shapes(proto, shapes or {})
    trt = importlib.import_module(MODULES[chosen.name])
    logger = _logger(trt)
    cache = os.fspath(timing_cache) if timing_cache is not None and chosen.name == TENSORRT else None
    start = time.perf_counter()
    with quiet_polygraphy():
        from polygraphy.backend.trt import EngineBytesFromNetwork

        config = _config(trt, ranges, cache, tf32)
        try:
            loader = EngineBytesFromNetwork(_network(trt, logger, proto), config=config, save_timing_cache=cache)
            data = bytes(loader())
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"{TITLES[chosen.name]} cannot build the engine: {_reason(logger, error)}") from error
    layers = from_log(logger.messages) or (_inspect(trt, logger, data) if chosen.gpu else ())
    if not layers:
        raise EngineError(f"{TITLES[chosen.name]} built the engine but does not say what is in it")
    return Engine(data, layers, chosen, ranges, time.perf_counter() - start, tf32)


def profile_shapes(proto: ModelProto, shapes: GivenShapes) -> dict[str, ShapeRange]:
    """The optimization profile: a range for every input with open dimensions.

    Raises EngineError for an unknown input, a shape that does not fit, and an open dimension that nothing states.
    """
    initializers = {tensor.name for tensor in proto.graph.initializer}
    declared = {v.name: tensor_type(v)[1] or () for v in proto.graph.input if v.name not in initializers}
    for name in shapes:
        if name not in declared:
            raise EngineError(f"shapes: the model has no input '{name}'.{nearest(name, declared)}")
    return {
        name: _range(name, dims, shapes.get(name))
        for name, dims in declared.items()
        if name in shapes or not all(isinstance(dim, int) for dim in dims)
    }


def _range(name: str, dims: tuple[Any, ...], given: tuple[tuple[int, ...], ...] | None) -> ShapeRange:
    if given is None:
        if not all(isinstance(dim, int) for dim in dims[1:]):
            example = "x".join(str(dim) if isinstance(dim, int) else "N" for dim in dims)
            raise EngineError(f"the input '{name}' has open dimensions: state them with --shapes {name}:{example}")
        given = ((1, *dims[1:]),)
    if len(given) not in (1, 3):
        raise EngineError(f"shapes of '{name}': give one shape, or the smallest, the usual and the largest")
    for shape in given:
        pairs = zip(dims, shape, strict=False)
        if len(shape) != len(dims) or any(isinstance(dim, int) and dim != size for dim, size in pairs):
            raise EngineError(f"shapes of '{name}': {list(shape)} does not fit [{', '.join(map(str, dims))}]")
    low, usual, high = given * 3 if len(given) == 1 else given
    return low, usual, high


def _config(trt: Any, ranges: Mapping[str, ShapeRange], cache: str | None, tf32: bool) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, (low, usual, high) in ranges.items():
        profile.add(name, min=low, opt=usual, max=high)
    return CreateConfig(
        tf32=tf32 or None,
        profiles=[profile] if ranges else None,
        load_timing_cache=cache if cache and Path(cache).exists() else None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )


def _network(trt: Any, logger: Any, proto: ModelProto) -> tuple[Any, Any, Any]:
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not _parse(parser, proto):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise EngineError(f"TensorRT cannot parse the model: {' '.join(' | '.join(errors).split())[:500]}")
    return builder, network, parser


def _parse(parser: Any, proto: ModelProto) -> bool:
    if fits_in_one_file(proto):
        return bool(parser.parse(proto.SerializeToString()))
    with on_disk(proto) as path:
        return bool(parser.parse_from_file(str(path)))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the builder says: its layer list, and its errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            if message.lstrip().startswith("Layers:"):
                self.messages.append(message)

    return Logger()


def _inspect(trt: Any, logger: Any, data: bytes) -> tuple[Layer, ...]:
    engine = trt.Runtime(logger).deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"the engine was built but does not load: {_reason(logger, None)}")
    inspector = engine.create_engine_inspector()
    return from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _select(backend: str) -> None:
    """Tell Polygraphy which TensorRT to use; it must know before its own TensorRT modules are first imported."""
    import polygraphy.config

    wanted = backend == TENSORRT_RTX
    if "polygraphy.backend.trt" in sys.modules and bool(polygraphy.config.USE_TENSORRT_RTX) != wanted:
        raise EngineError("one process can use one TensorRT: start another for the other backend")
    polygraphy.config.USE_TENSORRT_RTX = wanted


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Polygraphy calls what TensorRT-RTX deprecates
        yield


def _reason(logger: Any, error: BaseException | None) -> str:
    text = " | ".join(logger.errors) or str(error or "no reason was given")
    return " ".join(text.split())[:500]
