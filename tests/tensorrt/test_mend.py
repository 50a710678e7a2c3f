"""What is mended, that it computes the same where it should, and that the rest is left and says why."""

import contextlib
import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import qdq_surgeon
from qdq_surgeon.tensorrt.lint import lint
from qdq_surgeon.tensorrt.mend import mend
from tests.graphs import model

X = np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)

PAIR = "x_q = QuantizeLinear(x, s, z)\n x_d = DequantizeLinear(x_q, s, z)"
WEIGHT = "w_q = QuantizeLinear<axis = 0>(w, s16, z16)\n w_d = DequantizeLinear<axis = 0>(w_q, s16, z16)"
STORED = "w_d = DequantizeLinear<axis = 0>(w8, s16, z16)"
CONSTANTS = {
    "s": np.float32(0.05),
    "s2": np.float32(0.1),
    "z": np.int8(0),
    "s16": np.full(16, 0.004, np.float32),
    "z16": np.zeros(16, np.int8),
}


def build(body, opset=17, **constants):
    """A model of one input x and one output y, with weights w and u; `constants` add to CONSTANTS."""
    proto = model(
        f"g (float[1,16,8,8] x) => (float[A,B,C,D] y) <float[16,16,3,3] w, float[16,16,1,1] u> {{ {body} }}", opset
    )
    read = {name for node in proto.graph.node for name in node.input}
    for name, value in (CONSTANTS | constants).items():
        if name in read:
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return proto


def conv(x=PAIR, w=WEIGHT, tail="y = Conv(x_d, w_d)", **constants):
    return build(f"{x}\n {w}\n {tail}", **constants)


def run(proto, x=X):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def codes(findings):
    return {finding.code for finding in findings}


def initializers(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def mended(proto, *expected):
    """Mend, check what was found before and that nothing is left, and that the source stays as it was."""
    before = proto.SerializeToString(deterministic=True)
    assert codes(lint(proto, "trt10").findings) == set(expected)
    result = mend(proto, "trt10")
    assert proto.SerializeToString(deterministic=True) == before
    assert result.left == ()
    assert result.done
    assert result.left == lint(result.model, "trt10").findings
    return result.model


def left(proto):
    result = mend(proto, "trt10")
    assert result.model == proto
    assert result.done == ()
    return result.left


# ---- exact: the same numbers before and after ---------------------------------------------------------------------


def test_uint8_around_128_becomes_int8_around_0():
    proto = conv(z=np.uint8(128))
    assert np.array_equal(run(mended(proto, "zero-point-not-int8", "zero-point-not-zero")), run(proto))


def test_uint8_around_128_behind_data_movement():
    """Q, MaxPool on integers, DQ."""
    text = "q = QuantizeLinear(x, s, z)\n m = MaxPool<kernel_shape = [2, 2]>(q)\n x_d = DequantizeLinear(m, s, z)"
    proto = conv(x=text, z=np.uint8(128))
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, [1, 16, 8, 8]))
    assert np.array_equal(run(mended(proto, "zero-point-not-int8", "zero-point-not-zero")), run(proto))


def test_stored_uint8_weights_become_int8():
    integers = np.random.default_rng(1).integers(0, 256, (16, 16, 3, 3)).astype(np.uint8)
    proto = conv(w=STORED, w8=integers, z16=np.full(16, 128, np.uint8))
    result = mended(proto, "zero-point-not-int8", "zero-point-not-zero")
    assert np.array_equal(run(result), run(proto))
    assert {value.dtype for value in initializers(result).values()} == {np.dtype("float32"), np.dtype("int8")}


def test_a_scalar_zero_point_gets_the_shape_of_the_scale():
    proto = conv(w=WEIGHT.replace("z16", "z"))
    assert np.array_equal(run(mended(proto, "zero-point-shape")), run(conv()))


def test_an_int32_bias_becomes_float():
    bias = np.random.default_rng(2).integers(-5000, 5000, 16).astype(np.int32)
    scales = np.linspace(1e-4, 2e-4, 16).astype(np.float32)
    proto = conv(tail="b_d = DequantizeLinear<axis = 0>(b, sb)\n y = Conv(x_d, w_d, b_d)", b=bias, sb=scales)
    result = mended(proto, "bias-int32")
    np.testing.assert_allclose(run(result), run(proto), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(initializers(result)["b_d"], bias * scales, rtol=1e-6)
    assert not {"b", "sb"} & initializers(result).keys()


def test_a_missing_axis_comes_from_the_consumer():
    proto = conv(w=WEIGHT.replace("<axis = 0>", ""))
    assert np.array_equal(run(mended(proto, "axis-missing")), run(conv()))


def test_zero_scales_of_zero_channels_become_1():
    dead = np.where(np.arange(16) == 3, 0, 0.004).astype(np.float32)
    proto = conv(s16=dead)
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[3] = 0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    result = mended(proto, "scale-not-positive")
    np.testing.assert_allclose(run(result)[:, 3], 0)
    scale = initializers(result)["w_scale"]
    assert scale[3] == 1
    assert np.array_equal(np.delete(scale, 3), np.delete(dead, 3))


def test_a_zero_scale_makes_stored_integers_zero():
    dead = np.where(np.arange(16) == 3, 0, 0.004).astype(np.float32)
    proto = conv(w=STORED, s16=dead, w8=np.full((16, 16, 3, 3), 7, np.int8))
    result = mended(proto, "scale-not-positive")
    np.testing.assert_allclose(run(result), run(proto), rtol=1e-6)


def test_names_become_unique_where_a_q_or_dq_has_them():
    proto = conv(tail="c = Conv(x_d, w_d)\n r = Relu(c)\n y = Relu(r)")
    for node in proto.graph.node:
        node.name = node.op_type
    result = mended(proto, "duplicate-names")
    names = [node.name for node in result.graph.node if "Linear" in node.op_type]
    assert len(set(names)) == len(names) == 4
    assert [node.name for node in result.graph.node if node.op_type == "Relu"] == ["Relu", "Relu"]


# ---- not exact, but within what INT8 can hold ---------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", [", z", ""])
def test_uint8_data_behind_a_relu_become_int8_over_the_same_range(zero_point):
    pair = f"r = Relu(x)\n q = QuantizeLinear(r, s{zero_point})\n x_d = DequantizeLinear(q, s{zero_point})"
    proto = conv(x=pair, z=np.uint8(0), s=np.float32(4 / 255))
    code = "zero-point-not-int8" if zero_point else "zero-point-missing"
    result = mended(proto, code)
    assert initializers(result)["r_scale"] == pytest.approx(4 / 127)
    np.testing.assert_allclose(run(result), run(proto), atol=0.3)
    assert np.corrcoef(run(result).ravel(), run(proto).ravel())[0, 1] > 0.999


def test_asymmetric_weights_get_a_scale_from_their_values():
    proto = conv(z16=np.full(16, -40, np.int8), s16=np.full(16, 0.0025, np.float32))
    result = mended(proto, "zero-point-not-zero")
    exact = run(build(f"{PAIR}\n y = Conv(x_d, w)"))
    np.testing.assert_allclose(run(result), exact, atol=0.1)
    weight = np.abs(numpy_helper.to_array(proto.graph.initializer[0])).max(axis=(1, 2, 3))
    np.testing.assert_allclose(initializers(result)["w_scale"], weight / 127, rtol=1e-6)


def test_asymmetric_stored_weights_are_quantized_anew():
    integers = np.random.default_rng(1).integers(0, 256, (16, 16, 3, 3)).astype(np.uint8)
    proto = conv(w=STORED, w8=integers, z16=np.full(16, 100, np.uint8))
    result = mended(proto, "zero-point-not-int8", "zero-point-not-zero")
    np.testing.assert_allclose(run(result), run(proto), atol=0.1)


def test_a_wrong_axis_is_turned():
    text = WEIGHT.replace("axis = 0", "axis = 1")
    result = mended(conv(w=text), "axis-wrong")
    np.testing.assert_allclose(run(result), run(build(f"{PAIR}\n y = Conv(x_d, w)")), atol=0.1)


def test_concat_inputs_and_output_get_the_largest_scale():
    body = f"""{PAIR}
        e = Abs(x)
        e_q = QuantizeLinear(e, s2, z)
        e_d = DequantizeLinear(e_q, s2, z)
        c = Concat<axis = 2>(x_d, e_d)
        c_q = QuantizeLinear(c, s3, z)
        c_d = DequantizeLinear(c_q, s3, z)
        {WEIGHT}
        y = Conv(c_d, w_d)"""
    proto = build(body, s3=np.float32(0.07))
    result = mended(proto, "concat-scales-differ")
    scales = {initializers(result)[node.input[1]].item() for node in result.graph.node if node.input[2:3] == ["z"]}
    assert scales == {np.float32(0.1).item()}
    np.testing.assert_allclose(run(result), run(proto), atol=0.4)


@pytest.mark.parametrize(
    ("body", "plain"),
    [(f"{PAIR}\n y = Conv(x_d, w)", "y = Conv(x, w)"), (f"{WEIGHT}\n y = Conv(x, w_d)", "y = Conv(x, w)")],
)
def test_one_sided_pairs_are_removed(body, plain):
    proto = build(body)
    result = mended(proto, "one-sided")
    assert [node.op_type for node in result.graph.node] == ["Conv"]
    assert np.array_equal(run(result), run(build(plain)))


def test_a_one_sided_pair_stays_for_its_other_readers():
    proto = build(f"{PAIR}\n {WEIGHT}\n a = Conv<pads = [1, 1, 1, 1]>(x_d, w_d)\n b = Conv(x_d, u)\n y = Sub(a, b)")
    result = mended(proto, "one-sided")
    reads = {node.output[0]: list(node.input) for node in result.graph.node}
    assert reads["a"] == ["x_d", "w_d"]
    assert reads["b"] == ["x", "u"]


# ---- left ---------------------------------------------------------------------------------------------------------


def test_asymmetric_activations_need_calibration():
    (finding,) = left(conv(z=np.int8(-128)))
    assert finding.code == "zero-point-not-zero"
    assert finding.detail == "it is -128; not mended: the range is not symmetric, so this needs calibration"


@pytest.mark.parametrize("zero_point", [", z", ""])
def test_uint8_data_that_may_be_negative_are_left(zero_point):
    pair = f"q = QuantizeLinear(x, s{zero_point})\n x_d = DequantizeLinear(q, s{zero_point})"
    (finding,) = left(conv(x=pair, z=np.uint8(0)))
    assert "if they are never negative" in finding.detail


@pytest.mark.parametrize(
    "proto",
    [
        conv(s=np.float32(0)),
        conv(x=PAIR.replace("(x_q, s,", "(x_q, s2,")),
        conv(w="w_q = Cast<to = 3>(w)\n w_d = DequantizeLinear<axis = 0>(w_q, s16, z16)", z=np.int8(1)),
        build(f"{STORED}\n y = Conv(x, w_d)", w8=np.ones((16, 16, 3, 3), np.int8)),
        build(f"{PAIR}\n c = Conv(x_d, w)\n y = Exp(c)\n i = ConvInteger(x_q, x_q)\n o = Cast<to = 1>(i)"),
    ],
    ids=["zero scale on data", "pair mismatch", "cast weights", "stored weights alone", "integer op"],
)
def test_what_cannot_be_mended_is_left_as_it_was(proto):
    result = mend(proto, "trt10")
    assert codes(result.left) == codes(lint(result.model, "trt10").findings)
    assert result.left


def test_a_clean_model_comes_back_as_it_was():
    assert left(conv()) == ()


# ---- onnxruntime's quantizer --------------------------------------------------------------------------------------

NET = """g (float[1,16,8,8] x) => (float[1,32] y)
    <float[16,16,3,3] w, float[16] b, float[16,16,3,3] v, float[16] c, float[32,16] f, float[32] d> {
    p = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    q = Relu(p)
    r = Conv<pads = [1, 1, 1, 1]>(q, v, c)
    s = Add(r, q)
    t = Relu(s)
    m = GlobalAveragePool(t)
    l = Flatten(m)
    y = Gemm<transB = 1>(l, f, d)
}"""


@contextlib.contextmanager
def _silent():
    """onnxruntime's quantizer warns and logs about settings that are not ours."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def quantize_static(tmp_path):
    with _silent():
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.feeds = iter([{"x": X}, {"x": -X}])

        def get_next(self):
            return next(self.feeds, None)

    def quantize(**options):
        onnx.save(model(NET), tmp_path / "float.onnx")
        for key in ("activation_type", "weight_type"):
            if key in options:
                options[key] = QuantType[options[key]]
        with _silent():
            quantize_static(tmp_path / "float.onnx", tmp_path / "qdq.onnx", Reader(), **options)
        return onnx.load(tmp_path / "qdq.onnx")

    return quantize


def test_its_default_is_caught(quantize_static):
    assert {"bias-int32", "zero-point-not-zero"} <= codes(lint(quantize_static()).errors)


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_its_symmetric_variant_is_mended(quantize_static, kind, per_channel):
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    weights = "QInt8" if per_channel else kind
    proto = quantize_static(activation_type=kind, weight_type=weights, per_channel=per_channel, extra_options=symmetric)
    assert "bias-int32" in codes(lint(proto).errors)
    result = mend(proto)
    assert lint(result.model).errors == ()
    np.testing.assert_allclose(run(result.model), run(proto), rtol=1e-4, atol=1e-5)


def test_its_mended_symmetric_variant_is_built_by_tensorrt_rtx(quantize_static):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'qdq-surgeon[rtx]'")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'qdq-surgeon[rtx]'")
    from qdq_surgeon.tensorrt.engine import EngineError, build

    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    proto = quantize_static(activation_type="QInt8", weight_type="QInt8", per_channel=True, extra_options=symmetric)
    with pytest.raises(EngineError):
        build(onnx.shape_inference.infer_shapes(proto), backend="tensorrt-rtx")
    engine = build(onnx.shape_inference.infer_shapes(mend(proto).model), backend="tensorrt-rtx")
    assert any(layer.computes_int8(1) for layer in engine.layers)


def test_mended_models_are_mended():
    result = mend(conv(z=np.uint8(128)))
    again = mend(result.model)
    assert again.done == ()
    assert again.model == result.model


def test_every_kind_of_source(tmp_path):
    proto = conv(z=np.uint8(128))
    onnx.save(proto, tmp_path / "model.onnx")
    assert mend(tmp_path / "model.onnx").model == mend(qdq_surgeon.load(proto)).model == mend(proto).model
