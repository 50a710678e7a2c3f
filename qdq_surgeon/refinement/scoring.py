"""A user's own measure of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

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

    def run(feed: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        arrays = {name: v if isinstance(v, list) or v is None else np.asarray(v) for name, v in feed.items()}
        outputs = session.run(Batch(arrays, 1), session.outputs)[0]
        return dict(zip(session.outputs, outputs, strict=True))

    value = score(run)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"the score is {value!r}, which is no number: return one, higher is better") from None
    if not np.isfinite(number):
        raise DataError(f"the score is {number}: return a finite number, higher is better")
    return number
