"""Biases with a shift: what an op then makes is NumPy's, and stripping gives the float model back, bit for bit."""

import base64
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qdq_surgeon
from qdq_surgeon.biases import BIAS_KEY
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.edges import Edge
from qdq_surgeon.errors import QdqError
from qdq_surgeon.existing import strip_pairs
from qdq_surgeon.float16 import to_float16
from qdq_surgeon.insertion import insert_pairs
from qdq_surgeon.model import load
from qdq_surgeon.pipeline import calibrate, choose, insert
from qdq_surgeon.storage import save
from tests.graphs import model

OWN = "g (float[N,16] x) => (float[N,32] y) <float[16,32] w, float[32] b> { y = Gemm(x, w, b) }"
FLAT = "g (float[N,16] x) => (float[N,32] y) <float[16,32] w, float[1,32] b> { y = Gemm<beta=0.5>(x, w, b) }"
ABSENT = "g (float[N,16] x) => (float[N,32] y) <float[16,32] w> { y = Gemm(x, w) }"
ADDED = """g (float[N,5,16] x) => (float[N,5,32] y) <float[16,32] w, float[32] b> {
    m = MatMul(x, w)
    y = Add(b, m)
}"""
CONV = "g (float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,16,3,3] w, float[16] b> { y = Conv(x, w, b) }"
COMPUTED = """g (float[N,16] x) => (float[N,32] y) <float[16,32] w, float[32] b> {
    s = Sin(b)
    y = Gemm(x, w, s)
}"""
SHARED = """g (float[N,16] x) => (float[N,32] y, float[N,32] z) <float[16,32] w, float[16,32] v, float[32] b> {
    y = Gemm(x, w, b)
    z = Gemm(x, v, b)
}"""
READ_ELSEWHERE = """g (float[N,16] x) => (float[N,32] y, float[32] e) <float[16,32] w, float[32] b> {
    y = Gemm(x, w, b)
    e = Exp(b)
}"""
READ_IN_A_BODY = """g (float[N,16] x, bool t) => (float[N,32] y, float[32] e) <float[16,32] w, float[32] b> {
    y = Gemm(x, w, b)
    e = If (t) <
        then_branch = yes () => (float[32] i) { i = Exp(b) },
        else_branch = no () => (float[32] j) { j = Neg(b) }
    >
}"""
HALF = "g (float16[N,16] x) => (float16[N,32] y) <float16[16,32] w, float16[32] b> { y = Gemm(x, w, b) }"


def listed_as_input():
    proto = model(OWN)
    proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [32]))
    return proto


MODELS = {
    "own": model(OWN),
    "(1, N)": model(FLAT),
    "absent": model(ABSENT),
    "added": model(ADDED),
    "conv": model(CONV),
    "computed": model(COMPUTED),
    "shared": model(SHARED),
    "read elsewhere": model(READ_ELSEWHERE),
    "read in a body": model(READ_IN_A_BODY),
    "listed as input": listed_as_input(),
    "half": model(HALF, opset=19),
}
SLOTS = {"added": 0}


def feed_of(proto, samples=6):
    rng = np.random.default_rng(0)
    shape = [dim.dim_value or samples for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    feed = {"x": rng.standard_normal(shape).astype(kind)}
    return feed | {value.name: np.array(True) for value in proto.graph.input if value.name == "t"}


def shift_of(channels, seed=1):
    return np.random.default_rng(seed).standard_normal(channels).astype(np.float32)


def prepared(proto):
    source = load(proto)
    plan = qdq_surgeon.plan(source)
    feed = feed_of(source.proto)
    return source, plan, choose(source, plan, calibrate(source, plan, [feed])), feed


def corrected(proto, readers=("y",), slot=2, shifts=None):
    """The Q/DQ models without and with shifts on these ops' biases, and what they were made from."""
    source, plan, scales, feed = prepared(proto)
    edges = {reader: Edge((), reader, slot, "", "") for reader in readers}
    sizes = {"y": source.graph.shape("y")[1 if source.graph.producer("y").op == "Conv" else -1]}
    shifts = shifts or {reader: shift_of(sizes["y"], seed) for seed, reader in enumerate(readers)}
    by_edge = {edge: shifts[reader] for reader, edge in edges.items()}
    return insert(source, plan, scales), insert_pairs(source, plan, scales, "1", by_edge), shifts, feed


def run(proto, feed):
    session = Session(proto, simulate=True)
    return dict(zip(session.outputs, session.run(Batch(feed, 1), session.outputs)[0], strict=True))


def bias_of(proto, reader, slot=2):
    node = next(node for node in proto.graph.node if reader in node.output)
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == node.input[slot]))


# ---- in -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_output_moves_by_the_shift_and_by_nothing_else(name):
    plain, moved, shifts, feed = corrected(MODELS[name], slot=SLOTS.get(name, 2))
    before, after = run(plain, feed), run(moved, feed)
    shape = (-1, 1, 1) if name == "conv" else (-1,)
    # in FP16 the bias itself is rounded
    tolerance = 4e-3 if name == "half" else 1e-6
    expected = before["y"].astype(np.float64) + shifts["y"].reshape(shape)
    np.testing.assert_allclose(after["y"], expected, rtol=tolerance, atol=tolerance)
    for other in before.keys() - {"y"}:
        np.testing.assert_array_equal(after[other], before[other])


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_valid_and_has_nothing_that_nobody_reads(name, capfd):
    _, moved, _, _ = corrected(MODELS[name], slot=SLOTS.get(name, 2))
    onnx.checker.check_model(moved, full_check=True)
    ort.InferenceSession(moved.SerializeToString(), providers=["CPUExecutionProvider"])
    warnings = [
        line for line in capfd.readouterr().err.splitlines() if "listed" not in line and "graph inputs" not in line
    ]
    assert warnings == []


def test_a_bias_keeps_its_name_where_nobody_else_reads_it():
    _, moved, _, _ = corrected(MODELS["own"])
    assert [tensor.name for tensor in moved.graph.initializer if tensor.data_type == TensorProto.FLOAT][1:2] == ["b"]
    assert next(node for node in moved.graph.node if "y" in node.output).input[2] == "b"


@pytest.mark.parametrize("name", ["shared", "read elsewhere", "read in a body"])
def test_who_else_reads_the_bias_reads_what_it_was(name):
    _, moved, _, _ = corrected(MODELS[name])
    np.testing.assert_array_equal(
        numpy_helper.to_array(next(tensor for tensor in moved.graph.initializer if tensor.name == "b")),
        numpy_helper.to_array(next(tensor for tensor in MODELS[name].graph.initializer if tensor.name == "b")),
    )


def test_two_shifts_on_one_bias_do_not_mix():
    plain, moved, shifts, feed = corrected(MODELS["shared"], ("y", "z"))
    before, after = run(plain, feed), run(moved, feed)
    for name in ("y", "z"):
        np.testing.assert_allclose(after[name], before[name] + shifts[name], atol=1e-5)


def test_the_new_name_of_a_bias_is_free():
    proto = model(
        ABSENT.replace("=> (", "=> (float[N,32] y_bias_corrected, ").replace("}", "y_bias_corrected = Relu(y) }")
    )
    _, moved, shifts, feed = corrected(proto)
    np.testing.assert_allclose(run(moved, feed)["y"] - run(proto, feed)["y"], np.tile(shifts["y"], (6, 1)), atol=0.05)


# ---- out ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_stripping_gives_the_float_model_back_bit_for_bit(name):
    _, moved, _, _ = corrected(MODELS[name], slot=SLOTS.get(name, 2))
    assert strip_pairs(moved) == MODELS[name]


def test_stripping_both_of_a_shared_bias():
    _, moved, _, _ = corrected(MODELS["shared"], ("y", "z"))
    assert strip_pairs(moved) == MODELS["shared"]


def test_stripping_leaves_an_empty_slot_empty():
    proto = model(ABSENT)
    proto.graph.node[0].input.append("")
    _, moved, _, _ = corrected(proto)
    assert strip_pairs(moved) == proto


def test_a_model_whose_weights_lie_outside(tmp_path):
    save(MODELS["own"], tmp_path / "in.onnx", True)
    onnx_file = tmp_path / "in.onnx"
    plain, moved, shifts, feed = corrected(onnx_file)
    save(moved, tmp_path / "out.onnx", True)
    after = onnx.load(tmp_path / "out.onnx")
    np.testing.assert_allclose(run(after, feed)["y"], run(plain, feed)["y"] + shifts["y"], atol=1e-5)
    np.testing.assert_array_equal(bias_of(strip_pairs(after), "y"), bias_of(MODELS["own"], "y"))


def test_requantizing_starts_from_the_float_biases():
    _, moved, _, _ = corrected(MODELS["own"])
    assert load(moved, requantize=True).proto == MODELS["own"]


def test_a_corrected_model_is_read_as_its_float_model():
    _, moved, _, _ = corrected(MODELS["own"])
    assert load(moved).proto == MODELS["own"]


@pytest.mark.parametrize("chosen", ["y", "z"])
def test_a_partial_strip_restores_only_the_chosen_bias(chosen):
    other = {"y": "z", "z": "y"}[chosen]
    text = SHARED.replace("float[32] b>", "float[32] b, float[32] d>").replace("(x, v, b)", "(x, v, d)")
    _, moved, shifts, _ = corrected(model(text), ("y", "z"))
    part = strip_pairs(moved, {chosen})
    np.testing.assert_array_equal(bias_of(part, chosen), bias_of(model(text), chosen))
    np.testing.assert_allclose(bias_of(part, other), bias_of(model(text), other) + shifts[other], atol=1e-6)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(
            "y",
        ),
        "z",
    ],
)
def test_a_partial_strip_of_a_shared_bias(chosen):
    other = {"y": "z", "z": "y"}[chosen]
    _, moved, shifts, _ = corrected(MODELS["shared"], ("y", "z"))
    part = strip_pairs(moved, {chosen})
    before = bias_of(MODELS["shared"], "y")
    np.testing.assert_allclose(bias_of(part, other), before + shifts[other], atol=1e-6)
    np.testing.assert_array_equal(bias_of(part, chosen), before)


def biases_of(proto):
    """The third inputs of Conv and Gemm."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return [stored[node.input[2]] for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]


def test_in_float16_the_float_bias_comes_back_in_float16():
    _, moved, shifts, _ = corrected(MODELS["own"])
    halved = to_float16(moved).model
    before = bias_of(MODELS["own"], "y")
    (shifted,), (restored,) = biases_of(halved), biases_of(strip_pairs(halved))
    np.testing.assert_array_equal(shifted, (before + shifts["y"]).astype(np.float16))
    np.testing.assert_array_equal(restored, before.astype(np.float16))
    assert restored.dtype == np.float16


def test_the_whole_line_in_float16():
    x = np.abs(feed_of(MODELS["conv"], 64)["x"])
    options = {"float16": True, "method": "percentile:90", "compare": False}
    result = qdq_surgeon.quantize(MODELS["conv"], {"x": x}, **options)
    plain = qdq_surgeon.quantize(MODELS["conv"], {"x": x}, bias_correction=False, **options)
    (shift,) = result.correction.shifts.values()
    assert np.abs(shift).max() > 0.05
    moved = run(result.model, {"x": x})["y"] - run(plain.model, {"x": x})["y"]
    np.testing.assert_allclose(moved, np.broadcast_to(shift[:, None, None], moved.shape), atol=0.01)
    (restored,) = biases_of(strip_pairs(result.model))
    np.testing.assert_array_equal(restored, bias_of(MODELS["conv"], "y").astype(np.float16))


HOSTILE = {
    "no JSON": "{",
    "a list": "[1, 2]",
    "nothing": "",
    "null": "null",
    "other keys": '{"slot": 2, "name": "b", "more": 1}',
    "a slot that is none": '{"slot": 77, "name": "b"}',
    "a slot that is text": '{"slot": "2", "name": "b"}',
    "a name that is a number": '{"slot": 2, "name": 5}',
    "a tensor that is no base64": '{"slot": 2, "name": "b", "tensor": "%%%"}',
    "a tensor that is none": '{"slot": 2, "name": "b", "tensor": "AAAA"}',
    "deep": "[" * 100_000,
    "the slot of the data": '{"slot": 0, "name": "b"}',
}


def with_record(text):
    _, moved, _, _ = corrected(MODELS["own"])
    for node in moved.graph.node:
        for entry in node.metadata_props:
            if entry.key == BIAS_KEY:
                entry.value = text
    return moved


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_edited_by_hand_leaves_the_bias_as_it_is(name):
    moved = with_record(HOSTILE[name])
    stripped = strip_pairs(moved)
    np.testing.assert_array_equal(bias_of(stripped, "y"), bias_of(moved, "y"))
    assert not any(entry.key == BIAS_KEY for node in stripped.graph.node for entry in node.metadata_props)
    run(stripped, feed_of(MODELS["own"]))


def tensor_record(**fields):
    tensor = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[32])
    for name, value in fields.items():
        setattr(tensor, name, value) if not isinstance(value, list) else getattr(tensor, name).extend(value)
    return json.dumps({"slot": 2, "name": "b", "tensor": base64.b64encode(tensor.SerializeToString()).decode()})


def test_a_record_with_a_tensor_of_another_shape_leaves_the_bias_as_it_is():
    moved = with_record(tensor_record(dims=[2], raw_data=bytes(256)))
    np.testing.assert_array_equal(bias_of(strip_pairs(moved), "y"), bias_of(moved, "y"))


def test_a_record_with_a_tensor_that_lies_in_a_file_leaves_the_bias_as_it_is():
    moved = with_record(tensor_record(data_location=TensorProto.EXTERNAL))
    np.testing.assert_array_equal(bias_of(strip_pairs(moved), "y"), bias_of(moved, "y"))


BROKEN = {
    "a tensor without data": tensor_record(),
    "a tensor with too few bytes": tensor_record(raw_data=b"1234"),
    "a name that nobody makes": '{"slot": 2, "name": "nobody"}',
    "the op's own output": '{"slot": 2, "name": "y"}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_would_break_the_model_leaves_the_bias_as_it_is(name):
    moved = with_record(BROKEN[name])
    np.testing.assert_array_equal(bias_of(strip_pairs(moved), "y"), bias_of(moved, "y"))


@pytest.mark.parametrize("name", HOSTILE | BROKEN)
def test_a_hostile_record_gives_one_line_at_worst(name):
    moved = with_record((HOSTILE | BROKEN)[name])
    try:
        qdq_surgeon.quantize(moved, feed_of(MODELS["own"], 16), requantize=True)
    except QdqError as error:
        assert "\n" not in str(error)
