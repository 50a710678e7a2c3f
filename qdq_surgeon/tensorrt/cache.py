"""TensorRT calibration caches: scales that a calibrator of TensorRT 10 or older has already found.

The format, in NVIDIA's words nowhere, is read alike by NVIDIA Model-Optimizer (`modelopt/onnx/quantization/
calib_utils.py`) and by onnxruntime's TensorRT provider (`ReadDynamicRange`): UTF-8 text; a first line such as
`TRT-8601-EntropyCalibration2` with TensorRT's version and the kind of calibrator; then a line `tensor: 3c010a14` for
each tensor, the bits of the float32 scale (largest |x| / 127) in hexadecimal, most significant digit first, leading
zeros left out. Tensors are named as in the ONNX model, so a name may hold colons and spaces. Tensors without a range
have the scale 0.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..calibration.statistics import BUCKETS, Origin, Statistic, Statistics
from ..edges import LEVELS, Edge, Plan, Site
from ..errors import DataError, nearest
from ..model import Model
from ..rules.planner import check_plan
from ..scales import Scales, choose_scales
from ..storage import write_atomically

METHOD = "cache"
HEADER = "TRT-8601-EntropyCalibration2"
"""The first line of the caches that we write. TensorRT refuses one of another version than its own."""


@dataclass(frozen=True, eq=False)
class Cache(Mapping[str, float]):
    """A calibration cache: tensor name -> scale; `header` is its first line, `origin` names the file."""

    header: str
    scales: Mapping[str, float]
    origin: Origin

    def __getitem__(self, tensor: str) -> float:
        return self.scales[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)


def read_cache(path: str | os.PathLike[str]) -> Cache:
    """Read a calibration cache. Raises DataError, with file and line, for whatever is none."""
    try:
        data = Path(path).read_bytes()
        header, *lines = data.decode().split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a TensorRT calibration cache: it is not text") from error
    if not header.startswith("TRT-"):
        raise DataError(f"{path}, line 1: a TensorRT calibration cache begins with a line like {HEADER}")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        name, scale = _entry(line, f"{path}, line {number}")
        if scales.setdefault(name, scale) != scale:
            raise DataError(f"{path}, line {number}: a second scale for '{name}': keep the one that is right")
    return Cache(header.strip(), scales, Origin((str(path),), hashlib.sha256(data).hexdigest(), samples=0))


def _entry(line: str, where: str) -> tuple[str, float]:
    name, _, digits = line.rpartition(":")
    digits = digits.strip()
    if not name or not 1 <= len(digits) <= 8 or not set(digits) <= set("0123456789abcdefABCDEF"):
        raise DataError(f"{where}: expected 'tensor: 3c010a14', a name and a float's bits in hexadecimal: {line!r}")
    (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
    if not math.isfinite(scale) or scale < 0:
        raise DataError(f"{where}: the scale of '{name}' is {scale:g}: calibrate again, or delete the line")
    return name, scale


def write_cache(scales: Scales, plan: Plan, path: str | os.PathLike[str], header: str = HEADER) -> None:
    """Write the scales of all activations, and of the tensors whose values they move, as a calibration cache.

    The file is written as a whole or not at all. Raises DataError where a name does not fit into a line,
    ModelError where the file cannot be written.
    """
    entries: dict[str, float] = {}
    for site in plan.sites:
        if site.weight or site.axis is not None or (site.tensor, site.axis) not in scales.values:
            continue
        entries[site.tensor] = float(scales.of(site))
        if site.source:
            entries.setdefault(site.source, entries[site.tensor])
    for name in entries:
        if "\n" in name:
            raise DataError(f"the tensor name {name!r} does not fit into one line of a calibration cache")
    # Leading zeros stay: TensorRT reads them too, and Model-Optimizer wants whole bytes.
    lines = [header, *(f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in entries.items())]
    write_atomically(Path(path), "".join(f"{line}\n" for line in lines).encode())


def scales_from_cache(model: Model, plan: Plan, cache: Mapping[str, float]) -> Scales:
    """The scales of a plan from a cache instead of a calibration; weights get theirs from their values, as ever.

    A tensor that the cache lacks takes the scale of one whose values it only moves, or its known range. Where there
    is neither, every op that would have read its pair goes back to float as a whole, and `Scales.dropped` says so.
    Raises DataError where the cache has none of the plan's tensors, PlanError where the plan is of another model.
    """
    check_plan(model, plan)
    sources = {site.tensor: site.source for site in plan.sites if not site.weight and not site.is_in_model}
    given = {site.tensor: max(site.range) / LEVELS for site in plan.sites if site.range and site.is_in_model}
    found = {tensor: scale for tensor in sources if (scale := _look_up(tensor, sources, {**cache, **given}))}
    if sources and not found:
        first = next(iter(sources))
        raise DataError(
            f"the calibration cache has none of the {len(sources)} activations to quantize, such as '{first}': "
            f"it seems to belong to another model.{nearest(first, cache)}"
        )
    amax = {tensor: LEVELS * scale for tensor, scale in found.items()}
    for site in plan.sites:
        if site.range:
            amax.setdefault(site.tensor, max(map(abs, site.range)))
    dropped = _drop(plan, amax)
    kept = tuple(
        site if site.is_in_model else replace(site, range=None)
        for site in plan.sites
        if not dropped.keys() >= set(site.edges)
    )
    origin = cache.origin if isinstance(cache, Cache) else Origin(("a calibration cache",), "", samples=0)
    statistics = Statistics({tensor: _statistic(reach) for tensor, reach in amax.items()}, model.digest, origin)
    scales = choose_scales(model, replace(plan, sites=kept), statistics, "max")
    return replace(scales, method=METHOD, dropped={**dropped, **scales.dropped})


def _look_up(tensor: str, sources: Mapping[str, str | None], cache: Mapping[str, float]) -> float:
    """The scale of a tensor, else of the nearest one upstream whose values it moves; 0 where there is none."""
    name: str | None = tensor
    while name is not None:
        if cache.get(name):
            return cache[name]
        name = sources.get(name)
    return 0.0


def _drop(plan: Plan, known: Mapping[str, float]) -> dict[Edge, str]:
    """All quantized edges of the ops that read a tensor without a scale, with the reason."""
    reasons: dict[tuple[tuple[str, ...], str], str] = {}
    for site in plan.sites:
        if not site.weight and not site.is_in_model and site.tensor not in known:
            reasons.update(((edge.scope, edge.reader), _missing(site)) for edge in site.edges)
    edges = (read.edge for site in plan.sites for read in site.added)
    return {edge: reasons[edge.scope, edge.reader] for edge in edges if (edge.scope, edge.reader) in reasons}


def _missing(site: Site) -> str:
    return f"the calibration cache has no scale for '{site.tensor}'"


_NO_HISTOGRAM = np.zeros(BUCKETS, np.int64)


def _statistic(amax: float) -> Statistic:
    """What the method `max` needs."""
    return Statistic(-amax, amax, 1, 0, _NO_HISTOGRAM)
