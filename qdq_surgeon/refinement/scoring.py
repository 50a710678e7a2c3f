"""A user's own measure of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from ..calibration.feeds import Batch
from ..calibration.sessions import Session
from ..errors import DataError

Run: TypeAlias = Callable[[Mapping[str, Any]], dict[str, NDArray[Any]]]
"""Runs a model on one feed: arrays by input name in, arrays by output name out."""
Score: TypeAlias = Callable[[Run], float]
"""A measure of a model by whatever data it has, higher is better: accuracy, mAP ..."""


def scored(score: Score, proto: ModelProto, custom_ops: Sequence[Path] = ()) -> float:
    """What the user's score says of a model, its pairs simulated.

    Raises DataError where that is no finite number.
    """
    session = Session(proto, simulate=True, custom_ops=custom_ops)
    inputs = {info.name: info for info in proto.graph.input}

    def run(feed: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        arrays = {name: _as_input(value, inputs.get(name)) for name, value in feed.items()}
        outputs = session.run(Batch(arrays, 1), session.outputs)[0]
        return dict(zip(session.outputs, outputs, strict=True))

    value = score(run)
    script = getattr(score, "path", None)
    where = f"{script}: " if script else ""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}the score is {value!r}, which is no number: return one, higher is better") from None
    if not np.isfinite(number):
        raise DataError(f"{where}the score is {number}: return a finite number, higher is better")
    return number


def _as_input(value: Any, info: ValueInfoProto | None) -> Any:
    """An array where the model takes a tensor: of its type, unless it is an array already. All else as it is."""
    if isinstance(value, np.ndarray) or info is None or not info.type.HasField("tensor_type"):
        return value
    array = np.asarray(value)
    kind = info.type.tensor_type.elem_type
    return array if array.dtype.kind in "OUS" else array.astype(helper.tensor_dtype_to_np_dtype(kind))
