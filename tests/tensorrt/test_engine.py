"""Engines, built with TensorRT-RTX on whatever machine runs the tests."""

import numpy as np
import onnx
import pytest

import qdq_surgeon
from qdq_surgeon.tensorrt.engine import EngineError, build, choose_backend, profile_shapes
from tests.graphs import typed as model

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'qdq-surgeon[rtx]'")
pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'qdq-surgeon[rtx]'")

NET = "g (float[N,16,8,8] x) => (y) <float[32,16,3,3] w> { c = Conv<pads=[1,1,1,1]>(x, w) y = Relu(c) }"


def quantized(text=NET, batch=4):
    data = np.random.default_rng(0).standard_normal((batch, 16, 8, 8)).astype(np.float32)
    return qdq_surgeon.quantize(model(text), {"x": data}, compare=False).model


def test_the_backend_says_what_it_is_and_what_it_cannot_show():
    backend = choose_backend("tensorrt-rtx")
    assert str(backend).startswith("TensorRT-RTX 1.")
    assert ("built on CPU: fusion and latency not visible" in str(backend)) is not backend.gpu


def test_an_engine_is_bytes_and_layers():
    engine = build(quantized(), backend="tensorrt-rtx")
    assert len(engine.data) > 1000
    assert any(layer.computes_int8(32 * 16 * 9) for layer in engine.layers)
    assert not engine.tf32


def test_a_float_engine_computes_nothing_in_int8():
    assert not any(layer.computes_int8(1) for layer in build(model(NET), backend="tensorrt-rtx").layers)


def test_the_model_is_left_as_it_was():
    proto = quantized()
    before = proto.SerializeToString()
    build(proto, backend="tensorrt-rtx")
    assert proto.SerializeToString() == before


def test_an_open_batch_is_1_by_default():
    assert profile_shapes(model(NET), {}) == {"x": ((1, 16, 8, 8),) * 3}


def test_a_profile_has_a_smallest_a_usual_and_a_largest_shape():
    given = tuple((batch, 16, 8, 8) for batch in (1, 4, 8))
    assert build(quantized(), backend="tensorrt-rtx", shapes={"x": given}).shapes == {"x": given}


def test_fixed_inputs_need_no_profile():
    assert profile_shapes(model("g (float[1,4] x) => (y) { y = Relu(x) }"), {}) == {}


@pytest.mark.parametrize(
    ("text", "shapes", "message"),
    [
        (NET, {"z": ((1, 16, 8, 8),)}, "the model has no input 'z'"),
        (NET, {"x": ((1, 3, 8, 8),)}, r"\[1, 3, 8, 8\] does not fit \[N, 16, 8, 8\]"),
        (NET, {"x": ((1, 16, 8, 8),) * 2}, "one shape, or the smallest, the usual and the largest"),
        ("g (float[1,3,H,W] x) => (y) { y = Relu(x) }", {}, "state them with --shapes x:1x3xNxN"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(text, shapes, message):
    with pytest.raises(EngineError, match=message):
        profile_shapes(model(text), shapes)


def test_what_tensorrt_refuses_is_told_in_its_own_words():
    proto = quantized()
    for tensor in proto.graph.initializer:
        if tensor.name == "x_zero_point":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8), tensor.name))
    with pytest.raises(EngineError, match=r"cannot parse the model: .*zero point") as error:
        build(proto, backend="tensorrt-rtx")
    assert "\n" not in str(error.value)


def test_an_unknown_backend_gets_the_nearest_name():
    with pytest.raises(EngineError, match="Did you mean 'tensorrt-rtx'"):
        choose_backend("tensort-rtx")


def test_a_missing_package_gets_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'qdq-surgeon\[rtx\]'"):
        choose_backend("tensorrt-rtx")
    with pytest.raises(EngineError, match=r"pip install 'qdq-surgeon\[tensorrt\]'"):
        choose_backend("tensorrt")
