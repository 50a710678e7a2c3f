"""Weights stored as integers: the same numbers as pairs in onnxruntime, a quarter of the file, no float left over."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.errors import QdqError
from qdq_surgeon.existing import graphs_of, strip_pairs
from qdq_surgeon.stored import store_weights
from tests.graphs import model, typed
from tests.refinement.nets import WITH_IF, WITH_LOOP, rows

DIGITS = Path(__file__).parent / "models" / "digits.onnx"
CALIBRATION = DIGITS.with_name("digits_calibration.npz")
TEST_SET = DIGITS.with_name("digits_test.npz")

NET = """g (float[N,16,8,8] x) => (float[N,32] y)
<float[16,16,3,3] w1, float[16] b1, float[32,1024] w2, float[32,32] w3> {
    c = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(c)
    f = Flatten(r)
    g = Gemm<transB=1>(f, w2)
    y = MatMul(g, w3)
}"""


def both(text_or_proto, x, opset=17, **options):
    """The model with pairs, and the same with its weights as integers."""
    proto = model(text_or_proto, opset) if isinstance(text_or_proto, str) else text_or_proto
    return tuple(
        qdq_surgeon.quantize(proto, {"x": x}, compare=False, weights=weights, **options).model
        for weights in ("pairs", "int8")
    )


def quantizers_of_constants(proto):
    """The QuantizeLinear nodes, in any body, that read an initializer or a Constant."""
    constants = {
        name
        for _, graph in graphs_of(proto.graph)
        for name in (
            *(tensor.name for tensor in graph.initializer),
            *(node.output[0] for node in graph.node if node.op_type == "Constant"),
        )
    }
    nodes = [node for _, graph in graphs_of(proto.graph) for node in graph.node]
    return [node.input[0] for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] in constants]


def floats_left(proto, more_than=64):
    """The float initializers, in any body, too large for a scale or a bias."""
    tensors = [tensor for _, graph in graphs_of(proto.graph) for tensor in graph.initializer]
    return [t.name for t in tensors if t.data_type in (1, 10, 16) and np.prod(t.dims) > more_than]


def integers(proto):
    """The INT8 and UINT8 initializers by name, in any body."""
    tensors = [tensor for _, graph in graphs_of(proto.graph) for tensor in graph.initializer]
    return {t.name: numpy_helper.to_array(t) for t in tensors if t.data_type in (2, 3)}


def outputs(proto, **feed):
    session = Session(proto, simulate=True)
    return session.run(Batch(feed, 1), session.outputs)[0]


def check_same(pairs, stored, **feed):
    """Bit for bit: the outputs, and the integers as onnxruntime's own QuantizeLinear makes them."""
    onnx.checker.check_model(stored, full_check=True)
    for left, right in zip(outputs(pairs, **feed), outputs(stored, **feed), strict=True):
        np.testing.assert_array_equal(left, right)
    names = {node.output[0] for node in pairs.graph.node if node.op_type == "QuantizeLinear"}
    found = {name: values for name, values in integers(stored).items() if name in names}
    for name, values in tapped(pairs, list(found), **feed).items():
        assert values.dtype == found[name].dtype
        np.testing.assert_array_equal(values, found[name])


def tapped(proto, names, **feed):
    """Tensors of the top graph, run as the graph stands."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name in names:
        copy.graph.output.add(name=name)
    session = Session(copy, as_is=True)
    return dict(zip(names, session.run(Batch(feed, 1), names)[0], strict=True)) if names else {}


# ---- our own pairs ----------------------------------------------------------------------------------------------


def test_the_same_numbers_without_a_float_weight():
    x = rows(8, 16, 8, 8)
    pairs, stored = both(NET, x)
    check_same(pairs, stored, x=x)
    assert (quantizers_of_constants(stored), floats_left(stored)) == ([], [])
    assert len(quantizers_of_constants(pairs)) == 3
    assert {name for name in integers(stored) if name.startswith("w") and "zero" not in name} == {
        "w1_quantized",
        "w2_quantized",
        "w3_quantized",
    }


def test_the_integers_are_numpys():
    _, stored = both(NET, rows(8, 16, 8, 8))
    values = numpy_helper.to_array(next(t for t in model(NET).graph.initializer if t.name == "w2"))
    scales = (np.abs(values).max(1) / np.float64(127)).astype(np.float32)
    np.testing.assert_array_equal(integers(stored)["w2_quantized"], np.rint(values / scales[:, None]))


def digits(**options):
    made = (
        qdq_surgeon.quantize(DIGITS, CALIBRATION, compare=False, weights=weights, **options).model
        for weights in ("pairs", "int8")
    )
    return tuple(made)


def test_a_quarter_of_the_file():
    pairs, stored = digits()
    weights = sum(4 * np.prod(t.dims) for t in onnx.load(DIGITS).graph.initializer if len(t.dims) > 1)
    assert pairs.ByteSize() - stored.ByteSize() == pytest.approx(0.75 * weights, rel=0.1)


def testdigits():
    pairs, stored = digits()
    check_same(pairs, stored, image=np.load(TEST_SET)["image"][:50])


def test_only_the_weights_nodes_change():
    x = rows(8, 16, 8, 8)
    pairs, stored = both(NET, x)
    before = [node for node in pairs.graph.node if node.input[0] not in ("w1", "w2", "w3")]
    assert list(stored.graph.node) == before
    assert list(stored.graph.input) == list(pairs.graph.input)
    assert list(stored.metadata_props) == list(pairs.metadata_props)


def test_the_model_given_is_not_touched():
    pairs, _ = both(NET, rows(8, 16, 8, 8))
    before = pairs.SerializeToString()
    store_weights(pairs)
    assert pairs.SerializeToString() == before


def test_twice_is_once():
    _, stored = both(NET, rows(8, 16, 8, 8))
    assert store_weights(stored) == stored


def test_strip_gives_the_dequantized_floats():
    x = rows(8, 16, 8, 8)
    _, stored = both(NET, x)
    floats = strip_pairs(stored)
    assert not any("Linear" in node.op_type for node in floats.graph.node)
    found = {t.name: numpy_helper.to_array(t) for t in floats.graph.initializer}
    original = {t.name: numpy_helper.to_array(t) for t in model(NET).graph.initializer}
    scale = np.abs(original["w2"]).max(1, keepdims=True).astype(np.float64) / 127
    np.testing.assert_allclose(found["w2_dequantized"], np.rint(original["w2"] / scale) * scale, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(found["b1"], original["b1"])


def test_the_result_reads_as_fully_quantized():
    """Another insert finds nothing to add, and the plan counts the weights as quantized."""
    _, stored = both(NET, rows(8, 16, 8, 8))
    assert not qdq_surgeon.plan(stored).adds_pairs


def test_gptq_and_bias_correction_go_with_it():
    x = rows(24, 16, 8, 8) * 0.3 + rows(24, 1, 8, 8, seed=1)
    pairs, stored = both(NET, x.astype(np.float32), gptq=True)
    check_same(pairs, stored, x=x.astype(np.float32))


def test_the_comparison_runs_what_is_written():
    x = rows(40, 16, 8, 8)
    results = [qdq_surgeon.quantize(model(NET), {"x": x}, weights=weights) for weights in ("pairs", "int8")]
    assert results[0].comparison.sqnr == results[1].comparison.sqnr


def test_a_way_to_store_that_there_is_not():
    with pytest.raises(QdqError, match="weights are stored as 'pairs' or 'int8', not 'int4'"):
        qdq_surgeon.quantize(model(NET), {"x": rows(8, 16, 8, 8)}, weights="int4")


# ---- where weights may lie --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [WITH_IF, WITH_LOOP], ids=["If", "Loop"])
def test_weights_that_bodies_read(text):
    x = rows(12, 16)
    pairs, stored = both(text, x)
    assert quantizers_of_constants(pairs)
    check_same(pairs, stored, x=x)
    assert quantizers_of_constants(stored) == []
    assert floats_left(stored) == []


INSIDE = """g (float[N,16] x) => (float[N,16] z) <bool yes = {1}> {
    z = If (yes) <
        then_branch = a () => (float[N,16] p) <float[16,16] w = {VALUES}> { p = MatMul(x, w) },
        else_branch = b () => (float[N,16] q) { q = Neg(x) }
    >
}"""


def test_weights_that_bodies_hold():
    values = ", ".join(f"{value:.5f}" for value in rows(16, 16).ravel())
    x = rows(12, 16)
    pairs, stored = both(INSIDE.replace("VALUES", values), x)
    assert quantizers_of_constants(pairs) == ["w"]
    check_same(pairs, stored, x=x)
    assert (quantizers_of_constants(stored), floats_left(stored)) == ([], [])


def test_a_weight_that_a_float_reader_needs_stays():
    text = """g (float[N,16] x) => (float[N,16] y, float[16,16] n) <float[16,16] w> {
        y = MatMul(x, w)
        n = Neg(w)
    }"""
    x = rows(8, 16)
    pairs, stored = both(text, x)
    check_same(pairs, stored, x=x)
    assert floats_left(stored) == ["w"]
    assert quantizers_of_constants(stored) == []


def test_a_weight_that_a_body_reads_in_float_stays():
    text = """g (float[N,16] x, bool c) => (float[N,16] y, float[16,16] n) <float[16,16] w> {
        y = MatMul(x, w)
        n = If (c) <
            then_branch = a () => (float[16,16] p) { p = Neg(w) },
            else_branch = b () => (float[16,16] q) { q = Abs(w) }
        >
    }"""
    proto, x = model(text), rows(8, 16)
    source = [{"x": x[i : i + 1], "c": np.array(i % 2 == 0)} for i in range(8)]
    pairs, stored = (
        qdq_surgeon.quantize(proto, source, compare=False, weights=weights).model for weights in ("pairs", "int8")
    )
    check_same(pairs, stored, x=x, c=np.array(True))
    assert floats_left(stored) == ["w"]


def test_a_weight_that_is_a_graph_output_stays():
    proto, x = model("g (float[N,16] x) => (float[N,16] y) <float[16,16] w> { y = MatMul(x, w) }"), rows(8, 16)
    proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 16]))
    pairs, stored = both(proto, x)
    check_same(pairs, stored, x=x)
    assert floats_left(stored) == ["w"]
    assert quantizers_of_constants(stored) == []


@pytest.mark.parametrize("op", ["Transpose<perm=[1,0]>(v)", "Identity(v)", "Cast<to=1>(v)"])
def test_a_computed_weight_goes_with_what_it_was_computed_from(op):
    text = f"g (float[N,16] x) => (float[N,16] y) <float[16,16] v> {{ w = {op}\n y = MatMul(x, w) }}"
    x = rows(8, 16)
    pairs, stored = both(text, x)
    check_same(pairs, stored, x=x)
    assert (floats_left(stored), [node.op_type for node in stored.graph.node]) == (
        [],
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"],
    )


def test_a_weight_in_a_constant_node_goes_with_it():
    proto = model("g (float[N,16] x) => (float[N,16] y) <float[16,16] w> { y = MatMul(x, w) }")
    (tensor,) = proto.graph.initializer
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(numpy_helper.to_array(tensor)))
    del proto.graph.initializer[:]
    proto.graph.node.insert(0, constant)
    x = rows(8, 16)
    pairs, stored = both(proto, x)
    check_same(pairs, stored, x=x)
    assert "Constant" not in [node.op_type for node in stored.graph.node]


def test_weights_listed_as_graph_inputs_are_no_inputs_any_more():
    proto = model(NET)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    x = rows(8, 16, 8, 8)
    pairs, stored = both(proto, x)
    check_same(pairs, stored, x=x)
    assert [value.name for value in stored.graph.input] == ["x", "b1"]


def test_weights_in_a_file_beside_the_model(tmp_path):
    onnx.save(model(NET), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    x = rows(8, 16, 8, 8)
    stored = qdq_surgeon.quantize(tmp_path / "m.onnx", {"x": x}, compare=False, weights="int8").model
    qdq_surgeon.save(stored, tmp_path / "q.onnx")
    _, expected = both(NET, x)
    for left, right in zip(outputs(onnx.load(tmp_path / "q.onnx"), x=x), outputs(expected, x=x), strict=True):
        np.testing.assert_array_equal(left, right)


# ---- FP16 -------------------------------------------------------------------------------------------------------


def test_fp16_around_the_pairs():
    x = rows(40, 16, 8, 8)
    pairs, stored = both(NET, x, float16=True)
    assert floats_left(stored) == []
    check_same(pairs, stored, x=x)


@pytest.mark.parametrize("seed", range(5))
def test_models_of_half_precision(seed):
    text = """g (float16[N,64] x) => (float16[N,64] y) <float16[64,64] w1, float16[64,64] w2> {
        h = MatMul(x, w1)
        y = MatMul(h, w2)
    }"""
    proto = model(text, 19)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(rows(64, 64, seed=seed).astype(np.float16), tensor.name))
    x = rows(8, 64).astype(np.float16)
    pairs, stored = both(proto, x)
    check_same(pairs, stored, x=x)


# ---- Q/DQ models of others --------------------------------------------------------------------------------------

W = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)


def foreign(opset=21, zero=None, scale=0.01, axis=None, weight=W, **attributes):
    """One MatMul whose weight another producer quantized: a zero point or none, attributes as they come."""
    scale = np.asarray(scale, np.float32)
    if axis is not None:
        attributes["axis"] = axis
    names = ["s"] + (["z"] if zero is not None else [])
    around = {key: value for key, value in attributes.items() if key in ("axis", "block_size")}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", *names], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", *names], ["d"], **around),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]
    if zero is not None:
        tensors.append(zero if isinstance(zero, TensorProto) else numpy_helper.from_array(np.asarray(zero), "z"))
    ends = [helper.make_tensor_value_info(name, 1, [None, 16]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


EIGHT_BITS = {
    "INT8": {"zero": np.int8(0)},
    "INT8 with a zero point": {"zero": np.int8(-5)},
    "UINT8": {"zero": np.uint8(128)},
    "no zero point, which means UINT8": {},
    "an output_dtype": {"output_dtype": TensorProto.INT8},
    "saturation": {"zero": np.int8(0), "scale": 0.002},
    "ties": {"zero": np.int8(0), "weight": (np.arange(256, dtype=np.float32).reshape(16, 16) - 128) / 2, "scale": 1.0},
    "axis by default": {"zero": np.zeros(16, np.int8), "scale": np.linspace(0.005, 0.02, 16)},
    "axis 0": {"zero": np.zeros(16, np.int8), "scale": np.linspace(0.005, 0.02, 16), "axis": 0},
    "a negative axis": {"zero": np.zeros(16, np.int8), "scale": np.linspace(0.005, 0.02, 16), "axis": -2},
    "zero points per channel": {"zero": np.arange(120, 136, dtype=np.uint8), "scale": np.linspace(0.005, 0.02, 16)},
    "one scale in brackets": {"zero": np.zeros(1, np.int8), "scale": [0.01]},
}


@pytest.mark.parametrize("case", EIGHT_BITS)
def test_eight_bits_of_any_producer(case):
    proto, x = foreign(**EIGHT_BITS[case]), rows(4, 16)
    stored = store_weights(proto)
    assert [node.op_type for node in stored.graph.node] == ["DequantizeLinear", "MatMul"]
    assert floats_left(stored) == []
    check_same(proto, stored, x=x)


def packed(kind):
    return helper.make_tensor("z", kind, [], [0])


OTHERS = {
    "INT4": {"zero": packed(TensorProto.INT4), "scale": 0.2},
    "FP8": {"zero": packed(TensorProto.FLOAT8E4M3FN)},
    "INT16": {"zero": np.int16(0)},
    "FP8 by output_dtype": {"output_dtype": TensorProto.FLOAT8E4M3FN},
    "blocks": {
        "zero": np.zeros((16, 4), np.int8),
        "scale": np.full((16, 4), 0.01),
        "axis": 1,
        "block_size": 4,
    },
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_eight_bits_per_channel_stays(case):
    proto = foreign(**OTHERS[case])
    assert store_weights(proto) == proto


def test_a_computed_scale_stays():
    proto = foreign(zero=np.int8(0))
    proto.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["s"], keepdims=0))
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name == "s"]:
        proto.graph.initializer.remove(tensor)
    assert store_weights(proto) == proto


def test_a_quantize_of_onnxruntimes_own_domain():
    proto = foreign(opset=17, zero=np.int8(0))
    for node in proto.graph.node[:2]:
        node.domain = "com.microsoft"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    stored = store_weights(proto)
    assert [node.op_type for node in stored.graph.node] == ["DequantizeLinear", "MatMul"]
    for left, right in zip(outputs(proto, x=rows(4, 16)), outputs(stored, x=rows(4, 16)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_one_quantize_for_two_dequantizes():
    proto = foreign(zero=np.int8(0))
    proto.graph.node.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d2"]))
    proto.graph.node.append(helper.make_node("MatMul", ["y", "d2"], ["v"]))
    proto.graph.output.append(helper.make_tensor_value_info("v", 1, [None, 16]))
    stored = store_weights(proto)
    assert [node.op_type for node in stored.graph.node].count("QuantizeLinear") == 0
    check_same(proto, stored, x=rows(4, 16))


def test_pairs_of_others_keep_their_data():
    """Activations' pairs stay whatever they are."""
    text = """g (float[N,16,8,8] x) => (float[N,16,6,6] y) <float s = {0.05}, uint8 z = {128}, float[16,16,3,3] w> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = Conv(d, w)
    }"""
    proto = model(text)
    assert store_weights(proto) == proto


# ---- TensorRT-RTX -----------------------------------------------------------------------------------------------


def test_tensorrt_runs_it_in_int8():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'qdq-surgeon[rtx]'")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'qdq-surgeon[rtx]'")
    from qdq_surgeon.tensorrt.audit import audit

    proto = typed("""g (float[1,16,16,16] x) => (y) <float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,4096] w3> {
        a = Conv<pads=[1,1,1,1]>(x, w1)
        b = Relu(a)
        c = Conv<pads=[1,1,1,1]>(b, w2)
        f = Flatten(c)
        y = Gemm<transB=1>(f, w3)
    }""")
    for options in ({}, {"float16": True}):
        pairs, stored = both(proto, rows(8, 16, 16, 16), **options)
        done = [audit(made, backend="tensorrt-rtx", beside_float=False) for made in (pairs, stored)]
        assert [len(audited.planned) for audited in done] == [3, 3]
        assert done[1].in_float == done[0].in_float == ()
