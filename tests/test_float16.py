"""FP16 around the pairs, against NumPy, onnx's checker, onnxruntime and a TensorRT-RTX build."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

import qdq_surgeon
from qdq_surgeon.errors import ModelError
from qdq_surgeon.float16 import half_scale, to_float16
from tests.graphs import model

DIGITS = Path(__file__).parent / "models" / "digits.onnx"
TEST_SET = DIGITS.with_name("digits_test.npz")

CONV = """g (float[1,16,8,8] x) => (float[1,16,8,8] y) <float[16,16,3,3] w, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    y = Sigmoid(c)
}"""

CHAIN = """g (float[1,16,8,8] x) => (float[1,16,8,8] y) <float[16,16,3,3] w, float[16,16,3,3] v> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    d = Conv<pads=[1,1,1,1]>(c, v)
    y = Sigmoid(d)
}"""

RESIZE = """g (float[1,16,8,8] x) => (float[1,16,10,10] y) <float[16,16,1,1] w, float[4] sizes = {1, 1, 1.3, 1.3}> {
    c = Conv(x, w)
    y = Resize<mode="linear">(c, , sizes)
}"""

SIZES = """g (float[1,N] x) => (float[1,N] y) {
    s = Shape(x)
    f = Cast<to=1>(s)
    r = ReduceProd(f)
    y = Mul(x, r)
}"""

BRANCH = """g (float[1,16] x, bool choice) => (float[1,16] y) {
    a = Abs(x)
    y = If(choice) <
        then_branch = t () => (float[1,16] p) { p = Exp(a) },
        else_branch = e () => (float[1,16] q) { m = Max(a, x)  q = Exp(m) }
    >
}"""


# ---- types -------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_stay_fp32_and_everything_between_is_fp16():
    half = converted(CONV)
    assert [value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)] == [1, 1]
    types = inferred(half)
    assert {types[name] for name in ("x_dequantized", "w_dequantized", "c")} == {TensorProto.FLOAT16}
    assert {types[name] for name in ("w", "b")} == {TensorProto.FLOAT16}


def test_inputs_and_outputs_are_fp16_on_demand():
    half = to_float16(quantized(CONV), float16_io=True).model
    assert [value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)] == [10, 10]
    assert "Cast" not in ops(half)


def test_no_cast_stands_before_q_or_behind_dq():
    """Q reads the FP32 input with an FP32 scale, DQ writes FP16 with the same number as an FP16 scale."""
    half = converted(CONV)
    nodes = {node.output[0]: node for node in half.graph.node}
    assert ops(half).count("Cast") == 1
    assert nodes["x_quantized"].input[0] == "x"
    q, dq = (constant(half, nodes[name].input[1]) for name in ("x_quantized", "x_dequantized"))
    assert (q.dtype, dq.dtype) == (np.float32, np.float16)
    assert q == dq


def test_zero_points_stay_int8():
    half = converted(CONV)
    zero_points = {node.input[2] for node in half.graph.node if node.op_type == "QuantizeLinear"}
    assert {constant(half, name).dtype for name in zero_points} == {np.dtype(np.int8)}


def test_the_scales_of_a_resize_stay_fp32_and_exact():
    half = converted(RESIZE)
    (resize,) = (node for node in half.graph.node if node.op_type == "Resize")
    np.testing.assert_array_equal(constant(half, resize.input[2]), np.asarray([1, 1, 1.3, 1.3], np.float32))


def test_float_attributes_and_default_values_become_fp16_too():
    half = converted("""g (float[4] x, int64[1] n) => (float[4] y) {
        a = Constant<value_float=2.5>()
        b = ConstantOfShape(n)
        c = Mul(x, a)
        y = Add(c, b)
    }""")
    (y,) = run(half, x=np.ones(4, np.float32), n=np.asarray([4]))
    np.testing.assert_array_equal(y, np.full(4, 2.5, np.float32))


def test_an_output_that_others_read_is_cast_once():
    half = converted("g (float[4] x) => (float[4] y, float[4] z) { y = Abs(x)  z = Exp(y) }")
    y, _ = run(half, x=np.asarray([-1, 2, 3, 4], np.float32))
    np.testing.assert_array_equal(y, [1, 2, 3, 4])
    assert ops(half).count("Cast") == 3


def test_a_fp16_model_keeps_what_it_is():
    half = converted("g (float16[4] x) => (float16[4] y) { y = Abs(x) }", opset=19)
    assert ops(half) == ["Abs"]


# ---- scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 2.0**-14, 0.001, 0.1, 1.0, 3.3, 500.0])
def test_scales_are_rounded_up_and_never_below_the_smallest_normal_number(scale):
    half = half_scale(np.asarray(scale, np.float32))
    exact = max(np.float32(scale), 2.0**-14)
    assert half.dtype == np.float16
    assert half >= exact
    assert np.nextafter(half, np.float16(0)) < exact


def test_an_activation_whose_scale_is_raised_is_named():
    proto = quantized(CONV)
    set_constant(proto, "x_scale", np.asarray(1e-6, np.float32))
    assert to_float16(proto).raised == ("x: scale 1e-06 raised to 6.1e-05",)


# ---- what FP16 cannot hold ---------------------------------------------------------------------------------


def test_a_known_range_above_65504_keeps_its_nodes_fp32():
    result = to_float16(quantized(CHAIN), ranges={"c": 1e5})
    types = inferred(result.model)
    assert (types["c"], types["d"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    assert result.kept == ("Conv c: 'c' reaches 1e+05, above FP16's 65504",)


def test_a_pair_that_reaches_beyond_65504_keeps_its_readers_fp32():
    proto = quantized(CHAIN)
    set_constant(proto, "c_scale", np.asarray(1000, np.float32))
    result = to_float16(proto)
    types = inferred(result.model)
    assert {types[name] for name in ("c", "c_dequantized", "v_dequantized", "d")} == {TensorProto.FLOAT}
    assert types["x_dequantized"] == TensorProto.FLOAT
    assert len(result.kept) == 2


def test_a_large_constant_keeps_its_node_fp32_and_what_may_be_as_large():
    text = "g (float[4] x) => (float[4] y) <float big = {-3.0e38}> { a = Mul(x, big)  b = Add(a, x)  y = Softmax(b) }"
    result = to_float16(model(text))
    assert [line.split(":")[0] for line in result.kept] == ["Mul a", "Add b", "Softmax y"]
    x = np.asarray([1, 1, 1, 1], np.float32)
    np.testing.assert_allclose(run(result.model, x=x)[0], run(model(text), x=x)[0], rtol=1e-3)


def test_a_known_range_stops_what_may_be_large():
    text = "g (float[4] x) => (float[4] y) <float big = {1e5}> { a = Mul(x, big)  b = Mul(a, x)  y = Softmax(b) }"
    result = to_float16(model(text), ranges={"a": 100.0})
    assert [line.split(":")[0] for line in result.kept] == ["Mul a"]


def test_a_constant_that_is_read_in_both_types_stands_twice():
    text = (
        "g (float[2] x) => (float[2] y) <float[2] k = {0.1, 0.2}> { a = Mul(x, k)  b = CumSum(k, axis)  y = Add(a, b) }"
    )
    half = converted(text.replace("> {", ", int64 axis = {0}> {"))
    assert constant(half, "k").dtype == np.float32
    assert constant(half, "k_fp16").dtype == np.float16


def test_a_dq_that_is_read_in_both_types_stands_twice():
    proto = quantized("""g (float[1,16,8,8] x) => (float[1,16,8,8] y, float[1,16,8,8] z)
    <float[16,16,1,1] w, float[16,16,1,1] v> { y = Conv(x, w)  z = Conv(x, v) }""")
    half = to_float16(proto, ranges={"z": 1e5}).model
    types = inferred(half)
    assert (types["x_dequantized"], types["x_dequantized_fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    assert ops(half).count("Cast") == 1


def test_arithmetic_on_sizes_stays_fp32():
    result = to_float16(model(SIZES))
    assert [line.split(":")[0] for line in result.kept] == ["Cast f", "ReduceProd r"]
    (y,) = run(result.model, x=np.ones((1, 2049), np.float32))
    assert y.shape == (1, 2049)


def test_what_the_converter_blocks_is_reported():
    result = to_float16(model("g (float[4] x, float[4] z) => (float[4] y) { a = Max(x, z)  y = Exp(a) }"))
    assert result.kept == ("Max a: onnxruntime's converter keeps this operator FP32",)
    assert inferred(result.model)["a"] == TensorProto.FLOAT


def test_bodies_of_control_flow_become_fp16_and_keep_what_must_stay():
    half = converted(BRANCH)
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    for choice in (True, False):
        (y,) = run(half, x=x, choice=np.asarray(choice))
        np.testing.assert_allclose(y, np.exp(np.abs(x)), rtol=2e-3)


def test_an_operator_that_onnx_does_not_know_stays_fp32():
    text = """<ir_version: 8, opset_import: ["" : 19, "my" : 1]>
    g (float[4] x) => (float[4] y) <float[4] a> { a = my.Op(x)  y = Abs(a) }"""
    proto = onnx.parser.parse_model(text)
    assert to_float16(proto).kept == ("Op a: onnx does not know this operator, nor whether it takes FP16",)
    proto.graph.node[1].CopyFrom(onnx.helper.make_node("Cast", ["a"], ["y"], to=1))
    del proto.graph.value_info[:]
    with pytest.raises(ModelError, match=r"Op a: .* declare it in the graph's value_info"):
        to_float16(proto)


# ---- the user's things -------------------------------------------------------------------------------------


def test_the_opset_is_raised_and_the_input_is_left_alone():
    proto = quantized(CONV, opset=13)
    before = proto.SerializeToString(deterministic=True)
    half = to_float16(proto).model
    assert half.opset_import[0].version == 19
    assert proto.SerializeToString(deterministic=True) == before


def test_names_doc_strings_and_metadata_survive():
    proto = model(CONV)
    node = proto.graph.node[0]
    node.name, node.doc_string = "my conv", "what it does"
    node.metadata_props.add(key="mine", value="yes")
    proto.metadata_props.add(key="author", value="me")
    proto.doc_string = "a model"
    before = quantize(proto)
    half = to_float16(before).model
    kept = next(node for node in half.graph.node if node.name == "my conv")
    assert (kept.doc_string, kept.metadata_props[0].value) == ("what it does", "yes")
    assert (half.doc_string, half.metadata_props) == (before.doc_string, before.metadata_props)
    assert [node.name for node in half.graph.node if node.op_type != "Cast"] == [n.name for n in before.graph.node]


# ---- the whole model ---------------------------------------------------------------------------------------


def test_the_digits_model_answers_as_before():
    qdq = quantize(DIGITS)
    half = to_float16(qdq).model
    data = np.load(TEST_SET)
    feed = {qdq.graph.input[0].name: data[data.files[0]]}
    expected, actual = run(qdq, **feed)[0], run(half, **feed)[0]
    noise = np.sum((expected - actual) ** 2)
    assert 10 * np.log10(np.sum(expected**2) / noise) > 30
    assert np.mean(expected.argmax(1) == actual.argmax(1)) > 0.99
    assert half.ByteSize() < 0.6 * qdq.ByteSize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("float16_io", [False, True])
def test_tensorrt_computes_as_many_convolutions_in_int8_as_before(float16_io):
    pytest.importorskip("tensorrt_rtx")
    qdq = quantize(DIGITS)
    assert int8_kernels(to_float16(qdq, float16_io=float16_io).model) == int8_kernels(qdq) > 0


# ---- helpers -----------------------------------------------------------------------------------------------


def quantize(source: ModelProto | Path) -> ModelProto:
    return qdq_surgeon.quantize(source, samples=2, compare=False).model


def quantized(text: str, opset: int = 17) -> ModelProto:
    return quantize(model(text, opset))


def converted(text: str, opset: int = 17) -> ModelProto:
    """In FP16, quantized first where there is a Conv, and valid."""
    half = to_float16(quantized(text, opset) if "Conv" in text else model(text, opset)).model
    onnx.checker.check_model(half, full_check=True)
    return half


def ops(proto: ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def inferred(proto: ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def constant(proto: ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == name)


def set_constant(proto: ModelProto, name: str, value: np.ndarray) -> None:
    next(t for t in proto.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(value, name))


def int8_kernels(proto: ModelProto) -> int:
    """The layers of a TensorRT-RTX engine, built on the CPU, that read INT8 data and INT8 weights."""
    from qdq_surgeon.tensorrt.engine import build

    layers = build(proto, backend="tensorrt-rtx").layers
    return sum(all("int8" in {t.type for t in side} for side in (x.inputs, x.constants)) for x in layers)


def run(proto: ModelProto, **feed: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    disabled = ["WeightBiasQuantization"]
    session = ort.InferenceSession(
        proto.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=disabled
    )
    return session.run(None, feed)


def test_what_overflows_between_the_pairs_stays_fp32_too():
    """Squares inside a norm exceed FP16 where no pair stands; onnxruntime on the CPU would not show it."""
    import qdq_surgeon
    from tests.graphs import model

    net = """g (float[N,32] x) => (y) <float[32,32] w, float[32,32] v> {
      h = MatMul(x, w) s = Mul(h, h) m = ReduceMean<axes=[1]>(s) r = Sqrt(m) d = Div(h, r) y = MatMul(d, v)
    }"""
    data = {"x": (1e4 * np.random.default_rng(0).standard_normal((32, 32))).astype(np.float32)}
    result = qdq_surgeon.quantize(model(net), data, float16=True)
    assert any("Mul" in note and "65504" in note for note in result.notes)
