"""What the view of a graph says of bodies that are not planned, of sparse initializers, and of computed constants."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qdq_surgeon
from qdq_surgeon import folding
from qdq_surgeon.errors import ModelError
from qdq_surgeon.existing import strip_pairs
from qdq_surgeon.graph import Graph
from qdq_surgeon.model import load
from qdq_surgeon.report.explain import explain
from tests.graphs import decisions, model

# ---- bodies of other ops than If, Loop and Scan ------------------------------------------------------------------

MAPPED = """g (float[N,32] x) => (float[N,16] y) <float[16,16] w, float s = {0.05}, int8 z = {0}, int64 i = {0}> {
    half = Constant<value_int=16>()
    parts = SplitToSequence<axis=1>(x, half)
    m = SequenceMap (parts) <
        body = each (float[A,B] e) => (float[A,B] f) {
            q = QuantizeLinear(e, s, z)
            d = DequantizeLinear(q, s, z)
            f = MatMul(d, w)
        }
    >
    h = SequenceAt(m, i)
    y = MatMul(h, w)
}"""


def test_pairs_in_the_body_of_a_sequence_map_stay_and_are_named():
    proto = model(MAPPED)
    loaded = load(proto)
    assert (loaded.existing, loaded.quantized) == ((), None)
    assert loaded.graph.notes == ("SequenceMap m holds Q/DQ pairs in a body that is not planned: they stay",)
    assert strip_pairs(proto) == proto
    assert decisions(proto).splitlines()[:4] == [
        "quantized",
        "  matmul",
        "    h -> MatMul y[0]",
        "    w (axis 1) -> MatMul y[1]",
    ]


def test_a_model_with_a_sequence_map_runs_through_the_whole_line():
    proto = model(MAPPED)
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    result = qdq_surgeon.quantize(proto, {"x": x})
    assert result.comparison.sqnr > 25
    assert strip_pairs(result.model) == proto


def test_the_body_of_a_custom_op_is_left_alone_too():
    proto = model(MAPPED)
    node = proto.graph.node[2]
    node.op_type, node.domain = "Each", "mine"
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    assert "h -> MatMul y[0]" in decisions(proto)
    assert strip_pairs(proto) == proto


CAPTURED = """g (float[N,16,8,8] x) => (float[N,16,8,8] y, float[N,16,8,8] r) <float[16,16,1,1] w, int64 i = {0}> {
    c = Conv(x, w)
    parts = SequenceConstruct(x)
    m = SequenceMap (parts) < body = each (float[A,B,C,D] e) => (float[A,B,C,D] f) { f = Add(e, c) } >
    r = SequenceAt(m, i)
    d = Conv(x, w)
    y = Add(c, d)
}"""


def test_what_such_a_body_captures_is_read_there():
    """Two edges read c, so it cannot be the branch that fuses; d is."""
    graph = load(model(CAPTURED)).graph
    readers = {str(edge): graph.reading_node(edge) for edge in graph.readers("c")}
    assert readers == {"Add y[0]": graph.producer("y"), "Add m.body/f[1]": None}
    assert "residual-add\n    c -> Add y[0]" in decisions(model(CAPTURED))


def test_reading_in_such_a_body_is_reading_in_float():
    """A pool whose output is read there moves no INT8 data, so it gets no pair."""
    text = CAPTURED.replace("y = Add(c, d)", "p = MaxPool<kernel_shape=[1,1]>(d) y = Conv(p, w)")
    assert "d -> MaxPool p[0]" in decisions(model(text))
    assert "d -> MaxPool p[0]" not in decisions(model(text.replace("f = Add(e, c)", "f = Add(e, p)")))


def test_the_same_holds_inside_of_planned_bodies():
    text = """g (float[N,16] x, bool b) => (float[N,16] y) <float[16,16] w, int64 i = {0}> {
        y = If (b) <
            then_branch = yes () => (float[N,16] e) {
                k = MatMul(x, w)
                parts = SequenceConstruct(x)
                m = SequenceMap (parts) < body = each (float[A,B] p) => (float[A,B] q) { q = Add(p, k) } >
                e = SequenceAt(m, i)
            },
            else_branch = no () => (float[N,16] f) { f = Relu(x) }
        >
    }"""
    graph = load(model(text)).graph
    (edge,) = graph.readers("y.then_branch/k")
    assert str(edge) == "Add y.then_branch/m.body/q[1]"
    story = explain(qdq_surgeon.plan(model(text)), graph, "k")
    assert "makes 'y.then_branch/k' for Add y.then_branch/m.body/q[1]: float: it is read in a body that is not" in story


# ---- opsets ------------------------------------------------------------------------------------------------------

OF_MANY_OPSETS = """g (float[N,16,8,8] x, bool c) => (float[N,16] y)
<float[16,16,3,3] w, float[16] b, float[16,16] v, float[16,16] u> {
    k = Conv<pads=[1,1,1,1]>(x, w, b)
    s = Conv<pads=[1,1,1,1]>(x, w)
    a = Add(k, s)
    r = Relu(a)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    g = Gemm(f, v, b)
    y = If (c) <
        then_branch = yes () => (float[N,16] e) { e = MatMul(g, u) },
        else_branch = no () => (float[N,16] h) { h = Neg(g) }
    >
}"""


@pytest.mark.parametrize("opset", range(13, onnx.defs.onnx_opset_version() + 1))
def test_a_model_of_any_opset_runs_through_the_whole_line(opset):
    proto = model(OF_MANY_OPSETS, opset)
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    try:
        ort.InferenceSession(proto.SerializeToString())
    except Exception as error:
        pytest.skip(f"this onnxruntime does not run opset {opset}: {str(error)[:100]}")
    draw = np.random.default_rng(0).standard_normal
    samples = [{"x": draw((4, 16, 8, 8)).astype(np.float32), "c": np.array(index % 2 == 0)} for index in range(8)]
    result = qdq_surgeon.quantize(proto, samples)
    onnx.checker.check_model(result.model, full_check=True)
    ops = {edge.op for site in result.plan.sites for edge in site.edges}
    assert ops >= {"Conv", "Add", "Gemm", "MatMul"}
    assert all(entry.version == opset for entry in result.model.opset_import if not entry.domain)
    assert result.comparison.sqnr > 25


# ---- sparse initializers -----------------------------------------------------------------------------------------


def with_sparse(text, name, values, places, dims):
    proto = model(text)
    stored = numpy_helper.from_array(np.float32(values), name)
    where = numpy_helper.from_array(np.int64(places), f"{name}_places")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(stored, where, dims))
    return proto


@pytest.mark.parametrize("places", [[1, 7, 11], [[0, 1], [1, 3], [2, 3]]], ids=["linear", "by axis"])
def test_the_value_of_a_sparse_initializer_is_written_out(places):
    graph = Graph(with_sparse("g (float[N,3] x) => (y) { y = MatMul(x, w) }", "w", [1, 2, 3], places, [3, 4]))
    expected = np.float32([[0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 3]])
    np.testing.assert_array_equal(graph.value("w"), expected)
    assert (graph.shape("w"), graph.is_float("w"), graph.is_constant("w")) == ((3, 4), True, True)
    assert graph.shape("y") == (None, 4)


def sparse_weight():
    values = np.random.default_rng(0).standard_normal(64)
    text = "g (float[N,32] x) => (float[N,32] y) <float[32,32] v> { m = MatMul(x, w) r = Relu(m) y = MatMul(r, v) }"
    return with_sparse(text, "w", values, np.arange(0, 1024, 16), [32, 32])


def test_a_sparse_weight_is_a_weight_and_its_pair_is_valid():
    proto = sparse_weight()
    assert "w (axis 1) -> MatMul m[1]" in decisions(proto)
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    result = qdq_surgeon.quantize(proto, {"x": x})
    onnx.checker.check_model(result.model)
    (scale,) = [scale for (name, _), scale in result.scales.values.items() if name == "w"]
    dense = np.zeros(1024)
    dense[::16] = numpy_helper.to_array(proto.graph.sparse_initializer[0].values)
    amax = np.abs(dense.reshape(32, 32)).max(0)
    np.testing.assert_allclose(scale, np.where(amax, amax / 127, 1), rtol=1e-6)
    assert result.comparison.sqnr > 25
    assert strip_pairs(result.model) == proto


def test_a_sparse_bias_is_a_bias():
    text = "g (float[N,32] x) => (float[N,32] y) <float[32,32] v> { m = MatMul(x, v) a = Add(m, b) y = MatMul(a, v) }"
    proto = with_sparse(text, "b", [1, -2], [3, 30], [32])
    assert "bias-add\n    m -> Add a[0]\n    b -> Add a[1]" in decisions(proto)
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    assert qdq_surgeon.quantize(proto, {"x": x}).comparison.sqnr > 25


def test_a_sparse_initializer_of_absurd_size_is_not_written_out():
    proto = with_sparse("g (float[N,3] x) => (y) { y = MatMul(x, w) }", "w", [1], [0], [10**6, 10**6])
    with pytest.raises(ModelError, match="the sparse initializer 'w' has 1000000000000 elements"):
        Graph(proto).value("w")


# ---- constants computed from constants -----------------------------------------------------------------------------

UNKNOWN = "a = Max(sizes, ones) f = Cast<to=1>(a) c = Cast<to=7>(f)"
"""What shape inference does not see through."""
TOO_LARGE = {
    "ConstantOfShape": f"{UNKNOWN} w = ConstantOfShape(c)",
    "Expand": f"{UNKNOWN} w = Expand(one, c)",
    "Tile": f"{UNKNOWN} t = Expand(one, ones) w = Tile(t, c)",
    "Range": f"{UNKNOWN} n = ReduceProd<keepdims=0>(c) none = Sub(n, n) step = Div(n, n) w = Range(none, n, step)",
    "a product": f"{UNKNOWN} first, second = Split(c) x1 = Expand(one, first) y1 = Expand(one, second) "
    "minus = Constant<value_ints=[1]>() k = Unsqueeze(x1, minus) none = Constant<value_ints=[0]>() "
    "r = Unsqueeze(y1, none) w = MatMul(k, r)",
    "broadcasting": f"{UNKNOWN} first, second = Split(c) x1 = Expand(one, first) y1 = Expand(one, second) "
    "minus = Constant<value_ints=[1]>() k = Unsqueeze(x1, minus) w = Add(k, y1)",
    "padding": f"{UNKNOWN} t = Expand(one, ones) none = Constant<value_ints=[0, 0]>() p = Concat<axis=0>(none, c) "
    "w = Pad(t, p)",
    "many that are held": f"{UNKNOWN} q = Constant<value_ints=[40, 40]>() b = ConstantOfShape(q) d = Neg(b) e = Abs(b) "
    "w = Concat<axis=0>(b, d, e)",
}


@pytest.mark.parametrize("nodes", TOO_LARGE.values(), ids=TOO_LARGE)
def test_no_constant_grows_beyond_the_limit_though_its_shape_is_unknown(nodes, monkeypatch):
    """The limit is set low, so that a test that fails does not take the machine with it."""
    monkeypatch.setattr(folding, "LEAST_LIMIT", 4096)
    sizes = "int64[2] sizes = {100, 100}, int64[2] ones = {1, 1}, float[1] one = {1.0}"
    made = []
    evaluated = folding._evaluated
    monkeypatch.setattr(folding, "_evaluated", lambda *given: made.append(evaluated(*given)) or made[-1])
    graph = load(model(f"g (float[N,100] x) => (y) <{sizes}> {{ {nodes} y = MatMul(x, w) }}")).graph
    assert graph.is_constant("w")
    with pytest.raises(ModelError, match=r"the constant 'w' cannot be computed: '\w+' has \d+ elements"):
        graph.value("w")
    assert made
    assert max(np.size(value) for values in made for value in values.values()) <= 4096
    assert graph.known_value("w") is None


def test_24_gigabytes_that_a_few_bytes_ask_for_are_not_tried():
    sizes = "int64[2] s = {64, 100000000}, int64[2] o = {1, 1}"
    text = "a = Max(s, o) f = Cast<to=1>(a) c = Cast<to=7>(f) w = ConstantOfShape(c) y = MatMul(x, w)"
    with pytest.raises(ModelError, match="'w' has 6400000000 elements"):
        load(model(f"g (float[N,64] x) => (y) <{sizes}> {{ {text} }}")).graph.value("w")


def test_the_limit_grows_with_the_weights_of_the_model(monkeypatch):
    monkeypatch.setattr(folding, "LEAST_LIMIT", 1)
    graph = load(
        model("g (float[N,64] x) => (y) <float[64,64] v> { t = Transpose(v) n = Neg(t) y = MatMul(x, n) }")
    ).graph
    np.testing.assert_array_equal(graph.value("n"), -graph.value("v").T)


COMPUTED = {
    "arithmetic": "a = Mul(v, v) w = Sub(a, v)",
    "shapes": "s = Shape(v) h = Constant<value_ints=[3]>() z = Mul(s, h) w = ConstantOfShape<value=float[1]{0.5}>(z)",
    "data-dependent sizes": "n = NonZero(v) i = Cast<to=1>(n) w = Transpose(i)",
    "a sequence": "h = Constant<value_int=2>() s = SplitToSequence<axis=0>(v, h) o = Constant<value_int=1>() "
    "w = SequenceAt(s, o)",
    "joined again": "h = Constant<value_int=2>() s = SplitToSequence<axis=0>(v, h) w = ConcatFromSequence<axis=1>(s)",
    "several outputs": "a, b = Split<axis=0>(v) w = Add(a, b)",
    "an optional input left out": "k = Constant<value_float=0.01>() w = Clip(v, , k)",
    "a lookup": "i = Constant<value_ints=[3, 1, 0]>() w = Gather(v, i)",
}


@pytest.mark.parametrize("nodes", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_constant_is_what_onnxruntime_computes(nodes):
    proto = model(f"g (float[4,4] x) => (y) <float[4,4] v> {{ {nodes} y = Identity(x) }}")
    proto.graph.output.append(helper.make_empty_tensor_value_info("w"))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    expected = session.run(["w"], {"x": np.zeros((4, 4), np.float32)})[0]
    found = load(proto).graph.value("w")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == expected.dtype


# ---- types ---------------------------------------------------------------------------------------------------------


def test_types_are_those_of_sequences_and_optional_values_too():
    proto = model("""<ir_version: 8, opset_import: ["" : 18, "mine" : 1]>
    g (float[N,4] x, seq(int64[A]) s, optional(float[B]) o) => (float[N,4] y, bool h) {
        q = SequenceConstruct(x, x)
        u = mine.Unknown(q, s)
        h = OptionalHasElement(o)
        y = mine.Unknown(u)
    }""")
    graph = load(proto).graph
    tensor = helper.make_tensor_type_proto
    assert graph.type("x") == tensor(TensorProto.FLOAT, None)
    assert graph.type("s") == helper.make_sequence_type_proto(tensor(TensorProto.INT64, None))
    assert graph.type("o") == helper.make_optional_type_proto(tensor(TensorProto.FLOAT, None))
    assert graph.type("q") == helper.make_sequence_type_proto(tensor(TensorProto.FLOAT, None))
    assert graph.type("u") is None
    assert not graph.is_float("q")
