"""Scales against NumPy: amax / 127 of the weight's channel, or of all values that share the scale."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.counting import Accumulator
from qdq_surgeon.calibration.statistics import Origin, Statistics
from qdq_surgeon.errors import DataError, ModelError, PlanError, QdqError
from qdq_surgeon.scales import tensors_to_calibrate, to_scale
from tests.graphs import model

WEIGHTED = """g (float[N,16,8,8] x, float[N,32] v) => (a, b, c, d, e, f)
<float[24,16,3,3] conv, float[16,24,3,3] turned, float[24,32] rows, float[32,24] columns,
 float[32,20] last, float[20,32] left>
{
    a = Conv(x, conv)
    b = ConvTranspose(x, turned)
    c = Gemm<transB=1>(v, rows)
    d = Gemm(v, columns)
    e = MatMul(v, last)
    t = Transpose(v)
    f = MatMul(left, t)
}"""

CONV = "g (float[N,16,8,8] x) => (y) <float[16,16,3,3] w> { y = Conv(x, w) }"

MOVED = """g (float[N,16,8,8] x) => (y) <float[16,16,3,3] w, int64[4] shape = {-1, 16, 4, 4}> {
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
    t = Transpose<perm=[0,1,3,2]>(p)
    r = Reshape(t, shape)
    y = Conv(r, w)
}"""

CONCAT = """g (float[N,16,8,8] a, float[N,16,8,8] b) => (z) <float[16,32,3,3] w> {
    y = Concat<axis=1>(a, b)
    z = Conv(y, w)
}"""

TWO_CONCATS = """g (float[N,16,8,8] a, float[N,16,8,8] b, float[N,16,8,8] c) => (z1, z2)
<float[16,32,3,3] w1, float[16,32,3,3] w2> {
    y1 = Concat<axis=1>(a, b)
    y2 = Concat<axis=1>(b, c)
    z1 = Conv(y1, w1)
    z2 = Conv(y2, w2)
}"""


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channel_axis"),
    [("conv", 0), ("rows", 0), ("columns", 1), ("last", 1), ("left", 0), ("turned", None)],
)
def test_a_weight_has_one_scale_per_output_channel(name, channel_axis):
    """None for ConvTranspose: one scale for all of it."""
    proto = model(WEIGHTED)
    value = weight(proto, name)
    channels = value.reshape(1, -1) if channel_axis is None else np.moveaxis(value, channel_axis, 0)
    expected = [np.abs(channel).max() / 127 for channel in channels]
    scale = chosen(proto)[name]
    assert scale.shape == (() if channel_axis is None else (len(expected),))
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale.reshape(-1), expected, rtol=1e-7)


def test_a_weight_read_along_both_axes_has_both_kinds_of_scales():
    proto = model("g (float[N,32] x) => (y, z) <float[32,32] w> { y = MatMul(x, w)\n z = Gemm<transB=1>(x, w) }")
    plan = qdq_surgeon.plan(proto)
    scales = qdq_surgeon.choose(proto, plan, statistics(proto, plan))
    value = np.abs(weight(proto, "w"))
    np.testing.assert_allclose(scales.values["w", 1], value.max(0) / 127, rtol=1e-7)
    np.testing.assert_allclose(scales.values["w", 0], value.max(1) / 127, rtol=1e-7)


def test_a_dead_channel_has_scale_1():
    proto = model(CONV)
    value = weight(proto, "w")
    value[3] = 0
    set_weight(proto, "w", value)
    scale = chosen(proto)["w"]
    assert scale[3] == 1
    np.testing.assert_allclose(np.delete(scale, 3), np.delete(np.abs(value).max((1, 2, 3)), 3) / 127, rtol=1e-7)


def test_a_weight_of_zeros_has_scale_1_everywhere():
    proto = model(CONV)
    set_weight(proto, "w", np.zeros((16, 16, 3, 3), np.float32))
    np.testing.assert_array_equal(chosen(proto)["w"], np.ones(16, np.float32))


def test_a_tensor_of_zeros_has_scale_1():
    assert chosen(model(CONV), x=np.zeros(10))["x"] == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_broken_weight_is_refused(poison):
    proto = model(CONV)
    value = weight(proto, "w")
    value[0, 0, 0, 0] = poison
    set_weight(proto, "w", value)
    with pytest.raises(ModelError, match="the weight 'w' holds NaN or infinity"):
        chosen(proto)


def test_a_weight_made_by_other_constants_is_computed():
    proto = model("g (float[N,32] x) => (y) <float[24,32] w> { t = Transpose(w)\n y = MatMul(x, t) }")
    np.testing.assert_allclose(chosen(proto)["t"], np.abs(weight(proto, "w")).max(1) / 127, rtol=1e-7)


# ---- the number itself -------------------------------------------------------------------------------------

HALVES = [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("element_type", "dtype"), HALVES)
@given(amax=st.floats(2.0**-30, 65504))
def test_half_precision_scales_are_rounded_up_by_less_than_one_step(element_type, dtype, amax):
    """`nextafter` gives the half-precision number below; that one would make amax saturate."""
    scale = to_scale(np.asarray(amax), element_type)
    exact = max(amax / 127, float(ml_dtypes.finfo(dtype).smallest_normal))
    assert scale.dtype == dtype
    assert float(scale) >= exact
    assert float(np.nextafter(scale, dtype(0))) < exact


@given(amax=st.floats(1e-30, 1e38))
def test_fp32_scales_are_the_nearest_number(amax):
    assert to_scale(np.asarray(amax), TensorProto.FLOAT) == np.float32(amax / 127)


@pytest.mark.parametrize(
    ("element_type", "least"),
    [(TensorProto.FLOAT16, 2.0**-14), (TensorProto.BFLOAT16, 2.0**-126), (TensorProto.FLOAT, 2.0**-126)],
)
def test_scales_never_fall_below_the_smallest_normal_number(element_type, least):
    assert float(to_scale(np.asarray(1e-44), element_type)) == least


def test_an_fp16_model_gets_fp16_scales_for_data_and_weights():
    proto = model("g (float16[N,32] x) => (y) <float16[32,24] w> { y = MatMul(x, w) }", opset=19)
    scales = chosen(proto, x=[3.0])
    exact = np.abs(weight(proto, "w").astype(np.float64)).max(0) / 127
    assert scales["x"].dtype == scales["w"].dtype == np.float16
    assert np.all(scales["w"].astype(np.float64) >= exact)
    np.testing.assert_allclose(scales["w"].astype(np.float64), exact, rtol=2.0**-10)


# ---- activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[-3.0, 1.0], [0.0, 6.0], [-1e-6]])
def test_an_activation_has_the_largest_absolute_value_over_127(values):
    assert chosen(model(CONV), x=values)["x"] == np.float32(np.abs(np.float32(values)).max() / 127)


def test_the_method_decides_the_range():
    values = np.append(np.random.default_rng(0).uniform(-1, 1, 10_000), 100.0)
    plan = qdq_surgeon.plan(model(CONV))
    found = statistics(model(CONV), plan, x=values)
    at = {m: float(qdq_surgeon.choose(model(CONV), plan, found, m).values["x", None]) for m in ("max", "percentile:99")}
    assert at["max"] == pytest.approx(100 / 127)
    assert at["percentile:99"] == pytest.approx(np.percentile(np.abs(values), 99) / 127, rel=2**-7)


def test_data_movement_keeps_the_scale():
    proto = model(MOVED)
    scales = chosen(proto, x=[-5.0, 2.0])
    assert scales["r"] == scales["x"] == np.float32(5 / 127)
    assert tensors_to_calibrate(qdq_surgeon.plan(proto)) == ("x",)


# ---- one scale for several tensors -------------------------------------------------------------------------


def test_concat_inputs_and_output_share_the_scale_of_all_their_values():
    scales = chosen(model(CONCAT), a=[1.0], b=[-3.9], y=[1.0, -3.9])
    assert scales["a"] == scales["b"] == scales["y"] == np.float32(3.9 / 127)


def test_a_concat_of_ranges_too_far_apart_goes_back_to_float_and_says_by_what_factor():
    proto = model(CONCAT)
    plan = qdq_surgeon.plan(proto)
    scales = qdq_surgeon.choose(proto, plan, statistics(proto, plan, a=[1.0], b=[5.0], y=[1.0, 5.0]), "max")
    assert {str(edge) for edge in scales.dropped} == {"Concat y[0]", "Concat y[1]"}
    for reason in scales.dropped.values():
        assert "differ by a factor of 5, more than 4" in reason
    assert scales.values["y", None] == np.float32(5 / 127)


def test_ranges_exactly_at_the_limit_may_share():
    scales = chosen(model(CONCAT), a=[1.0], b=[4.0], y=[4.0])
    assert scales["a"] == scales["b"] == np.float32(4 / 127)


def test_an_input_of_zeros_shares_with_anything():
    scales = chosen(model(CONCAT), a=[0.0], b=[50.0], y=[50.0])
    assert scales["a"] == scales["b"] == np.float32(50 / 127)


def test_two_concats_with_a_tensor_in_common_share_one_scale():
    scales = chosen(model(TWO_CONCATS), a=[1.0], b=[2.0], c=[3.0], y1=[2.0], y2=[3.0])
    assert {float(scales[name]) for name in ("a", "b", "c", "y1", "y2")} == {float(np.float32(3 / 127))}


def test_of_two_concats_the_one_that_would_stretch_the_shared_range_too_far_goes_back_to_float():
    proto = model(TWO_CONCATS)
    plan = qdq_surgeon.plan(proto)
    found = statistics(proto, plan, a=[3.0], b=[1.0], c=[9.0], y1=[3.0], y2=[9.0])
    scales = qdq_surgeon.choose(proto, plan, found, "max")
    assert {str(edge) for edge in scales.dropped} == {"Concat y2[0]", "Concat y2[1]"}
    assert scales.values["a", None] == scales.values["b", None] == np.float32(3 / 127)


# ---- ranges known without data -----------------------------------------------------------------------------

SIGMOID_RANGE = """
[[rule]]
name     = "behind-sigmoid"
match    = "Conv(s := Sigmoid(x), w)"
quantize = ["s", "w"]
axis     = { w = 0 }
range    = { s = [LOW, HIGH] }
because  = "A sigmoid ends at 1."

[[rule]]
include = "tensorrt"
"""

SIGMOID = "g (float[N,16,8,8] x) => (y) <float[16,16,3,3] w> { s = Sigmoid(x)\n y = Conv(s, w) }"
SIGMOIDS = """g (float[N,16,8,8] a, float[N,16,8,8] x) => (z, u) <float[16,32,3,3] w, float[16,16,3,3] v> {
    s = Sigmoid(x)
    y = Concat<axis=1>(a, s)
    z = Conv(y, w)
    u = Conv(s, v)
}"""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2, 1), (-0.5, 0.25)])
def test_a_known_range_wins_over_a_calibrated_one(low, high, tmp_path):
    scales = chosen(model(SIGMOID), placement=sigmoid_rules(tmp_path, low, high), s=[0.3, 0.7])
    assert scales["s"] == np.float32(max(abs(low), abs(high)) / 127)


def test_a_known_range_wins_for_all_that_share_it(tmp_path):
    scales = chosen(model(SIGMOIDS), placement=sigmoid_rules(tmp_path, 0, 1), a=[1.5], s=[0.5], y=[1.5])
    assert scales["a"] == scales["s"] == scales["y"] == np.float32(1 / 127)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_statistics_of_another_model_are_refused():
    plan = qdq_surgeon.plan(model(CONV))
    other = model(CONV)
    set_weight(other, "w", np.ones((16, 16, 3, 3), np.float32))
    with pytest.raises(PlanError, match="another model"):
        qdq_surgeon.choose(model(CONV), plan, statistics(other, plan, x=[1.0]))


def test_statistics_without_a_tensor_of_the_plan_are_refused():
    proto = model(CONV)
    with pytest.raises(PlanError, match="lack the tensor 'x'"):
        qdq_surgeon.choose(proto, qdq_surgeon.plan(proto), made_statistics(proto, {}))


def test_a_tensor_that_was_never_finite_is_refused():
    with pytest.raises(DataError, match="'x' never held a finite number"):
        chosen(model(CONV), x=[np.nan, np.inf])


def test_what_reads_a_tensor_that_was_always_empty_stays_float():
    proto = model(
        "g (float[N,32] x) => (y, z) <float[32,32] w, float[32,32] v> { y = MatMul(x, w)\n z = MatMul(y, v) }"
    )
    plan = qdq_surgeon.plan(proto)
    scales = qdq_surgeon.choose(proto, plan, statistics(proto, plan, x=[], y=[2.0]), "max")
    assert {str(edge): reason for edge, reason in scales.dropped.items()} == {
        "MatMul y[0]": "what it reads was empty in every calibration sample",
        "MatMul y[1]": "what it reads was empty in every calibration sample",
    }
    assert {site.tensor for site in scales.sites(plan)} == {"y", "v"}
    assert scales.values["y", None] == np.float32(2 / 127)


def test_a_detector_that_found_nothing_is_quantized_without_what_reads_its_findings():
    proto = model("""g (float[N,32] x) => (y, z) <float[32,32] w, float[32,32] v, float lim = {1000}> {
        m = ReduceMax<axes=[1], keepdims=0>(x)
        found = Greater(m, lim)
        k = Compress<axis=0>(x, found)
        y = MatMul(k, w)
        z = MatMul(x, v)
    }""")
    result = qdq_surgeon.quantize(proto, {"x": np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)})
    inputs = {node.output[0]: list(node.input) for node in result.model.graph.node}
    assert inputs["y"] == ["k", "w"]
    assert inputs["z"] == ["x_dequantized", "v_dequantized"]


def test_an_unknown_method_is_refused():
    proto = model(CONV)
    plan = qdq_surgeon.plan(proto)
    with pytest.raises(QdqError, match="'max'"):
        qdq_surgeon.choose(proto, plan, statistics(proto, plan), "maxx")


# ---- helpers -----------------------------------------------------------------------------------------------


def chosen(proto, placement="tensorrt", **values):
    """Scales by tensor under method max, of a model whose activations take the given values (default: 1)."""
    plan = qdq_surgeon.plan(proto, placement=placement)
    scales = qdq_surgeon.choose(proto, plan, statistics(proto, plan, **values), "max")
    return {tensor: scale for (tensor, _), scale in scales.values.items()}


def statistics(proto, plan, **values):
    return made_statistics(proto, {name: values.get(name, [1.0]) for name in tensors_to_calibrate(plan)})


def made_statistics(proto, values):
    tensors = {}
    for name, numbers in values.items():
        accumulator = Accumulator()
        accumulator.add(np.asarray(numbers, np.float32))
        tensors[name] = accumulator.result()
    return Statistics(tensors, qdq_surgeon.load(proto).digest, Origin(("a test",), "", 1))


def sigmoid_rules(folder, low, high):
    path = folder / "rules.toml"
    path.write_text(SIGMOID_RANGE.replace("LOW", str(low)).replace("HIGH", str(high)))
    return path


def weight(proto, name):
    (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(found).copy()


def set_weight(proto, name, value):
    (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    found.CopyFrom(numpy_helper.from_array(value, name))
