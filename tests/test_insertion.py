"""Insertion adds pairs and changes input slots, nothing else: taking the pairs out again gives the input back."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import qdq_surgeon
from qdq_surgeon.calibration.counting import Accumulator
from qdq_surgeon.calibration.statistics import Origin, Statistics
from qdq_surgeon.errors import PlanError
from qdq_surgeon.scales import tensors_to_calibrate
from tests.graphs import model, shuffled

CONV = "g (float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,16,3,3] w> { y = Conv(x, w) }"

RESIDUAL = """g (float[N,16,8,8] x) => (float[N,16,8,8] z) <float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    s = Add(c2, x)
    z = Relu(s)
}"""

CLASSIFIER = """g (float[N,3,8,8] x) => (float[N,16] y)
<float[32,3,8,8] w, float[32] b, float[16,32] fw, float[16] fb> {
    c = Conv(x, w, b)
    r = Relu(c)
    f = Flatten(r)
    y = Gemm<transB=1>(f, fw, fb)
}"""

TWO_READERS = """g (float[N,16,8,8] x) => (float[N,16,6,6] y, float[N,16,8,8] z) <float[16,16,3,3] w> {
    y = Conv(x, w)
    z = Sigmoid(x)
}"""

SHARED_WEIGHT = """g (float[N,32] x) => (float[N,32] y, float[N,32] z) <float[32,32] w> {
    y = MatMul(x, w)
    z = Gemm<transB=1>(x, w)
}"""

TWICE_THE_SAME = """g (float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,16,3,3] w> {
    d = Add(x, x)
    y = Conv(d, w)
}"""

CAPTURED_BY_A_BODY = """g (float[N,16,8,8] x, bool if_true) => (float[N,16,8,8] z) <float[16,16,3,3] w> {
    r = Relu(x)
    y = Conv<pads=[1,1,1,1]>(r, w)
    z = If (if_true) <
        then_branch = yes () => (float[N,16,8,8] a) { a = Add(r, y) },
        else_branch = no () => (float[N,16,8,8] b) { b = Sub(r, y) }
    >
}"""

FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1], domain: "a.domain", model_version: 7>
g (float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,16,3,3] w> {
    t = local.twice(x)
    y = Conv(t, w)
}
<domain: "local", opset_import: ["" : 17]>
twice (a) => (b) { b = Add(a, a) }"""

CONSTANT_NODE = """g (float[N,32] x) => (float[N,24] y) <float[24,32] w> {
    t = Transpose(w)
    y = MatMul(x, t)
}"""

TAKEN_NAMES = """g (float[N,16,8,8] x, float[N,1] x_scale) => (float[N,16,6,6] y, float[N,1] u)
<float[16,16,3,3] w, float[1] w_zero_point> {
    x_quantized = Relu(x_scale)
    x_dequantized = Add(x_quantized, w_zero_point)
    x_QuantizeLinear = Neg(x_dequantized)
    u, x_zero_point = Dropout(x_QuantizeLinear)
    y = Conv(x, w)
}"""

MODELS = {
    "conv": CONV,
    "residual": RESIDUAL,
    "classifier": CLASSIFIER,
    "two readers": TWO_READERS,
    "shared weight": SHARED_WEIGHT,
    "twice the same": TWICE_THE_SAME,
    "captured by a body": CAPTURED_BY_A_BODY,
    "function": FUNCTION,
    "constant node": CONSTANT_NODE,
    "taken names": TAKEN_NAMES,
}


# ---- removing the pairs gives the input back ---------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_taking_the_pairs_out_gives_the_input_back_byte_for_byte(name):
    proto = decorated(model(MODELS[name]))
    quantized = inserted(proto)
    assert pairs_of(quantized)
    assert_same_model(stripped(quantized), proto)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("placement", ["tensorrt-all-add-inputs", "tflite", "weights-only"])
def test_so_it_does_under_the_other_presets(name, placement):
    proto = decorated(model(MODELS[name]))
    assert_same_model(stripped(inserted(proto, placement=placement)), proto)


@pytest.mark.parametrize("opset", [13, 17, 19, 21])
def test_so_it_does_for_every_opset(opset):
    proto = decorated(model(RESIDUAL, opset))
    assert_same_model(stripped(inserted(proto)), proto)


def test_a_raised_opset_is_the_only_other_difference():
    proto = decorated(model(RESIDUAL, 11))
    for index, node in enumerate(proto.graph.node):
        node.name = f"node{index}"
    result = stripped(inserted(proto))
    assert result.opset_import[0].version == 13
    result.opset_import[0].version = 11
    assert_same_model(result, proto)


@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_a_valid_model(name):
    onnx.checker.check_model(inserted(decorated(model(MODELS[name]))), full_check=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_input_is_left_as_it_was(name):
    proto = decorated(model(MODELS[name]))
    before = proto.SerializeToString()
    inserted(proto)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("name", MODELS)
def test_the_same_input_gives_the_same_bytes(name):
    first, second = (inserted(model(MODELS[name])) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_plan_applies_to_the_same_graph_stored_in_another_order():
    proto = model(TWO_READERS)
    plan, turned = qdq_surgeon.plan(proto), shuffled(proto, 3)
    result = qdq_surgeon.insert(turned, plan, scales_for(proto, plan))
    assert_same_model(stripped(result), turned)


# ---- the pairs themselves ----------------------------------------------------------------------------------


def test_each_pair_is_a_quantize_and_a_dequantize_of_one_scale_and_zero_point():
    for quantize, dequantize in pairs_of(inserted(model(RESIDUAL))):
        assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert dequantize.input[0] == quantize.output[0]
        assert list(quantize.input[1:]) == list(dequantize.input[1:])
        assert quantize.attribute == dequantize.attribute


def test_zero_points_are_int8_zeros_in_the_shape_of_the_scale():
    quantized = inserted(model(CLASSIFIER))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    for quantize, _ in pairs_of(quantized):
        scale, zero_point = (constants[name] for name in quantize.input[1:])
        assert zero_point.dtype == np.int8
        assert zero_point.shape == scale.shape
        assert not zero_point.any()


def test_the_axis_is_written_for_weights_and_only_there():
    axes = {
        quantize.input[0]: [(item.name, item.i) for item in quantize.attribute]
        for quantize, _ in pairs_of(inserted(model(CLASSIFIER)))
    }
    assert axes == {"x": [], "w": [("axis", 0)], "f": [], "fw": [("axis", 0)]}


def test_a_weight_read_along_both_axes_has_two_pairs():
    quantized = inserted(model(SHARED_WEIGHT))
    axes = [quantize.attribute[0].i for quantize, _ in pairs_of(quantized) if quantize.input[0] == "w"]
    assert sorted(axes) == [0, 1]


def test_scales_are_those_that_were_chosen():
    proto = model(CLASSIFIER)
    plan = qdq_surgeon.plan(proto)
    scales = scales_for(proto, plan)
    quantized = qdq_surgeon.insert(proto, plan, scales)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    written = {quantize.input[0]: constants[quantize.input[1]] for quantize, _ in pairs_of(quantized)}
    assert written.keys() == {tensor for tensor, _ in scales.values}
    for (tensor, _), scale in scales.values.items():
        np.testing.assert_array_equal(written[tensor], scale)


def test_each_pair_names_the_rules_that_placed_it():
    rules = {
        quantize.input[0]: [entry.value for entry in quantize.metadata_props]
        for quantize, _ in pairs_of(inserted(model(RESIDUAL)))
    }
    assert rules["w2"] == ["conv"]
    assert rules["x"] == ["conv, residual-add"]


def test_every_edge_of_the_plan_reads_its_pair_and_no_other_does():
    quantized = inserted(model(RESIDUAL))
    behind_pairs = {
        f"{node.output[0]}[{slot}]"
        for node in quantized.graph.node
        for slot, tensor in enumerate(node.input)
        if not is_ours(node) and origin(quantized, tensor) != tensor
    }
    assert behind_pairs == {"c1[0]", "c1[1]", "c2[0]", "c2[1]", "s[1]"}


def test_readers_kept_float_read_the_float_tensor():
    quantized = inserted(model(TWO_READERS))
    nodes = {node.op_type: node for node in quantized.graph.node}
    assert nodes["Sigmoid"].input[0] == "x"
    assert nodes["Conv"].input[0] != "x"
    assert origin(quantized, nodes["Conv"].input[0]) == "x"


def test_a_body_reads_the_float_tensor():
    (branching,) = (node for node in inserted(model(CAPTURED_BY_A_BODY)).graph.node if node.op_type == "If")
    for item in branching.attribute:
        assert list(item.g.node[0].input) == ["r", "y"]


def test_new_names_avoid_those_of_the_graph():
    proto = model(TAKEN_NAMES)
    theirs = {name for node in proto.graph.node for name in (*node.input, *node.output, node.name) if name}
    quantized = inserted(proto)
    made = [name for pair in pairs_of(quantized) for node in pair for name in (*node.output, node.name)]
    made += [tensor.name for tensor in quantized.graph.initializer][len(proto.graph.initializer) :]
    assert len(made) == len(set(made))
    assert not theirs & set(made)


def test_new_names_avoid_those_inside_bodies():
    text = CAPTURED_BY_A_BODY.replace("a) { a = Add(r, y) }", "a) { r_scale = Add(r, y)\n a = Neg(r_scale) }")
    quantized = inserted(model(text))
    assert "r_scale" not in {tensor.name for tensor in quantized.graph.initializer}
    onnx.checker.check_model(quantized, full_check=True)


def test_the_model_says_how_it_was_made():
    proto = model(CONV)
    proto.metadata_props.add(key="author", value="somebody")
    written = {entry.key: entry.value for entry in inserted(proto).metadata_props}
    assert written.pop("author") == "somebody"
    assert {key: written["qdq_surgeon." + key] for key in ("placement", "method", "data", "samples")} == {
        "placement": "tensorrt",
        "method": "max",
        "data": "given",
        "samples": "3",
    }


def test_edges_that_cannot_share_a_scale_stay_float():
    text = """g (float[N,16,8,8] a, float[N,16,8,8] b) => (z) <float[16,32,3,3] w> {
        y = Concat<axis=1>(a, b)
        z = Conv(y, w)
    }"""
    quantized = inserted(model(text), a=[1.0], b=[50.0], y=[50.0])
    (concat,) = (node for node in quantized.graph.node if node.op_type == "Concat")
    assert list(concat.input) == ["a", "b"]
    assert {quantize.input[0] for quantize, _ in pairs_of(quantized)} == {"y", "w"}


# ---- numbers -----------------------------------------------------------------------------------------------


def test_onnxruntime_computes_what_rounding_by_hand_gives():
    proto = model(CLASSIFIER)
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    plan = qdq_surgeon.plan(proto)
    scales = qdq_surgeon.choose(proto, plan, qdq_surgeon.calibrate(proto, plan, {"x": x}), "max")
    rounding = {tensor: (scale.astype(np.float64), axis) for (tensor, axis), scale in scales.values.items()}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}

    c = by_reference("Conv", rounded(x, *rounding["x"]), rounded(weights["w"], *rounding["w"]), weights["b"])
    f = np.maximum(c, 0).reshape(4, -1)
    y = rounded(f, *rounding["f"]) @ rounded(weights["fw"], *rounding["fw"]).T + weights["fb"]

    np.testing.assert_allclose(run(qdq_surgeon.insert(proto, plan, scales), x), y, rtol=1e-5, atol=1e-6)


def test_an_fp16_model_gets_fp16_pairs_and_runs():
    proto = decorated(
        model("g (float16[N,32] x) => (float16[N,24] y) <float16[32,24] w> { y = MatMul(x, w) }", opset=19)
    )
    quantized = inserted(proto, x=[-4.0, 4.0])
    onnx.checker.check_model(quantized, full_check=True)
    assert_same_model(stripped(quantized), proto)
    scale_names = {quantize.input[1] for quantize, _ in pairs_of(quantized)}
    types = {tensor.data_type for tensor in quantized.graph.initializer if tensor.name in scale_names}
    assert types == {TensorProto.FLOAT16}
    x = np.random.default_rng(0).uniform(-3, 3, (5, 32)).astype(np.float16)
    expected = x.astype(np.float32) @ numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float32)
    np.testing.assert_allclose(run(quantized, x), expected, atol=0.05 * np.abs(expected).max())


def test_a_bf16_model_gets_bf16_scales():
    proto = decorated(
        model("g (bfloat16[N,32] x) => (bfloat16[N,24] y) <bfloat16[32,24] w> { y = MatMul(x, w) }", opset=19)
    )
    quantized = inserted(proto)
    onnx.checker.check_model(quantized, full_check=True)
    assert_same_model(stripped(quantized), proto)
    types = {tensor.data_type for tensor in quantized.graph.initializer if tensor.name.endswith("_scale")}
    assert types == {TensorProto.BFLOAT16}


# ---- what is refused, and what is nothing ------------------------------------------------------------------


def test_a_plan_of_another_model_is_refused():
    proto, other = model(CONV), model(RESIDUAL)
    plan = qdq_surgeon.plan(other)
    with pytest.raises(PlanError, match="the plan belongs to another model"):
        qdq_surgeon.insert(proto, plan, scales_for(other, plan))


def test_scales_of_another_model_are_refused():
    proto, other = model(CONV), model(RESIDUAL)
    with pytest.raises(PlanError, match="the scales belong to another model"):
        qdq_surgeon.insert(proto, qdq_surgeon.plan(proto), scales_for(other, qdq_surgeon.plan(other)))


def test_a_plan_without_sites_gives_the_model_as_it_was_given():
    """At opset 11: nothing is added, so nothing needs to be raised."""
    proto = decorated(model("g (float[N,3] x) => (y) { y = Relu(x) }", 11))
    plan = qdq_surgeon.plan(proto)
    result = qdq_surgeon.insert(proto, plan, scales_for(proto, plan))
    assert result.SerializeToString() == proto.SerializeToString()
    assert result is not proto


# ---- helpers -----------------------------------------------------------------------------------------------


def inserted(proto, placement="tensorrt", **values):
    plan = qdq_surgeon.plan(proto, placement=placement)
    return qdq_surgeon.insert(proto, plan, scales_for(proto, plan, **values))


def scales_for(proto, plan, **values):
    """Scales under method max of a model whose activations take the given values (default: 1)."""
    tensors = {}
    for name in tensors_to_calibrate(plan):
        accumulator = Accumulator()
        accumulator.add(np.asarray(values.get(name, [1.0]), np.float32))
        tensors[name] = accumulator.result()
    found = Statistics(tensors, qdq_surgeon.load(proto).digest, Origin(("a test",), "0", 3))
    return qdq_surgeon.choose(proto, plan, found, "max")


def decorated(proto):
    """The model with everything that a careless rewrite would lose."""
    proto.doc_string, proto.producer_name, proto.producer_version = "of the model", "a test", "1"
    proto.metadata_props.add(key="author", value="somebody")
    graph = proto.graph
    graph.doc_string = "of the graph"
    graph.metadata_props.add(key="of", value="graph")
    for index, node in enumerate(graph.node):
        node.doc_string = f"node {index}"
        node.metadata_props.add(key="index", value=str(index))
    for index, tensor in enumerate(graph.initializer):
        tensor.doc_string = f"weight {index}"
    if graph.initializer:
        first = graph.initializer[0]
        graph.input.append(helper.make_tensor_value_info(first.name, first.data_type, list(first.dims)))
        annotation = graph.quantization_annotation.add(tensor_name=first.name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=first.name)
    graph.initializer.append(numpy_helper.from_array(np.arange(3, dtype=np.int64), "read_by_nobody"))
    return proto


def is_ours(node):
    return any(entry.key == "qdq_surgeon.rule" for entry in node.metadata_props)


def pairs_of(proto):
    """Each of our QuantizeLinear nodes with the DequantizeLinear that reads it."""
    ours = [node for node in proto.graph.node if is_ours(node)]
    readers = {node.input[0]: node for node in ours if node.op_type == "DequantizeLinear"}
    return [(node, readers[node.output[0]]) for node in ours if node.op_type == "QuantizeLinear"]


def origin(proto, tensor):
    """The tensor in front of our nodes."""
    made_from = {node.output[0]: node.input[0] for node in proto.graph.node if is_ours(node)}
    while tensor in made_from:
        tensor = made_from[tensor]
    return tensor


def stripped(proto):
    """The model without our nodes, their constants and our metadata. Shares no code with the package."""
    result = ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    constants = {name for node in graph.node if is_ours(node) for name in node.input[1:]}
    theirs = [node for node in graph.node if not is_ours(node)]
    for node in theirs:
        restore(node, proto)
    constants -= {name for node in theirs for name in names_read(node)}
    replace(graph.node, theirs)
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in constants])
    replace(result.metadata_props, [e for e in result.metadata_props if not e.key.startswith("qdq_surgeon.")])
    return result


def restore(node, proto):
    """Let a node, and those in its bodies, read what they read before."""
    for slot, tensor in enumerate(node.input):
        node.input[slot] = origin(proto, tensor)
    for item in node.attribute:
        for inner in item.g.node:
            restore(inner, proto)


def names_read(node):
    yield from node.input
    for item in node.attribute:
        if item.type == AttributeProto.GRAPH:
            for inner in item.g.node:
                yield from names_read(inner)


def replace(field, items):
    copies = [type(item)() for item in items]
    for copy, item in zip(copies, items, strict=True):
        copy.CopyFrom(item)
    del field[:]
    field.extend(copies)


def assert_same_model(result, expected):
    assert [node.op_type for node in result.graph.node] == [node.op_type for node in expected.graph.node]
    assert [tensor.name for tensor in result.graph.initializer] == [t.name for t in expected.graph.initializer]
    assert result == expected
    assert result.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def rounded(values, scale, axis):
    """Fake quantization in float64: to the nearest of 256 levels, ties to even, and back."""
    if axis is not None:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    return np.float32(scale * np.clip(np.rint(values / scale), -128, 127))


def by_reference(op, *arrays):
    names = [f"input{index}" for index in range(len(arrays))]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape) for name, a in zip(names, arrays, strict=True)
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    one_node = helper.make_graph([helper.make_node(op, names, ["y"])], "one", inputs, [output])
    return ReferenceEvaluator(helper.make_model(one_node)).run(None, dict(zip(names, arrays, strict=True)))[0]


def run(proto, x):
    """onnxruntime without any optimization."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]
