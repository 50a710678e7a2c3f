"""qdq_surgeon places INT8 Q/DQ pairs in ONNX models for TensorRT, explains each of them, and measures the result.

    result = qdq_surgeon.quantize("model.onnx", "calibration.npz")
    qdq_surgeon.save(result.model, "model.qdq.onnx")

The stages of the line are functions too: plan, calibrate, choose, insert, compare.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration.preprocessing import Preprocessing as Preprocessing
    from .calibration.statistics import Statistic as Statistic
    from .calibration.statistics import Statistics as Statistics
    from .comparison import Comparison as Comparison
    from .edges import Edge as Edge
    from .edges import Kept as Kept
    from .edges import Miss as Miss
    from .edges import Plan as Plan
    from .edges import Site as Site
    from .errors import DataError as DataError
    from .errors import FilterError as FilterError
    from .errors import ModelError as ModelError
    from .errors import PlacementError as PlacementError
    from .errors import PlanError as PlanError
    from .errors import QdqError as QdqError
    from .making import Result as Result
    from .model import load as load
    from .pipeline import apply as apply
    from .pipeline import calibrate as calibrate
    from .pipeline import choose as choose
    from .pipeline import compare as compare
    from .pipeline import insert as insert
    from .pipeline import plan as plan
    from .pipeline import quantize as quantize
    from .pipeline import sensitivity as sensitivity
    from .scales import Scales as Scales
    from .storage import save as save

_HOME = {
    "apply": "pipeline",
    "calibrate": "pipeline",
    "choose": "pipeline",
    "compare": "pipeline",
    "insert": "pipeline",
    "plan": "pipeline",
    "quantize": "pipeline",
    "sensitivity": "pipeline",
    "Result": "making",
    "load": "model",
    "save": "storage",
    "Comparison": "comparison",
    "Edge": "edges",
    "Kept": "edges",
    "Miss": "edges",
    "Plan": "edges",
    "Site": "edges",
    "Scales": "scales",
    "Preprocessing": "calibration.preprocessing",
    "Statistic": "calibration.statistics",
    "Statistics": "calibration.statistics",
    "DataError": "errors",
    "FilterError": "errors",
    "ModelError": "errors",
    "PlacementError": "errors",
    "PlanError": "errors",
    "QdqError": "errors",
}
"""Where each public name lives. Rooms are entered when first asked for, so that importing the package is light."""

__all__ = sorted(_HOME)

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
