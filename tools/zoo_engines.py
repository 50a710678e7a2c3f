"""The zoo in TensorRT-RTX: which models parse, and how many of the planned ops run in INT8.

    python tools/zoo_engines.py [NAME ...]

Models that TensorRT-RTX does not parse in float are listed with its reason. Scales come from synthetic inputs: the
types in an engine do not depend on them. For each model: the Q/DQ model, then the same with an FP16 rest (--float16).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zoo import zoo_folder

import qdq_surgeon
from qdq_surgeon.tensorrt.audit import Audit, audit
from qdq_surgeon.tensorrt.engine import build, choose_backend


def main() -> None:
    zoo = zoo_folder()
    print(choose_backend("tensorrt-rtx"))
    planned = in_int8 = 0
    for entry in json.loads((zoo / "index.json").read_text()):
        if sys.argv[1:] and not any(name in entry["file"] for name in sys.argv[1:]):
            continue
        done = _model(zoo / entry["file"], entry.get("test_shapes") or {})
        planned += len(done.planned) if done else 0
        in_int8 += len(done.planned) - len(done.in_float) if done else 0
    print(f"together: {in_int8} of {planned} planned ops run in INT8")


def _model(path: Path, test_shapes: dict[str, list[int]]) -> Audit | None:
    shapes = {name: tuple(sizes) for name, sizes in test_shapes.items()}
    profile = {name: (sizes,) for name, sizes in shapes.items()}
    try:
        model = qdq_surgeon.load(path)
        build(model, backend="tensorrt-rtx", shapes=profile)
    except qdq_surgeon.QdqError as error:
        print(f"{path.name}: float refused: {str(error)[:160]}", flush=True)
        return None
    try:
        result = qdq_surgeon.quantize(model, samples=2, shapes=shapes, compare=False)
        if not result.plan.sites:
            print(f"{path.name}: nothing to quantize", flush=True)
            return None
        done = audit(result.model, backend="tensorrt-rtx", shapes=profile, beside_float=False)
        print(f"{path.name}: {len(done.planned) - len(done.in_float)} of {len(done.planned)} in INT8", flush=True)
        for op in done.in_float:
            print(f"    {op.node}: {op.reason}")
    except qdq_surgeon.QdqError as error:
        print(f"{path.name}: {str(error)[:200]}", flush=True)
        return None
    _float16(path, model, shapes, profile)
    return done


def _float16(path: Path, model: object, shapes: dict[str, tuple[int, ...]], profile: dict) -> None:  # type: ignore[type-arg]
    try:
        half = qdq_surgeon.quantize(model, samples=2, shapes=shapes, compare=False, float16=True).model  # type: ignore[arg-type]
        done = audit(half, backend="tensorrt-rtx", shapes=profile, beside_float=False)
        print(f"    FP16 rest: {len(done.planned) - len(done.in_float)} of {len(done.planned)} in INT8", flush=True)
        for op in done.in_float:
            print(f"      {op.node}: {op.reason}")
    except qdq_surgeon.QdqError as error:
        print(f"    FP16 rest: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
