"""Models that come with pairs: theirs stay, ours join them, and `requantize` and `strip` take them out."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qdq_surgeon
from qdq_surgeon.cli import insert_main, main
from qdq_surgeon.edges import IN_MODEL
from qdq_surgeon.errors import ModelError, PlanError
from qdq_surgeon.existing import count_pairs, strip_pairs
from qdq_surgeon.scales import tensors_to_calibrate
from tests.graphs import model
from tests.test_insertion import MODELS, inserted, pairs_of, stripped

CONSTANTS = """<float s = {0.05}, float s2 = {0.02}, int8 z = {0}, uint8 u = {0}, uint8 u128 = {128},
float[16,16,3,3] w, float[16,16,3,3] w2"""

HALF_DONE = f"""g (float[N,16,8,8] x) => (float[N,16,4,4] y) {CONSTANTS}> {{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    c = Conv(d, w)
    y = Conv(c, w2)
}}"""

ONE_READER_BARE = f"""g (float[N,16,8,8] x) => (float[N,16,6,6] y, float[N,16,6,6] v) {CONSTANTS}> {{
    y = Conv(x, w)
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    v = Conv(d, w2)
}}"""

CONCAT = f"""g (float[N,8,8,8] a, float[N,8,8,8] b) => (float[N,16,6,6] y) {CONSTANTS}> {{
    qa = QuantizeLinear(a, s, z)
    da = DequantizeLinear(qa, s, z)
    t = Concat<axis=1>(da, b)
    y = Conv(t, w)
}}"""

POOL = f"""g (float[N,16,8,8] x) => (float[N,16,2,2] y) {CONSTANTS}> {{
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
    q = QuantizeLinear(p, s, z)
    d = DequantizeLinear(q, s, z)
    y = Conv(d, w)
}}"""

WILD = {
    "pairs on data and weights": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        qw = QuantizeLinear(w, s2, z)
        dw = DequantizeLinear(qw, s2, z)
        y = Conv(d, dw)
    }}""",
    "no zero point": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s)
        d = DequantizeLinear(q, s)
        y = Conv(d, w)
    }}""",
    "UINT8": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, u128)
        d = DequantizeLinear(q, s, u128)
        y = Conv(d, w)
    }}""",
    "doubled pairs": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        q2 = QuantizeLinear(d, s2, z)
        d2 = DequantizeLinear(q2, s2, z)
        y = Conv(d2, w)
    }}""",
    "two pairs on one tensor": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y, float[A,B,C,D] v) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        q2 = QuantizeLinear(x, s2, z)
        d2 = DequantizeLinear(q2, s2, z)
        y = Conv(d, w)
        v = Conv(d2, w2)
    }}""",
    "two DQ of one Q": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y, float[A,B,C,D] v) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        d2 = DequantizeLinear(q, s, z)
        y = Conv(d, w)
        v = Conv(d2, w2)
    }}""",
    "a DQ as graph output": f"""g (float[N,16,8,8] x) => (float[N,16,8,8] d, float[N,16,6,6] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = Conv(d, w)
    }}""",
    "a Q as graph output": f"""g (float[N,16,8,8] x) => (int8[N,16,8,8] q, float[N,16,6,6] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = Conv(d, w)
    }}""",
    "a Relu behind": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        r = Relu(d)
        y = Conv(r, w)
    }}""",
    "a Transpose behind a weight": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        qw = QuantizeLinear(w, s2, z)
        dw = DequantizeLinear(qw, s2, z)
        t = Transpose<perm=[1,0,2,3]>(dw)
        y = Conv(x, t)
    }}""",
    "a Reshape within": f"""g (float[2,16,8,8] x) => (float[A,B,C,D] y)
    {CONSTANTS}, int64[4] shape = {{2, 16, 8, 8}}> {{
        q = QuantizeLinear(x, s, z)
        r = Reshape(q, shape)
        d = DequantizeLinear(r, s, z)
        y = Conv(d, w)
    }}""",
    "an Identity within": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        i = Identity(q)
        d = DequantizeLinear(i, s, z)
        y = Conv(d, w)
    }}""",
    "a Cast within": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}, int32 z32 = {{0}}> {{
        q = QuantizeLinear(x, s, z)
        i = Cast<to=6>(q)
        d = DequantizeLinear(i, s, z32)
        y = Conv(d, w)
    }}""",
    "a computed scale": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        m = ReduceMax<keepdims=0>(x)
        scale = Mul(m, s)
        q = QuantizeLinear(x, scale, z)
        d = DequantizeLinear(q, scale, z)
        y = Conv(d, w)
    }}""",
    "integers as input": f"""g (int8[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        d = DequantizeLinear(x, s, z)
        y = Conv(d, w)
    }}""",
    "inside a body": f"""g (float[N,16,8,8] x, bool t) => (float[N,16,6,6] y) {CONSTANTS}> {{
        y = If (t) <
            then_branch = yes () => (float[N,16,6,6] a) {{
                q = QuantizeLinear(x, s, z)
                d = DequantizeLinear(q, s, z)
                a = Conv(d, w)
            }},
            else_branch = no () => (float[N,16,6,6] b) {{ b = Conv(x, w2) }}
        >
    }}""",
    "read in a body": f"""g (float[N,16,8,8] x, bool t) => (float[N,16,6,6] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = If (t) <
            then_branch = yes () => (float[N,16,6,6] a) {{ a = Conv(d, w) }},
            else_branch = no () => (float[N,16,6,6] b) {{ b = Conv(d, w2) }}
        >
    }}""",
    "com.microsoft": f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[N,16,8,8] x) => (float[N,16,6,6] y) {CONSTANTS}> {{
        q = com.microsoft.QuantizeLinear(x, s, z)
        d = com.microsoft.DequantizeLinear(q, s, z)
        y = Conv(d, w)
    }}""",
    "a branch that leads nowhere": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = Conv(x, w)
    }}""",
}

STORED = """g (float[N,16,8,8] x) => (float[A,B,C,D] y)
<int8[16,16,3,3] i, int32[16] b, float[16] ws, int8[16] wz, float[16] bs, int32[16] bz> {
    w = DequantizeLinear<axis=0>(i, ws, wz)
    bias = DequantizeLinear<axis=0>(b, bs, bz)
    y = Conv(x, w, bias)
}"""


# ---- theirs stay, and the rest is completed ---------------------------------------------------------------------


def test_missing_sites_are_completed():
    plan = qdq_surgeon.plan(model(HALF_DONE))
    assert {(site.tensor, read.rule) for site in plan.sites for read in site.reads} == {
        ("x", IN_MODEL),
        ("w", "conv"),
        ("c", "conv"),
        ("w2", "conv"),
    }
    assert next(plan.lines()).startswith("4 Q/DQ pairs (1 in the model) for 4 edges")


def test_a_known_scale_needs_no_calibration():
    assert tensors_to_calibrate(qdq_surgeon.plan(model(HALF_DONE))) == ("c",)


@pytest.mark.parametrize("text", [HALF_DONE, ONE_READER_BARE, CONCAT, POOL])
def test_taking_out_what_was_added_gives_the_model_back(text):
    proto = model(text)
    before = proto.SerializeToString(deterministic=True)
    result = inserted(proto)
    onnx.checker.check_model(result, full_check=True)
    assert pairs_of(result)
    back = stripped(result)
    if text is not ONE_READER_BARE:
        assert back.SerializeToString(deterministic=True) == before
    assert proto.SerializeToString(deterministic=True) == before


def test_a_bare_reader_joins_the_pair_of_its_tensor_even_where_that_is_stored_behind_it():
    result = inserted(model(ONE_READER_BARE))
    onnx.checker.check_model(result)
    first = next(node for node in result.graph.node if node.output[0] == "y")
    assert first.input[0] == "d"
    assert sum(node.op_type == "QuantizeLinear" and node.input[0] == "x" for node in result.graph.node) == 1


def test_a_concat_takes_the_scale_of_the_pair_that_one_of_its_inputs_has():
    proto = model(CONCAT)
    plan = qdq_surgeon.plan(proto)
    assert [site.tensor for site in plan.sites if site.is_in_model] == ["a"]
    scales = scales_for(proto, plan, b=[3.0], t=[5.0])
    assert {name: float(scale) for (name, axis), scale in scales.values.items() if axis is None} == dict.fromkeys(
        ("a", "b", "t"), float(np.float32(0.05))
    )


def test_a_concat_of_pairs_that_disagree_is_left_alone():
    text = CONCAT.replace("t = Concat", "qb = QuantizeLinear(b, s2, z)\n db = DequantizeLinear(qb, s2, z)\n t = Concat")
    text = text.replace("(da, b)", "(da, db, b)").replace("float[16,16,3,3] w,", "float[16,24,3,3] w,")
    proto = model(text)
    plan = qdq_surgeon.plan(proto)
    scales = scales_for(proto, plan, t=[4.0])
    assert {str(edge): reason for edge, reason in scales.dropped.items()} == {
        "Concat t[2]": "the pairs that came with the model do not share a scale: 0.02, 0.05"
    }
    assert scales.values["t", None] == np.float32(4 / 127)


def test_a_concat_with_an_asymmetric_pair_does_not_share():
    text = CONCAT.replace("(a, s, z)", "(a, s, u)").replace("(qa, s, z)", "(qa, s, u)")
    proto = model(text)
    scales = scales_for(proto, qdq_surgeon.plan(proto))
    assert {str(edge) for edge in scales.dropped} == {"Concat t[1]"}
    assert "not symmetric INT8" in next(iter(scales.dropped.values()))


def test_a_pool_takes_the_scale_of_the_pair_behind_it():
    proto = model(POOL)
    plan = qdq_surgeon.plan(proto)
    assert tensors_to_calibrate(plan) == ()
    scales = scales_for(proto, plan)
    assert scales.values["x", None] == scales.values["p", None] == np.float32(0.05)


def test_what_follows_a_pair_by_moving_data_takes_its_scale():
    proto = model(
        POOL.replace("(x)", "(dx)")
        .replace("p = Max", "qx = QuantizeLinear(x, s2, z)\n dx = DequantizeLinear(qx, s2, z)\n p = Max")
        .replace("Conv(d, w)", "Conv(p, w)")
    )
    scales = scales_for(proto, qdq_surgeon.plan(proto))
    assert scales.values["p", None] == np.float32(0.02)


def test_filters_leave_the_pairs_of_the_model():
    plan = qdq_surgeon.plan(model(HALF_DONE), exclude=["c", "y"])
    assert [(site.tensor, [str(read.edge) for read in site.reads]) for site in plan.sites] == [("x", ["Conv c[0]"])]
    assert not plan.adds_pairs


def test_one_half_of_a_conv_is_completed_with_the_other():
    plan = qdq_surgeon.plan(model(WILD["a Transpose behind a weight"]))
    assert {site.tensor: [read.rule for read in site.reads] for site in plan.sites} == {
        "x": ["conv"],
        "w": [IN_MODEL],
        "t": [IN_MODEL],
    }


def test_a_saved_plan_knows_the_pairs_of_its_model():
    proto = model(HALF_DONE)
    plan = qdq_surgeon.plan(proto)
    assert qdq_surgeon.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="another model"):
        qdq_surgeon.apply(qdq_surgeon.load(proto, requantize=True), plan)


# ---- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_ours_is_complete_and_comes_back_byte_for_byte(name):
    quantized = inserted(model(MODELS[name]))
    result = qdq_surgeon.quantize(quantized)
    assert not result.plan.adds_pairs
    assert result.model.SerializeToString(deterministic=True) == quantized.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", MODELS)
def test_requantizing_a_model_of_ours_gives_what_quantizing_gave(name):
    proto = model(MODELS[name])
    quantized = inserted(proto)
    again = qdq_surgeon.load(quantized, requantize=True)
    assert not again.existing
    assert again.proto == proto
    assert inserted(again.proto) == quantized


def test_the_options_of_the_command_line_do_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(model(HALF_DONE), "half.onnx")
    assert insert_main(["half.onnx", "--plan"]) == 0
    assert "in-model: The model came with this pair." in capsys.readouterr().out
    assert insert_main(["half.onnx", "--requantize", "--plan"]) == 0
    assert "in-model" not in capsys.readouterr().out
    assert insert_main(["half.onnx", "-o", "whole.onnx"]) == 0
    assert "the model as given (with its own pairs) against INT8" in capsys.readouterr().out
    assert insert_main(["whole.onnx", "-o", "again.onnx"]) == 0
    assert "nothing to add" in capsys.readouterr().out
    assert onnx.load("again.onnx") == onnx.load("whole.onnx")
    assert main(["strip", "whole.onnx"]) == 0
    assert "whole.onnx: 4 pairs of 4 taken out" in capsys.readouterr().out
    assert count_pairs(onnx.load("whole.float.onnx")) == 0
    assert main(["strip", "whole.onnx", "--exclude", "y", "-o", "part.onnx"]) == 0
    assert "whole.onnx: 2 pairs of 4 taken out" in capsys.readouterr().out


# ---- what is found in the wild ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WILD)
def test_no_form_of_pairs_is_a_stumbling_block(name):
    proto = model(WILD[name])
    before = proto.SerializeToString(deterministic=True)
    source = qdq_surgeon.load(proto)
    plan = qdq_surgeon.plan(source)
    result = qdq_surgeon.apply(source, plan, feeds(proto))
    check(result.model)
    assert count_pairs(result.model) >= count_pairs(proto)
    theirs = {node.output[0] for node in proto.graph.node}
    kept = [node for node in result.model.graph.node if node.output[0] in theirs]
    assert [node.op_type for node in kept] == [node.op_type for node in proto.graph.node]
    assert proto.SerializeToString(deterministic=True) == before
    again = qdq_surgeon.plan(result.model)
    assert not again.adds_pairs, str(again)


@pytest.mark.parametrize("name", [name for name in WILD if "within" not in name and "computed" not in name])
def test_stripping_takes_out_every_pair_that_is_understood(name):
    proto = model(WILD[name])
    bare = strip_pairs(proto)
    check(bare)
    left = [node.op_type for node in bare.graph.node if "uantizeLinear" in node.op_type]
    assert left == {"a Q as graph output": ["QuantizeLinear"], "integers as input": ["DequantizeLinear"]}.get(name, [])


@pytest.mark.parametrize("opset", [10, 11, 12])
def test_opsets_below_13_are_raised_with_their_pairs(opset):
    proto = model(HALF_DONE, opset)
    result = qdq_surgeon.quantize(proto, feeds(proto))
    onnx.checker.check_model(result.model, full_check=True)
    assert [site.tensor for site in result.plan.sites if site.is_in_model] == ["x"]
    assert result.plan.adds_pairs


def test_a_pair_that_holds_no_negative_values_stands_for_a_relu():
    text = HALF_DONE.replace(
        "y = Conv(c, w2)", "qc = QuantizeLinear(c, s, u)\n e = DequantizeLinear(qc, s, u)\n y = Conv(e, w2)"
    )
    source = qdq_surgeon.load(model(text))
    assert [node.op_type for node in source.proto.graph.node] == ["Conv", "Relu", "Conv"]
    assert {site.tensor for site in qdq_surgeon.plan(source).sites if site.is_in_model} == {"x", "e"}
    result = inserted(model(text.replace("Conv(d, w)", "Conv(x, w)")), placement="tflite")
    onnx.checker.check_model(result)


def test_stored_weights_and_biases_keep_their_pairs():
    proto = stored()
    source = qdq_surgeon.load(proto)
    assert any("INT32: TensorRT wants them in float" in note for note in source.notes)
    plan = qdq_surgeon.plan(source)
    assert {site.tensor: site.axis for site in plan.sites if site.is_in_model} == {"w": 0, "bias": 0}
    assert [str(read.edge) for site in plan.sites for read in site.added] == ["Conv y[0]"]
    scales = scales_for(proto, plan)
    np.testing.assert_array_equal(scales.values["w", 0], constant(proto, "ws"))
    values = constant(proto, "i").astype(np.float32) * constant(proto, "ws").reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(constant(strip_pairs(proto), "w"), values)


def test_a_scale_per_block_stays_as_an_ordinary_node():
    proto = model(
        """g (float[N,32] x) => (float[N,16] y) <int8[32,16] i, float[2,16] s> {
            w = DequantizeLinear(i, s)
            y = MatMul(x, w)
        }""",
        21,
    )
    proto.graph.node[0].attribute.append(helper.make_attribute("axis", 0))
    proto.graph.node[0].attribute.append(helper.make_attribute("block_size", 16))
    put(proto, "i", np.ones((32, 16), np.int8))
    assert strip_pairs(proto) == proto
    plan = qdq_surgeon.plan(proto)
    assert {site.tensor for site in plan.sites if site.is_in_model} == {"w"}
    check(qdq_surgeon.quantize(proto).model)


def test_fp16_scales():
    text = """g (float16[N,32] x) => (float16[N,32] y) <float16 s = {0.05}, int8 z = {0}, float16[32,32] w> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        m = MatMul(d, w)
        y = MatMul(m, w)
    }"""
    proto = model(text.replace(" = {0.05}", ""), 19)
    put(proto, "s", np.array(0.05, np.float16))
    result = inserted(proto)
    onnx.checker.check_model(result, full_check=True)
    assert pairs_of(result)


@pytest.mark.parametrize("op", ["QLinearConv", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm"])
def test_models_in_operator_form_are_refused(op):
    proto = model(HALF_DONE)
    proto.graph.node.append(helper.make_node(op, ["x"], ["unread"], domain="com.microsoft" if op == "QGemm" else ""))
    with pytest.raises(ModelError, match=rf"already quantized in operator form \(1 {op}\).*give the float model"):
        qdq_surgeon.plan(proto)


# ---- strip with filters -----------------------------------------------------------------------------------------


def test_readers_choose_the_pairs_that_go():
    quantized = inserted(model(MODELS["residual"]))
    bare = strip_pairs(quantized, {"s"})
    check(bare)
    conv, add = (next(node for node in bare.graph.node if node.output[0] == name) for name in ("c1", "s"))
    assert list(add.input) == ["c2", "x"]
    assert conv.input[0] == "x_dequantized"
    assert count_pairs(bare) == count_pairs(quantized)  # the Conv reads it still


def test_a_stored_weight_stays_for_its_other_readers():
    proto = stored()
    proto.graph.node.append(helper.make_node("Conv", ["x", "w"], ["v"]))
    proto.graph.output.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, list("NCHW")))
    bare = strip_pairs(proto, {"v"})
    check(bare)
    assert bare.graph.node[-1].input[1] == "w_float"
    assert count_pairs(bare) == 2
    assert count_pairs(strip_pairs(proto, {"v", "y"})) == 0


# ---- helpers ----------------------------------------------------------------------------------------------------


def check(proto):
    onnx.checker.check_model(proto)
    onnx.shape_inference.infer_shapes(proto, strict_mode=not any(node.domain for node in proto.graph.node))


def feeds(proto):
    generator = np.random.default_rng(0)
    inputs = {"x": generator.standard_normal((2, 16, 8, 8))}
    kinds = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    feed = {"x": inputs["x"].astype(helper.tensor_dtype_to_np_dtype(kinds["x"]))}
    return [{**feed, "t": np.array(taken)} if "t" in kinds else feed for taken in (True, False)]


def scales_for(proto, plan, **values):
    from tests.test_insertion import scales_for as chosen

    return chosen(proto, plan, **values)


def stored():
    proto = model(STORED)
    generator = np.random.default_rng(0)
    put(proto, "i", generator.integers(-127, 128, (16, 16, 3, 3), np.int8))
    put(proto, "b", generator.integers(-99, 99, 16, np.int32))
    for name, kind in (("wz", np.int8), ("bz", np.int32)):
        put(proto, name, np.zeros(16, kind))
    for name in ("ws", "bs"):
        put(proto, name, generator.uniform(0.01, 0.02, 16).astype(np.float32))
    return proto


def put(proto, name, values):
    tensor = next((tensor for tensor in proto.graph.initializer if tensor.name == name), None)
    (tensor or proto.graph.initializer.add()).CopyFrom(numpy_helper.from_array(values, name))


def constant(proto, name):
    return numpy_helper.to_array(next(tensor for tensor in proto.graph.initializer if tensor.name == name))
