"""Models that come with pairs: theirs stay, ours join them, and `requantize` and `strip` take them out."""

import numpy as np
import onnx
import onnxruntime
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
    "a Clip within (reduce_range)": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y)
    {CONSTANTS}, uint8 low = {{0}}, uint8 high = {{127}}> {{
        q = QuantizeLinear(x, s, u)
        c = Clip(q, low, high)
        d = DequantizeLinear(c, s, u)
        y = Conv(d, w)
    }}""",
    "a symmetric Clip within": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y)
    {CONSTANTS}, int8 low = {{-127}}, int8 high = {{127}}> {{
        q = QuantizeLinear(x, s, z)
        c = Clip(q, low, high)
        d = DequantizeLinear(c, s, z)
        y = Conv(d, w)
    }}""",
    "a Clip and a MaxPool within, for a Relu": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y)
    {CONSTANTS}, int8 low = {{0}}> {{
        a = Conv(x, w)
        q = QuantizeLinear(a, s, z)
        c = Clip(q, low)
        p = MaxPool<kernel_shape=[2,2]>(c)
        d = DequantizeLinear(p, s, z)
        y = Conv(d, w2)
    }}""",
    "a Transpose and a Reshape within": f"""g (float[2,16,8,8] x) => (float[A,B,C,D] y)
    {CONSTANTS}, int64[4] shape = {{2, 16, 4, 16}}> {{
        q = QuantizeLinear(x, s, z)
        t = Transpose<perm=[0,1,3,2]>(q)
        r = Reshape(t, shape)
        d = DequantizeLinear(r, s, z)
        y = Conv(d, w)
    }}""",
    "a Split within": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}, int64[2] parts = {{4, 4}}> {{
        q = QuantizeLinear(x, s, z)
        a, b = Split<axis=3>(q, parts)
        d = DequantizeLinear(a, s, z)
        e = DequantizeLinear(b, s, z)
        c = Conv(d, w)
        f = Conv(e, w2)
        y = Add(c, f)
    }}""",
    "another scale in the DQ": f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s2, z)
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

STAYS = {
    "a Q as graph output": ["QuantizeLinear"],
    "integers as input": ["DequantizeLinear"],
    "a Split within": ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"],
    "another scale in the DQ": ["QuantizeLinear", "DequantizeLinear"],
}
"""What of the pairs is no pair, or none that is understood."""

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
    assert noise(proto, result.model) < 0.001


@pytest.mark.parametrize("name", WILD)
def test_stripping_gives_the_float_model_under_the_pairs(name):
    proto = model(WILD[name])
    bare = strip_pairs(proto)
    check(bare)
    assert [node.op_type for node in bare.graph.node if "uantizeLinear" in node.op_type] == STAYS.get(name, [])
    assert noise(proto, bare) < 0.005


@pytest.mark.parametrize("name", WILD)
def test_requantizing_never_puts_a_pair_upon_a_pair(name):
    proto = model(WILD[name])
    source = qdq_surgeon.load(proto, requantize=True)
    result = qdq_surgeon.quantize(source, feeds(proto))
    check(result.model)
    assert noise(proto, result.model) < 0.005
    made_by = {output: node.op_type for node in result.model.graph.node for output in node.output}
    pairs = [node for node in result.model.graph.node if node.op_type == "QuantizeLinear"]
    assert "DequantizeLinear" not in [made_by.get(node.input[0]) for node in pairs]
    assert any("not understood" in note for note in source.notes) is ("DequantizeLinear" in STAYS.get(name, []))


def test_what_narrows_the_integers_goes_with_the_pair_and_what_moves_them_stays():
    ops = {name: [node.op_type for node in strip_pairs(model(text)).graph.node] for name, text in WILD.items()}
    assert ops["a Clip within (reduce_range)"] == ["Conv"]
    assert ops["a symmetric Clip within"] == ["Conv"]
    assert ops["a Cast within"] == ["Conv"]
    assert ops["a Clip and a MaxPool within, for a Relu"] == ["Conv", "MaxPool", "Relu", "Conv"]
    assert ops["a Transpose and a Reshape within"] == ["Transpose", "Reshape", "Conv"]


def test_a_note_names_what_could_not_be_taken_out():
    source = qdq_surgeon.load(model(WILD["a Split within"]), requantize=True)
    assert source.notes == (
        "2 pairs of the model not understood, so they stay, on 'd', 'e': "
        "their scales are computed or per block, or other ops stand between Q and DQ",
    )
    assert not qdq_surgeon.load(model(WILD["a Clip within (reduce_range)"]), requantize=True).notes


@pytest.mark.parametrize("placement", ["tensorrt", "tflite"])
@pytest.mark.parametrize("name", ["a Transpose and a Reshape within", "a Clip and a MaxPool within, for a Relu"])
def test_what_stands_between_a_q_and_its_dq_gets_no_pair_of_ours(name, placement):
    """A Q on the tensor, then data movement: another reader of the tensor cannot join, and gets a pair of its own."""
    text = WILD[name].replace(" y)", " y, float[A,B,C,D] v)", 1)
    text = text.replace("q = Quant", ("v = Conv(a, w2)" if " a = " in text else "v = Conv(x, w2)") + "\n q = Quant")
    proto = model(text)
    result = qdq_surgeon.quantize(proto, feeds(proto), placement=placement)
    check(result.model)
    theirs = next(node for node in result.model.graph.node if node.output[0] == "q")
    assert theirs.input[0] in ("a", "x")
    assert noise(proto, result.model) < 0.001


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
    again = qdq_surgeon.load(proto, requantize=True)
    assert [pair.tensor for pair in again.existing] == ["w"]
    assert {site.tensor for site in qdq_surgeon.plan(again).sites if site.added} == {"x"}


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


def test_what_moves_data_inside_a_pair_stays_in_integers_for_the_other_readers():
    text = WILD["a Transpose and a Reshape within"].replace(" y)", " y, float[A,B,C,D] v)", 1)
    proto = model(text.replace("y = Conv(d, w)", "y = Conv(d, w)\n v = Conv(d, w2)"))
    bare = strip_pairs(proto, {"y"})
    check(bare)
    assert [list(node.input) for node in bare.graph.node if node.op_type == "Conv"] == [["d_float", "w"], ["d", "w2"]]
    assert noise(proto, bare) < 0.005


def test_a_q_whose_integers_go_out_gets_no_pair_before_it():
    proto = model(WILD["a Q as graph output"])
    again = qdq_surgeon.load(proto, requantize=True)
    assert not again.notes
    result = qdq_surgeon.quantize(again, feeds(proto), placement="tflite", compare=False)
    assert next(node for node in result.model.graph.node if node.output[0] == "q").input[0] == "x"


def test_a_stored_weight_stays_for_its_other_readers():
    proto = stored()
    proto.graph.node.append(helper.make_node("Conv", ["x", "w"], ["v"]))
    proto.graph.output.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, list("NCHW")))
    bare = strip_pairs(proto, {"v"})
    check(bare)
    assert bare.graph.node[-1].input[1] == "w_float"
    assert count_pairs(bare) == 2
    assert count_pairs(strip_pairs(proto, {"v", "y"})) == 0


# ---- pairs that others can join, and pairs that they cannot -----------------------------------------------------

TWO_READERS = f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y, float[A,B,C,D] v) {CONSTANTS}> {{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    y = Conv(d, w)
    v = Conv(x, w2)
}}"""

PER_CHANNEL = f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y, float[A,B,C,D] v)
{CONSTANTS}, float[16] sc, int8[16] zc> {{
    q = QuantizeLinear<axis=1>(x, sc, zc)
    d = DequantizeLinear<axis=1>(q, sc, zc)
    y = Conv(d, w)
    v = Conv(x, w2)
}}"""

CYCLE = f"""g (float[N,16,8,8] x) => (float[A,B,C,D] o, float[A,B,C,D] y) {CONSTANTS}> {{
    y = Conv(x, w)
    m = ReduceMax<keepdims=0>(y)
    k = Mul(m, s)
    q = QuantizeLinear(x, k, z)
    d = DequantizeLinear(q, k, z)
    o = Conv(d, w2)
}}"""


def test_a_bare_reader_beside_a_pair_per_channel_gets_a_pair_of_its_own():
    proto = model(PER_CHANNEL)
    put(proto, "sc", np.full(16, 0.05, np.float32))
    put(proto, "zc", np.zeros(16, np.int8))
    plan = qdq_surgeon.plan(proto)
    assert tensors_to_calibrate(plan) == ("x",)
    result = qdq_surgeon.quantize(proto, feeds(proto), method="max")
    assert result.scales.values["x", None] == np.float32(np.abs(feeds(proto)[0]["x"]).max() / 127)
    assert [node.input[0] for node in result.model.graph.node if node.op_type == "Conv"] == ["d", "x_dequantized"]
    assert noise(proto, result.model) < 0.001


def test_a_bare_reader_does_not_join_a_pair_whose_scale_is_computed():
    """The scale here follows from what the bare reader makes: joining would close a cycle."""
    proto = model(CYCLE)
    result = qdq_surgeon.quantize(proto, feeds(proto))
    check(result.model)
    assert [list(node.input)[:1] for node in result.model.graph.node if node.op_type == "Conv"] == [
        ["x_dequantized"],
        ["d"],
    ]


FOREIGN = {"INT4": TensorProto.INT4, "INT16": TensorProto.INT16, "FP8": TensorProto.FLOAT8E4M3FN}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_pair_of_another_type_is_neither_joined_nor_completed(kind):
    proto = model(TWO_READERS, 21)
    proto.ir_version = 10
    proto.graph.initializer.remove(next(tensor for tensor in proto.graph.initializer if tensor.name == "z"))
    proto.graph.initializer.append(helper.make_tensor("z", FOREIGN[kind], [], [0]))
    plan = qdq_surgeon.plan(proto)
    assert [(str(kept), kept.rule) for kept in plan.kept][:1] == [("w -> Conv y[1]", "in-model-type")]
    result = qdq_surgeon.quantize(proto, feeds(proto), compare=False)
    assert [list(node.input) for node in result.model.graph.node if node.op_type == "Conv"] == [
        ["d", "w"],
        ["x_dequantized", "w2_dequantized"],
    ]


@pytest.mark.parametrize("text", [CONCAT, CONCAT.replace("Concat<axis=1>(da, b)", "Mul(da, b)")])
def test_what_joins_a_pair_of_another_type_with_others_stays_as_it_is(text):
    text = text.replace("int8 z = {0}", "int16 z = {0}")
    if "Mul" in text:
        text = text.replace("float[16,16,3,3] w,", "float[16,8,3,3] w,")
    proto = model(text, 21)
    proto.ir_version = 10
    plan = qdq_surgeon.plan(proto, placement="tensorrt")
    assert {site.tensor for site in plan.sites if site.added} == {"t", "w"}


def test_what_was_quantized_to_another_type_before_it_was_moved_is_left_alone_too():
    text = HALF_DONE.replace("c = Conv(d, w)", "t = Transpose<perm=[0,1,3,2]>(d)\n c = Conv(t, w)")
    assert "t" in {site.tensor for site in qdq_surgeon.plan(model(text)).sites if site.added}
    proto = model(text.replace("int8 z = {0}", "int16 z = {0}"), 21)
    proto.ir_version = 10
    assert {site.tensor for site in qdq_surgeon.plan(proto).sites if site.added} == {"c", "w2"}


def test_a_pair_of_another_type_is_no_reason_to_quantize_what_comes_before_it():
    text = f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y) {CONSTANTS}> {{
        p = MaxPool<kernel_shape=[2,2]>(x)
        q = QuantizeLinear(p, s, z)
        d = DequantizeLinear(q, s, z)
        y = Conv(d, w)
    }}"""
    assert {site.tensor for site in qdq_surgeon.plan(model(text)).sites if site.added} == {"x", "w"}
    proto = model(text.replace("int8 z = {0}", "int16 z = {0}"), 21)
    proto.ir_version = 10
    assert not qdq_surgeon.plan(proto).adds_pairs


@pytest.mark.parametrize("other", ["u128", "u"])
def test_a_bare_reader_prefers_the_symmetric_pair(other):
    proto = model(f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y, float[A,B,C,D] v, float[A,B,C,D] o) {CONSTANTS}> {{
        q = QuantizeLinear(x, s, {other})
        d = DequantizeLinear(q, s, {other})
        y = Conv(d, w)
        q2 = QuantizeLinear(x, s, z)
        d2 = DequantizeLinear(q2, s, z)
        v = Conv(d2, w)
        o = Conv(x, w2)
    }}""")
    result = qdq_surgeon.quantize(proto, feeds(proto))
    assert next(node for node in result.model.graph.node if node.output[0] == "o").input[0] == "d2"


@pytest.mark.parametrize("scale", [0.0, -0.05, np.nan, np.inf])
def test_a_scale_that_is_no_scale_counts_as_unknown(scale):
    proto = model(TWO_READERS.replace("v = Conv(x, w2)", "p = MaxPool<kernel_shape=[1,1]>(x)\n v = Conv(p, w2)"))
    put(proto, "s", np.array(scale, np.float32))
    source = qdq_surgeon.load(proto)
    assert "the scale of the pair on 'x' is not finite and positive: it counts as unknown (see lint)" in source.notes
    plan = qdq_surgeon.plan(source)
    assert qdq_surgeon.Plan.from_json(plan.to_json()) == plan
    scales = qdq_surgeon.apply(source, plan, feeds(proto), method="max", compare=False).scales
    assert scales.values["p", None] == np.float32(np.abs(feeds(proto)[0]["x"]).max() / 127)


# ---- what is left over ------------------------------------------------------------------------------------------


def test_initializers_listed_as_inputs_go_with_the_pairs_that_read_them():
    proto = model(WILD["pairs on data and weights"])
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    bare = strip_pairs(proto)
    check(bare)
    assert {value.name for value in bare.graph.input} == {"x", *(tensor.name for tensor in bare.graph.initializer)}
    assert [value.name for value in qdq_surgeon.load(proto).inputs] == ["x"]
    assert qdq_surgeon.quantize(proto, feeds(proto)).plan.sites


def test_an_old_model_stays_valid_where_a_stored_weight_becomes_float():
    """Below IR 4 every initializer must be an input too."""
    proto = stored()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    bare = strip_pairs(proto)
    check(bare)
    assert [value.name for value in bare.graph.input] == ["x"]


@pytest.mark.parametrize(
    ("constants", "left"),
    [
        ("k = Constant<value = float {0.1}>() n = Constant<value = int8 {0}>()", []),
        ("c = Constant<value = float {0.1}>() k = Identity(c) n = Cast<to=3>(u)", []),
        ("k = Constant<value = float {0.1}>() n = Constant<value = int8 {0}>() o = Neg(k)", ["Constant", "Neg"]),
        ("k = Constant<value = float {0.1}>() n = Constant<value = int8 {0}>() m = Neg(n)", ["Constant", "Neg"]),
    ],
)
def test_constants_go_with_the_last_that_reads_them(constants, left):
    given = model(f"""g (float[N,16,8,8] x) => (float[A,B,C,D] y, float o) <uint8 u = {{0}}, float[16,16,3,3] w> {{
        {constants}
        q = QuantizeLinear(x, k, n)
        d = DequantizeLinear(q, k, n)
        y = Conv(d, w)
    }}""")
    if "o =" not in constants:
        del given.graph.output[1]
    bare = strip_pairs(given)
    check(bare)
    assert [node.op_type for node in bare.graph.node] == [*left, "Conv"]
    assert {tensor.name for tensor in bare.graph.initializer} <= {"w", "u"} - ({"u"} if "Cast" in constants else set())


def test_what_a_pair_in_a_body_read_outside_of_it_goes_too():
    text = f"""g (float[N,16,8,8] x, bool t) => (float[N,16,6,6] y) {CONSTANTS}, int8[16,16,3,3] i> {{
        k = Constant<value = float {{0.1}}>()
        y = If (t) <
            then_branch = yes () => (float[N,16,6,6] a) {{ v = DequantizeLinear(i, k, z) a = Conv(x, v) }},
            else_branch = no () => (float[N,16,6,6] b) {{ b = Conv(x, w) }}
        >
    }}"""
    proto = model(text)
    put(proto, "i", np.ones((16, 16, 3, 3), np.int8))
    bare = strip_pairs(proto)
    check(bare)
    assert [node.op_type for node in bare.graph.node] == ["If"]
    theirs = {tensor.name for tensor in proto.graph.initializer}
    assert theirs - {tensor.name for tensor in bare.graph.initializer} == {"i", "z"}


def test_a_constant_that_nobody_read_before_stays():
    proto = model(WILD["pairs on data and weights"])
    put(proto, "nobody's", np.ones(3, np.float32))
    assert "nobody's" in {tensor.name for tensor in strip_pairs(proto).graph.initializer}


# ---- helpers ----------------------------------------------------------------------------------------------------


def noise(reference, other):
    """The error's share of the reference's power, over all float outputs, for inputs that every pair here can hold."""
    generator = np.random.default_rng(1)
    feed = feeds(reference)[0]
    levels = generator.uniform(0, 2.5, feed["x"].shape)
    feed["x"] = (levels / 0.05 if feed["x"].dtype == np.int8 else levels).astype(feed["x"].dtype)
    names = [value.name for value in reference.graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    left, right = (ran(proto, names, feed) for proto in (reference, other))
    return max(np.square(a - b).sum() / np.square(a).sum() for a, b in zip(left, right, strict=True))


def ran(proto, names, feed):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(names, feed)


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
