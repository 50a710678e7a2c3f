"""The trtexec command line for a model: strongly typed, no precision flags, profiles for open inputs."""

from __future__ import annotations

import importlib.util
import shlex
from importlib import metadata
from pathlib import Path

from ..errors import QdqError, nearest
from ..model import Model
from .engine import GivenShapes, profile_shapes
from .lint import TARGETS

PROGRAMS = {"trt10": "trtexec", "trt11": "trtexec", "rtx": "tensorrt_rtx"}


def trtexec_command(model: Model, onnx_file: Path, target: str = "", shapes: GivenShapes | None = None) -> str:
    """The command that builds an engine of `onnx_file`.

    `target` is trt10, trt11 or rtx; by default what is installed, else trt11. TF32 is off, as in our own builds.
    Before TensorRT 11 a network is strongly typed only on demand (NVIDIA, "TensorRT 10.x to 11.x: trtexec").
    Raises QdqError for an unknown target, EngineError for open dimensions that nothing states.
    """
    chosen = target or _installed()
    check_target(chosen)
    words = [PROGRAMS[chosen], f"--onnx={onnx_file}", f"--saveEngine={onnx_file.with_suffix('.engine')}", "--noTF32"]
    words += ["--stronglyTyped"] if chosen == "trt10" else []
    ranges = profile_shapes(model.original, shapes or {})
    for index, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        texts = [f"{name}:{'x'.join(map(str, bounds[index]))}" for name, bounds in ranges.items()]
        words += [f"--{option}={','.join(texts)}"] if texts else []
    return shlex.join(words)


def check_target(target: str) -> None:
    """Raise QdqError, with the nearest name, for an unknown target; '' stands for what is installed."""
    if target and target not in TARGETS:
        raise QdqError(f"unknown target {target!r}.{nearest(target, TARGETS)} Targets: {', '.join(TARGETS)}")


def _installed() -> str:
    try:
        return "trt10" if metadata.version("tensorrt").startswith("10.") else "trt11"
    except metadata.PackageNotFoundError:
        return "rtx" if importlib.util.find_spec("tensorrt_rtx") else "trt11"
