"""The errors a caller can expect. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QdqError(Exception):
    """Anything this package refuses to do. The command line prints it in one line and exits with 2."""


class ModelError(QdqError):
    """The model cannot be read, is not ONNX, or cannot be run or quantized."""


class PlacementError(QdqError):
    """A placement file or one of its patterns is wrong."""


class DataError(QdqError):
    """The calibration data do not fit the model."""


class FilterError(QdqError):
    """A filter (include, exclude, op_types) matches nothing in the model."""


class PlanError(QdqError):
    """A plan does not belong to the model, or a saved plan cannot be read."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with up to three close matches, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
