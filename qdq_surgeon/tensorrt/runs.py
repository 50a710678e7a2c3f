"""Runs engines, which takes a GPU: accuracy against the float model, latency, size, and one verdict.

Without a GPU the audit of the engine is all there is, and the report says what was left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from ..calibration.feeds import Batch
from ..calibration.sessions import Session
from ..comparison import Comparison, compare_runners
from ..edges import count
from ..errors import QdqError
from ..float16 import to_float16
from ..model import Model, load
from ..report.tables import decibels, share, table
from .audit import Audit, audit
from .engine import Backend, Engine, EngineError, GivenShapes, build, quiet_polygraphy

WARM_UP, TIMED = 20, 100
"""Runs before timing begins, and timed runs."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one run between two CUDA events, enqueueing included, copies left out; clocks not locked."""

    median: float
    p95: float
    batch: int

    @property
    def throughput(self) -> float:
        """Samples per second at the median."""
        return 1000 * self.batch / self.median


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One engine: its precision, its size in bytes, how fast it is, and how close to the float model."""

    precision: str
    size: int
    latency: Latency
    comparison: Comparison


@dataclass(frozen=True)
class EngineReport:
    """What the engines did: the audit always, runs only where there is a GPU. `left_out` says what is missing."""

    backend: Backend
    audit: Audit
    runs: tuple[EngineRun, ...] = ()
    left_out: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times faster INT8 is than the faster of FP16 and FP32; None without a GPU."""
        medians = {run.precision: run.latency.median for run in self.runs}
        others = [median for precision, median in medians.items() if precision != "INT8"]
        return min(others) / medians["INT8"] if others and "INT8" in medians else None

    @property
    def verdict(self) -> str:
        """One line: how fast, and which planned ops ran in float, with the reasons."""
        planned, floats = len(self.audit.planned), self.audit.in_float
        parts = [f"INT8 is {self.speedup:.2f}x as fast as the best float engine"] if self.speedup else []
        parts.append(f"{planned - len(floats)} of {count(planned, 'planned op')} run in INT8")
        reasons = dict.fromkeys(op.reason for op in floats)
        parts += [f"{len(floats)} in float because of {'; '.join(reasons)}"] if floats else []
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [str(self.audit)]
        if self.runs:
            heads = ("engine", "median ms", "p95 ms", "samples/s", "megabytes", "SQNR", "top-1 agreement")
            lines += ["", f"latency by CUDA events, {TIMED} runs after {WARM_UP}, clocks not locked, TF32 off"]
            lines.append(table(heads, map(_row, self.runs)))
        lines += [f"left out: {self.left_out}"] if self.left_out else []
        lines.append(f"verdict: {self.verdict}")
        return "\n".join(lines)


class EngineSession:
    """A Polygraphy runner over a built engine. Use it in a `with` statement. Raises EngineError where it fails."""

    def __init__(self, engine: Engine) -> None:
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        self._runner: Any = TrtRunner(EngineFromBytes(engine.data))
        self._half: set[str] = set()
        self.outputs: tuple[str, ...] = ()

    def __enter__(self) -> EngineSession:
        with _gpu_errors():
            self._runner.activate()
            engine = self._runner.engine
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            self.outputs = tuple(name for name in names if engine.get_tensor_mode(name).name == "OUTPUT")
            self._half = {name for name in names if engine.get_tensor_dtype(name).name == "HALF"}
        return self

    def __exit__(self, *_: object) -> None:
        with _gpu_errors():
            self._runner.deactivate()

    def run(self, batch: Batch, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        """The named outputs for one batch."""
        feed = {name: array.astype("float16") if name in self._half else array for name, array in batch.feed.items()}
        with _gpu_errors():
            outputs = self._runner.infer(feed, copy_outputs_to_host=True)
        return [[outputs[name] for name in names]]

    def latency(self, batch: Batch) -> Latency:
        """Time the engine on one batch, whose tensors stay on the GPU meanwhile."""
        self.run(batch, self.outputs)
        with _gpu_errors():
            times = sorted(self._times()[WARM_UP:])
        return Latency(statistics.median(times), times[int(0.95 * len(times))], batch.samples)

    def _times(self) -> list[float]:
        from polygraphy import cuda

        runtime, stream = cuda.wrapper().handle, self._runner.stream.ptr
        events = [ctypes.c_void_p() for _ in range(2)]
        for event in events:
            _check(runtime.cudaEventCreate(ctypes.byref(event)))
        times = []
        for _ in range(WARM_UP + TIMED):
            _check(runtime.cudaEventRecord(events[0], ctypes.c_void_p(stream)))
            if not self._runner.context.execute_async_v3(stream):
                raise EngineError("TensorRT could not run the engine again")
            _check(runtime.cudaEventRecord(events[1], ctypes.c_void_p(stream)))
            _check(runtime.cudaEventSynchronize(events[1]))
            elapsed = ctypes.c_float()
            _check(runtime.cudaEventElapsedTime(ctypes.byref(elapsed), *events))
            times.append(elapsed.value)
        for event in events:
            _check(runtime.cudaEventDestroy(event))
        return times


def _check(status: int) -> None:
    if status:
        raise EngineError(f"CUDA answers with error {status}")


@contextlib.contextmanager
def _gpu_errors() -> Iterator[None]:
    try:
        with quiet_polygraphy():
            yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"the engine cannot be run: {' '.join(str(error).split())[:300]}") from error


def compare_engines(
    float_model: Model,
    quantized: ModelProto,
    batches: Sequence[Batch],
    data: str,
    held_out: bool | None,
    *,
    backend: str | None = None,
    shapes: GivenShapes | None = None,
) -> EngineReport:
    """Audit the INT8 engine and, where there is a GPU, run FP32, FP16 and INT8 engines on the batches.

    A float engine that cannot be had is left out, and the report says so. Raises EngineError where TensorRT is
    missing or refuses the INT8 model.
    """
    given = dict(shapes or {}) or shapes_of(float_model, batches)
    audited = audit(load(quantized), backend=backend, shapes=given)
    if not audited.backend.gpu:
        return EngineReport(audited.backend, audited, left_out="accuracy and latency in TensorRT, for lack of a GPU")
    reference = Session(float_model.original, custom_ops=float_model.custom_ops)
    models: dict[str, Callable[[], ModelProto]] = {
        "FP32": lambda: float_model.original,
        "FP16": lambda: to_float16(float_model.original).model,
        "INT8": lambda: quantized,
    }
    runs, left_out = [], []
    for precision, proto in models.items():
        try:
            engine = build(proto(), backend=backend, shapes=given)
            runs.append(_run(precision, engine, reference, batches, data, held_out))
        except QdqError as error:
            if precision == "INT8":
                raise
            left_out.append(f"{precision} ({error})")
    return EngineReport(audited.backend, audited, tuple(runs), ", ".join(left_out))


def shapes_of(model: Model, batches: Iterable[Batch]) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """A profile for the inputs with open dimensions that covers all batches; the first one is the usual shape."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    for batch in batches:
        for name, shape in batch.shapes.items():
            seen.setdefault(name, []).append(shape)
    if not seen:
        raise QdqError("there are no samples to run engines on")
    shapes = {}
    for name, found in seen.items():
        low, high = (tuple(map(bound, zip(*found, strict=True))) for bound in (min, max))
        shapes[name] = (low, found[0], high)
    open_inputs = {
        v.name for v in model.inputs if any(not d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)
    }
    return {name: shape for name, shape in shapes.items() if name in open_inputs}


def _run(
    precision: str,
    engine: Engine,
    reference: Session,
    batches: Sequence[Batch],
    data: str,
    held_out: bool | None,
) -> EngineRun:
    if not batches:
        raise EngineError("there are no samples to run engines on")
    with EngineSession(engine) as session:
        where = f"the {precision} engine of {engine.backend}"
        comparison = compare_runners(reference, session, batches, data, held_out, where=where)
        return EngineRun(precision, len(engine.data), session.latency(batches[0]), comparison)


def _row(run: EngineRun) -> tuple[str, ...]:
    return (
        run.precision,
        f"{run.latency.median:.3f}",
        f"{run.latency.p95:.3f}",
        f"{run.latency.throughput:.0f}",
        f"{run.size / 1e6:.1f}",
        decibels(run.comparison.sqnr),
        share(run.comparison.agreement),
    )
