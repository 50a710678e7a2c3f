"""Real models from the zoo, with default settings. Skipped where the zoo is absent."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import qdq_surgeon
from qdq_surgeon.calibration.feeds import default_data
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.cli import insert_main
from tests.test_insertion import stripped as strip

ZOO = Path(os.environ.get("QDQ_ZOO", Path(__file__).resolve().parents[2] / "shared" / "zoo"))
MODELS = sorted(path for path in ZOO.glob("*/*.onnx")) if (ZOO / "index.json").exists() else []
REFUSED = {
    "finn_custom.onnx": "onnxruntime refuses the model",
    "micro_kws_m_static_qoperator.onnx": "already quantized",
}

pytestmark = pytest.mark.skipif(not MODELS, reason=f"the model zoo is not at {ZOO}")
accepted = pytest.mark.parametrize(
    "path", [path for path in MODELS if path.name not in REFUSED], ids=lambda path: path.stem
)
refused = pytest.mark.parametrize("path", [path for path in MODELS if path.name in REFUSED], ids=lambda path: path.stem)

CHECKS = (
    onnx.checker.check_model,
    lambda model: onnx.checker.check_model(model, full_check=True),
    lambda model: onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True),
)


def passes(check, model):
    try:
        check(model)
    except Exception:
        return False
    return True


@accepted
def test_default_settings_give_a_sound_model(path, tmp_path, capsys):
    before = path.read_bytes()
    output = tmp_path / "out.qdq.onnx"
    code = insert_main([str(path), "-o", str(output), "--no-compare", "--samples", "2"])
    assert code == 0, capsys.readouterr().err
    assert path.read_bytes() == before
    source, result = qdq_surgeon.load(path), onnx.load(output)
    failed = [index for index, check in enumerate(CHECKS) if passes(check, source.original) > passes(check, result)]
    assert failed == []
    model = qdq_surgeon.load(result)
    batch = next(default_data(source, None, Session(source.original).runs).batches)
    session = Session(model.original, simulate=True)
    outputs = session.run(batch, session.outputs)[0]
    numbers = [array for array in outputs if isinstance(array, np.ndarray) and array.dtype.kind == "f"]
    assert all(np.isfinite(array).all() for array in numbers)


@accepted
def test_removing_the_pairs_gives_the_input_back(path, tmp_path):
    output = tmp_path / "out.qdq.onnx"
    assert insert_main([str(path), "-o", str(output), "--no-compare", "--samples", "2", "--quiet"]) == 0
    source = qdq_surgeon.load(path)
    result = onnx.load(output)
    expected = source.original if result == source.original else source.quantized or source.proto
    assert strip(result) == expected


@refused
def test_what_cannot_be_quantized_is_refused_in_one_line(path, tmp_path, capsys):
    output = tmp_path / "out.qdq.onnx"
    assert insert_main([str(path), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert REFUSED[path.name] in error
    assert error.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []
