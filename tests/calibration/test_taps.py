"""Tapped tensors hold what onnx's own reference evaluator computes, however the graph is optimized, fed or cut."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdq_surgeon.calibration import taps
from qdq_surgeon.calibration.collection import collect
from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.calibration.statistics import BUCKET_EDGES, FIRST_NON_FINITE
from qdq_surgeon.calibration.taps import Reader, same_values
from qdq_surgeon.errors import DataError, ModelError
from qdq_surgeon.graph import all_nodes
from qdq_surgeon.model import load
from tests.graphs import model, shuffled

CONV_RELU = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
}"""

CONVOLUTIONS = {
    "conv, relu and pool": CONV_RELU,
    "channels of which the last block is not full": """g (float[N,3,8,8] x) => (y)
            <float[20,3,3,3] w, float[20,20,1,1] v> {
        c = Conv<pads=[1,1,1,1]>(x, w)
        r = Relu(c)
        y = Conv(r, v)
    }""",
    "fewer channels than a block": """g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w, float[16,4,1,1] v> {
        c = Conv(x, w)
        y = Conv(c, v)
    }""",
    "depthwise": """g (float[N,3,8,8] x) => (y) <float[32,3,3,3] w, float[32,1,3,3] d, float[16,32,1,1] p> {
        low = Constant<value_float=0.0>()
        high = Constant<value_float=0.1>()
        c = Conv(x, w)
        r = Clip(c, low, high)
        e = Conv<group=32, pads=[1,1,1,1]>(r, d)
        y = Conv(e, p)
    }""",
    "grouped": """g (float[N,3,8,8] x) => (y) <float[32,3,1,1] w, float[32,16,3,3] v, float[6,16,3,3] u> {
        c = Conv(x, w)
        e = Conv<group=2>(c, v)
        y = Conv<group=2>(e, u)
    }""",
    "residual": """g (float[N,3,8,8] x) => (y)
            <float[16,3,1,1] w, float[16,16,3,3] v, float[16,16,3,3] u, float[16] b> {
        c = Conv(x, w, b)
        r = Relu(c)
        e = Conv<pads=[1,1,1,1]>(r, v, b)
        a = Add(e, r)
        s = Relu(a)
        f = Conv<pads=[1,1,1,1]>(s, u)
        z = Add(s, f)
        y = GlobalAveragePool(z)
    }""",
    "concat": """g (float[N,3,8,8] x) => (y)
            <float[16,3,1,1] w, float[32,3,1,1] v, float[8,3,1,1] u, float[16,56,1,1] t> {
        c = Conv(x, w)
        d = Conv(x, v)
        e = Conv(x, u)
        f = Concat<axis=1>(c, d)
        g = Concat<axis=1>(f, e)
        y = Conv(g, t)
    }""",
    "pools": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w> {
        c = Conv(x, w)
        m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)
        a = AveragePool<kernel_shape=[2,2], strides=[2,2]>(m)
        y = GlobalAveragePool(a)
    }""",
    "read in the ordinary layout too": """g (float[N,3,8,8] x) => (y, s)
            <float[16,3,1,1] w, float[16,16,1,1] v> {
        c = Conv(x, w)
        r = Relu(c)
        y = Conv(r, v)
        m = ReduceMean<axes=[2,3], keepdims=0>(r)
        s = Softmax(m)
    }""",
    "read inside of a body": """g (float[N,3,8,8] x, bool some) => (y) <float[16,3,1,1] w, float[16,16,1,1] v> {
        c = Conv(x, w)
        r = Relu(c)
        d = Conv(r, v)
        y = If<
            then_branch = yes () => (float[N,16,8,8] a) { a = Mul(d, r) },
            else_branch = no () => (float[N,16,8,8] b) { b = Add(d, c) }
        >(some)
    }""",
    "graph outputs": """g (float[N,3,8,8] x) => (c, r, y) <float[16,3,1,1] w, float[16,16,1,1] v> {
        c = Conv(x, w)
        r = Relu(c)
        y = Conv(r, v)
    }""",
    "batch normalization": """g (float[N,3,8,8] x) => (y)
            <float[16,3,1,1] w, float[16] s, float[16] b, float[16] m,
            float[16] v = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
        c = Conv(x, w)
        n = BatchNormalization(c, s, b, m, v)
        h = HardSigmoid(n)
        y = Mul(n, h)
    }""",
    "resized": """g (float[N,3,8,8] x) => (y, u)
            <float[16,3,1,1] w, float[16,8,2,2] t, float[4] scales = {1, 1, 2, 2}> {
        c = Conv(x, w)
        u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(c, , scales)
        y = ConvTranspose<strides=[2,2]>(c, t)
    }""",
    "one dimension": """g (float[N,2,32] x) => (y) <float[16,2,5] w, float[16] b> {
        c = Conv<pads=[2,2]>(x, w, b)
        r = LeakyRelu(c)
        y = MaxPool<kernel_shape=[2]>(r)
    }""",
    "squeezed and excited": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w, float[4,16,1,1] s, float[16,4,1,1] e> {
        c = Conv(x, w)
        p = GlobalAveragePool(c)
        d = Conv(p, s)
        r = Relu(d)
        u = Conv(r, e)
        g = Sigmoid(u)
        y = Mul(c, g)
    }""",
}

OTHERS = {
    "attention": """g (float[N,6,16] x) => (y) <float[16,16] q, float[16,16] k, float[16,16] v, float[16,16] o,
            float[16] s, float[16] b, int64[4] heads = {0, 0, 4, 4}, int64[3] joined = {0, 0, 16}> {
        n = LayerNormalization(x, s, b)
        q0 = MatMul(n, q)
        q1 = Reshape(q0, heads)
        q2 = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(n, k)
        k1 = Reshape(k0, heads)
        k2 = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(n, v)
        v1 = Reshape(v0, heads)
        v2 = Transpose<perm=[0,2,1,3]>(v1)
        a0 = MatMul(q2, k2)
        half = Constant<value_float=0.5>()
        a1 = Mul(a0, half)
        a2 = Softmax<axis=-1>(a1)
        c0 = MatMul(a2, v2)
        c1 = Transpose<perm=[0,2,1,3]>(c0)
        c2 = Reshape(c1, joined)
        c3 = MatMul(c2, o)
        y = Add(c3, x)
    }""",
    "gelu": """g (float[N,6,16] x) => (y) <float[16,32] w, float[32] b> {
        m = MatMul(x, w)
        a = Add(m, b)
        root = Constant<value_float=1.41421354>()
        one = Constant<value_float=1.0>()
        half = Constant<value_float=0.5>()
        d = Div(a, root)
        e = Erf(d)
        f = Add(e, one)
        g = Mul(a, f)
        y = Mul(g, half)
    }""",
    "shapes computed on the way": """g (float[N,4,6] x) => (y) <float[6,8] w> {
        s = Shape(x)
        zero = Constant<value_ints=[0]>()
        n = Gather(s, zero)
        rest = Constant<value_ints=[-1, 6]>()
        to = Concat<axis=0>(n, rest)
        f = Reshape(x, to)
        m = MatMul(f, w)
        y = Relu(m)
    }""",
    "weights in Constant nodes": """g (float[N,4] x) => (y) {
        w0 = Constant<value = float[2,4] {1, 2, 3, 4, 5, 6, 7, 8}>()
        w = Transpose<perm=[1,0]>(w0)
        b = Constant<value_floats=[0.5, -0.5]>()
        m = MatMul(x, w)
        y = Add(m, b)
    }""",
    "left out inputs and outputs": """g (float[N,4] x) => (y) <float[4,4] w, float low = {-0.5}> {
        m = MatMul(x, w)
        c = Clip(m, low)
        d, mask = Dropout(c)
        high = Constant<value_float=0.25>()
        y = Clip(d, , high)
    }""",
    "a recurrent layer": """g (float[N,5,4] x) => (y) <float[1,12,4] w, float[1,12,3] r> {
        t = Transpose<perm=[1,0,2]>(x)
        h, = LSTM<hidden_size=3>(t, w, r)
        y = Relu(h)
    }""",
    "If reads tapped tensors": """g (bool some, float[N,4] x) => (y) <float[4,4] w> {
        m = MatMul(x, w)
        t = Tanh(m)
        z = If<
            then_branch = yes () => (float[N,4] a) { a = Add(m, t) },
            else_branch = no () => (float[N,4] b) { b = Sub(m, t) }
        >(some)
        y = Mul(z, t)
    }""",
    "Loop reads tapped tensors": """g (float[N,4] x) => (y) <float[4,4] w, int64 times = {3}, bool go = {1}> {
        m = MatMul(x, w)
        t = Tanh(m)
        z = Loop<body = round (int64 i, bool on, float[N,4] before) => (bool still, float[N,4] after) {
            still = Identity(on)
            after = Add(before, t)
        }>(times, go, m)
        y = Relu(z)
    }""",
    "Scan reads tapped tensors": """g (float[N,3,4] x) => (y) <float[4,4] w> {
        m = MatMul(x, w)
        r = Transpose<perm=[1,0,2]>(m)
        f = ReduceMean<axes=[0], keepdims=0>(r)
        h, z = Scan<num_scan_inputs=1, body = step (float[N,4] before, float[N,4] now)
                => (float[N,4] after, float[N,4] told) {
            after = Add(before, now)
            told = Mul(after, f)
        }>(f, r)
        y = Relu(z)
    }""",
    "a body inside of a body": """g (bool some, float[N,4] x) => (y) <float[4,4] w, float[4] b> {
        m = MatMul(x, w)
        t = Tanh(m)
        z = If<
            then_branch = yes () => (float[N,4] a) {
                a = If<
                    then_branch = both () => (float[N,4] c) { c = Add(m, b) },
                    else_branch = one () => (float[N,4] d) { d = Sub(m, t) }
                >(some)
            },
            else_branch = no () => (float[N,4] e) { e = Neg(t) }
        >(some)
        y = Mul(z, x)
    }""",
    "sequences": """g (float[N,6] x) => (y) <float[6,6] w, int64 first = {0}, int64 second = {1}> {
        m = MatMul(x, w)
        halves = Constant<value_int=3>()
        s = SplitToSequence<axis=1, keepdims=1>(m, halves)
        a = SequenceAt(s, first)
        r = Relu(a)
        b = SequenceAt(s, second)
        y = Add(r, b)
    }""",
    "integers beside": """g (int64[N,5] ids, int64[N,5] mask) => (y)
            <float[7,4] table, float[4,4] w, float penalty = {-10}> {
        e = Gather(table, ids)
        m = MatMul(e, w)
        f = Cast<to=1>(mask)
        p = Mul(f, penalty)
        two = Constant<value_ints=[2]>()
        u = Unsqueeze(p, two)
        a = Add(m, u)
        y = Softmax<axis=1>(a)
    }""",
    "a shape that is fed": """g (float[N,12] x, int64[3] to) => (y) <float[4,4] w> {
        t = Tanh(x)
        r = Reshape(t, to)
        m = MatMul(r, w)
        s = Shape(m)
        n = Reshape(m, s)
        y = Relu(n)
    }""",
    "many outputs": """g (float[N,6] x) => (y) <float[6,6] w, int64[2] parts = {2, 4}> {
        m = MatMul(x, w)
        a, b = Split<axis=1>(m, parts)
        c = Relu(a)
        two = Constant<value_ints=[2]>()
        v, i = TopK<axis=1>(b, two)
        y = Add(c, v)
    }""",
    "a function of the model's own": """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,4] x) => (float[N,4] y) <float[4,4] w> {
        m = MatMul(x, w)
        f = own.twice(m)
        y = Relu(f)
    }
    <domain: "own", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }""",
    "needed much later": """g (float[N,4] x) => (y) <float[4,4] w> {
        a = MatMul(x, w)
        b = Tanh(a)
        c = Exp(b)
        d = Relu(c)
        e = Sqrt(d)
        f = Add(e, a)
        y = Mul(f, x)
    }""",
}
GRAPHS = CONVOLUTIONS | OTHERS
FED = {"to": np.array([0, 3, 4])}


SOME = ("attention", "residual", "concat", "read inside of a body", "a recurrent layer")


@pytest.mark.parametrize("name", GRAPHS)
def test_statistics_equal_those_of_the_reference_evaluator(name):
    assert_as_reference(model(GRAPHS[name]))


@pytest.mark.parametrize("name", GRAPHS)
def test_each_tensor_alone_has_the_same_statistics(name):
    """Without the other taps onnxruntime fuses more, and keeps more of the graph in its blocked layout."""
    proto = model(GRAPHS[name])
    feeds = dict(made_up(load(proto)))
    expected = computed(proto, feeds, floats_of(load(proto)))
    for tensor, values in expected.items():
        if tensor in floats_of(load(proto)):
            assert_statistic(collected(proto, [tensor], feeds)[tensor], values, name=tensor)


@pytest.mark.parametrize("budget", [1, 12_000])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_cut_into_stages_has_the_same_statistics(name, budget, stages_of):
    stages = stages_of(budget)
    assert_as_reference(model(GRAPHS[name]))
    assert len(stages) >= 2 or budget > 1


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_in_which_nodes_are_stored_does_not_matter(name, seed, stages_of):
    proto = model(GRAPHS[name])
    feeds = dict(made_up(load(proto)))
    names = floats_of(load(proto))
    expected = computed(proto, feeds, names)
    stages_of(1)
    for tensor, statistic in collected(shuffled(proto, seed), names, feeds).items():
        assert_statistic(statistic, expected[tensor], name=tensor)


STEPS = (
    "{t} = Conv<pads=[1,1,1,1]>({a}, w, bias)",
    "{t} = Conv<pads=[1,1,1,1], group=16>({a}, depthwise)",
    "{t}c = Concat<axis=1>({a}, {b})\n{t} = Conv({t}c, narrow)",
    "{t} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({a})",
    "{t} = Relu({a})",
    "{t} = Tanh({a})",
    "{t} = Add({a}, {b})",
    "{t} = Mul({a}, {b})",
    "{t} = Transpose<perm=[0,1,3,2]>({a})",
    "{t}f = Flatten({a})\n{t} = Reshape({t}f, back)",
    "{t}g = GlobalAveragePool({a})\n{t} = Add({b}, {t}g)",
    """{t} = If<
        then_branch = yes_{t} () => (float[N,16,4,4] {t}y) {{ {t}y = Add({a}, {b}) }},
        else_branch = no_{t} () => (float[N,16,4,4] {t}n) {{ {t}n = Neg({a}) }}
    >(some)""",
)


@st.composite
def random_graphs(draw):
    names, lines = ["x"], []
    for index in range(draw(st.integers(2, 9))):
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        lines.append(draw(st.sampled_from(STEPS)).format(t=f"t{index}", a=a, b=b))
        names.append(f"t{index}")
    outputs = ", ".join(dict.fromkeys([names[-1], draw(st.sampled_from(names[1:]))]))
    return f"""g (float[N,16,4,4] x, bool some) => ({outputs})
        <float[16,16,3,3] w, float[16] bias, float[16,1,3,3] depthwise,
        float[16,32,1,1] narrow, int64[4] back = {{0, 16, 4, 4}}> {{ {chr(10).join(lines)} }}"""


@settings(max_examples=25, deadline=None, derandomize=True)
@given(random_graphs(), st.sampled_from([1, 8_000, 1 << 28]))
def test_any_graph_cut_anywhere_has_the_statistics_of_the_reference(text, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taps, "RUN_BYTES", budget)
        patch.setattr(taps, "RUN_ELEMENTS", 0)
        assert_as_reference(model(text), samples=2)


BY_OPSET = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[16] b, float[5,144] u, float[5] d> {
    c = Conv(x, w, b)
    r = Relu(c)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    f = Flatten(p)
    g = Gemm<transB=1>(f, u, d)
    s = Sum(g, d)
    y = Sigmoid(s)
}"""


@pytest.mark.parametrize("opset", range(7, 22))
def test_every_opset_is_tapped(opset, stages_of):
    assert_as_reference(model(BY_OPSET, opset), tensors=list("xcrpfgsy"))
    stages_of(1)
    assert_as_reference(model(BY_OPSET, opset), tensors=list("xcrpfgsy"))


@pytest.mark.parametrize("text", [CONV_RELU, GRAPHS["gelu"], GRAPHS["attention"]])
def test_fp16_tensors_are_tapped(text, stages_of):
    proto = model(text.replace("float[", "float16["), opset=19)
    for node in proto.graph.node:
        if node.op_type == "Constant":
            number = helper.make_tensor("number", TensorProto.FLOAT16, [], [node.attribute[0].f])
            node.attribute[0].CopyFrom(helper.make_attribute("value", number))
    assert_as_reference(proto, tolerance=4e-3)
    stages_of(1)
    assert_as_reference(proto, tolerance=4e-3)


# ---- Models as they come ---------------------------------------------------------------------------------------


def inputs_list_the_initializers(proto):
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def shapes_are_declared_wrong(proto):
    for name, shape in (("c", ["N", 16, 4, 4]), ("r", [1, 7])):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 3, 3, 3]))


def nothing_is_declared(proto):
    del proto.graph.value_info[:]
    proto.graph.input[0].type.tensor_type.ClearField("shape")


def numbers_are_not_raw(proto):
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.reshape(-1)))


def the_batch_is_five(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5


def the_batch_is_one(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def names_are_doubled(proto):
    for node in proto.graph.node:
        node.name = "twin"


CHANGES = (
    inputs_list_the_initializers,
    shapes_are_declared_wrong,
    nothing_is_declared,
    numbers_are_not_raw,
    the_batch_is_five,
    the_batch_is_one,
    names_are_doubled,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_may_be_written_in_many_ways(change, stages_of):
    proto = model(CONV_RELU)
    feeds = dict(made_up(load(proto)))
    change(proto)
    assert_as_reference(proto, feeds)
    stages_of(1)
    assert_as_reference(proto, feeds)


def test_sparse_initializers_are_read_like_others(stages_of):
    """The reference evaluator knows none: there the same numbers stand in full."""
    text = "g (float[N,4] x) => (y) <float[4,4] w> { m = MatMul(x, w)\n a = MatMul(m, s)\n y = Relu(a) }"
    sparse, full = model(text), model(text)
    values = helper.make_tensor("s", TensorProto.FLOAT, [3], [1, 2, 3])
    places = helper.make_tensor("places", TensorProto.INT64, [3], [0, 5, 10])
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4, 4]))
    full.graph.initializer.append(numpy_helper.from_array(np.diag(np.float32([1, 2, 3, 0])), "s"))
    assert_as_reference(sparse, reference=full)
    stages_of(1)
    assert_as_reference(sparse, reference=full)


def test_weights_beside_the_model_are_found(tmp_path, stages_of):
    proto = model(GRAPHS["attention"])
    path = tmp_path / "model.onnx"
    onnx.save(model(GRAPHS["attention"]), path, save_as_external_data=True, size_threshold=0, location="weights")
    assert_as_reference(path, reference=proto)
    stages_of(1)
    assert_as_reference(path, reference=proto)


def test_doubled_names_in_bodies_and_functions_do_not_matter(stages_of):
    for name in ("If reads tapped tensors", "a function of the model's own"):
        proto = model(GRAPHS[name])
        for node in (*all_nodes(proto.graph), *(node for function in proto.functions for node in function.node)):
            node.name = "twin"
        assert_as_reference(proto)
        stages_of(1)
        assert_as_reference(proto)
        stages_of(1 << 28)


def test_the_model_stays_as_it_was_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    proto = model(CONV_RELU)
    before = proto.SerializeToString()
    collected(proto, ["c"], {"x": images(2)})
    assert proto.SerializeToString() == before
    assert list(tmp_path.iterdir()) == []


def test_the_statistics_of_a_graph_input_are_those_of_the_data():
    x = images(5)
    statistic = collected(model(CONV_RELU), ["x"], {"x": x})["x"]
    assert (statistic.minimum, statistic.maximum, statistic.count) == (x.min(), x.max(), x.size)


def test_an_input_needs_no_run_of_the_model():
    """onnxruntime does not know the op, and is not asked."""
    proto = model("g (float[N,3,8,8] x) => (float y) { y = Relu(x) }")
    proto.graph.node[0].op_type = "Unheard"
    assert collected(proto, ["x"], {"x": images(2)})["x"].count == 2 * 3 * 8 * 8


def test_what_leads_to_no_tensor_in_question_is_not_run():
    proto = model("g (float[N,3,8,8] x) => (y, z) { y = Relu(x)\n z = Neg(y) }")
    proto.graph.node[1].op_type = "Unheard"
    assert collected(proto, ["y"], {"x": images(2)})["y"].count == 2 * 3 * 8 * 8


def test_what_the_model_makes_of_a_log_of_negatives_is_not_finite():
    proto = model("g (float[N,3,8,8] x) => (y) { y = Log(x) }")
    x = images(4)
    statistic = collected(proto, ["y"], {"x": x})["y"]
    assert (statistic.count, statistic.non_finite) == (np.sum(x > 0), np.sum(x < 0))


def test_a_tensor_without_elements_is_counted_as_such():
    proto = model(
        "g (float[N,4] x) => (y) <int64[1] a = {2}, int64[1] b = {2}, int64[1] ax = {1}> { y = Slice(x, a, b, ax) }"
    )
    statistic = collected(proto, ["y", "x"], {"x": np.ones((3, 4), np.float32)})["y"]
    assert (statistic.count, statistic.amax) == (0, 0)


# ---- Tensors that hold the same values ---------------------------------------------------------------------------

MOVED = """g (float[N,4,6] x) => (y, z) <float[6,8] w, int64[2] flat = {-1, 8}, int64[1] last = {2}> {
    xt = Transpose<perm=[1,0,2]>(x)
    xf = Flatten(xt)
    m = MatMul(x, w)
    i = Identity(m)
    r = Reshape(i, flat)
    f = Flatten(r)
    u = Unsqueeze(f, last)
    s = Squeeze(u, last)
    t = Transpose<perm=[1,0]>(s)
    y = Relu(t)
    z = Neg(xf)
}"""


def test_tensors_that_hold_the_same_values_are_read_once_and_have_one_statistic(monkeypatch):
    names = ["x", "xt", "xf", "m", "i", "r", "f", "u", "s", "t", "y"]
    assert same_values(load(model(MOVED)).graph, names) == dict(
        zip(names, ["x", "x", "x", "m", "m", "m", "m", "m", "m", "m", "y"], strict=True)
    )
    found = collected(model(MOVED), names, {"x": np.random.default_rng(0).standard_normal((3, 4, 6))})
    assert len({id(found[name]) for name in names}) == 3
    assert_as_reference(model(MOVED))


def test_of_tensors_with_the_same_values_the_first_asked_for_is_read_where_the_source_is_not():
    graph = load(model(MOVED)).graph
    assert same_values(graph, ["r", "t", "y"]) == {"r": "r", "t": "r", "y": "y"}
    assert same_values(graph, ["xf"]) == {"xf": "x"}


@pytest.mark.parametrize(
    "line",
    ["m = Expand(a, two)", "m = Gather(a, none)", "m = Cast<to=10>(a)", "m = Tile(a, two)", "m = own.Identity(a)"],
)
def test_other_movers_of_data_may_repeat_drop_or_round(line):
    text = f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,1] x) => (float16 y) <int64[2] two = {{1, 2}}, int64 none = {{0}}> {{
        a = Relu(x)\n {line}\n y = Neg(m) }}
    <domain: "own", opset_import: ["" : 17]> Identity (p) => (q) {{ q = Neg(p) }}"""
    assert same_values(load(model(text)).graph, ["a", "m"]) == {"a": "a", "m": "m"}


# ---- How much is fed at once ---------------------------------------------------------------------------------------

RUNS_ONE_SAMPLE_ONLY = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[1024,16] v, int64[2] flat = {1, 1024}> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    f = Reshape(c, flat)
    y = MatMul(f, v)
}"""
RUNS_EIGHT_SAMPLES_ONLY = RUNS_ONE_SAMPLE_ONLY.replace("{1, 1024}", "{8, 1024}")


@pytest.mark.parametrize("at_once", [1 << 18, 0])
def test_a_model_that_runs_one_sample_at_a_time_is_calibrated_on_all_of_them(at_once, monkeypatch):
    monkeypatch.setattr(taps, "RUN_ELEMENTS", at_once)
    proto, x = model(RUNS_ONE_SAMPLE_ONLY), images(10)
    expected = [computed(proto, {"x": x[i : i + 1]}, ["c", "y"]) for i in range(10)]
    for name, statistic in collected(proto, ["c", "f", "y"], {"x": x}).items():
        assert_statistic(statistic, np.concatenate([sample[name.replace("f", "c")] for sample in expected]))


@pytest.mark.parametrize("at_once", [1 << 18, 0])
def test_a_model_that_runs_whole_batches_only_is_given_whole_batches(at_once, monkeypatch):
    """Exported with a batch of 8, and declared to be open all the same."""
    monkeypatch.setattr(taps, "RUN_ELEMENTS", at_once)
    proto, x = model(RUNS_EIGHT_SAMPLES_ONLY), images(32)
    expected = [computed(proto, {"x": x[i : i + 8]}, ["c", "y"]) for i in range(0, 32, 8)]
    for name, statistic in collected(proto, ["c", "y"], {"x": x}).items():
        assert_statistic(statistic, np.concatenate([batch[name] for batch in expected]))


def test_an_axis_0_that_is_no_batch_is_given_whole_where_it_is_short():
    """Nothing tells the time of a sound from a batch; one number alone would be shorter than the kernel."""
    proto = model("""g (float[T] sound) => (y) <float[16,1,5] w, int64[2] axes = {0, 1}> {
        u = Unsqueeze(sound, axes)
        c = Conv(u, w)
        y = Relu(c)
    }""")
    sounds = [np.random.default_rng(0).standard_normal(length).astype(np.float32) for length in (400, 300)]
    found = collected(proto, ["c", "y"], [{"sound": sound} for sound in sounds])
    expected = [computed(proto, {"sound": sound}, ["c", "y"]) for sound in sounds]
    for name, statistic in found.items():
        assert_statistic(statistic, np.concatenate([values[name].reshape(-1) for values in expected]))


def test_large_samples_are_fed_one_by_one_and_small_ones_together():
    def rows(size):
        loaded = load(model(f"g (float[N,{size}] x) => (y) {{ t = Tanh(x)\n y = Neg(t) }}"))
        batch = next(iter(read_data({"x": np.zeros((32, size), np.float32)}, loaded).batches))
        return Reader(loaded, ["t"], batch).rows

    assert rows(taps.RUN_ELEMENTS) == rows(taps.RUN_ELEMENTS * 2) == 1
    assert rows(taps.RUN_ELEMENTS // 4) == 4
    assert rows(4) >= 32


def test_what_is_cut_into_stages_is_fed_one_sample_at_a_time():
    """A stage cannot be fed what an earlier one gave for one sample after another."""
    assert taps.LEAST_BYTES // taps._WORKING > 4 * taps.RUN_ELEMENTS


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_model_that_onnxruntime_refuses_is_named_in_one_line():
    proto = model(CONV_RELU)
    proto.graph.node[1].domain = "nobody"
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    with pytest.raises(ModelError, match=r"onnxruntime refuses the model.*nobody") as error:
        collected(proto, ["r"], {"x": images(2)})
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_run_on_the_data_is_named_in_one_line():
    """Indices beyond the table."""
    proto = model("g (int64[N] i) => (y) <float[4,2] table> { y = Gather(table, i) }")
    with pytest.raises(DataError, match="onnxruntime cannot run the model on the data") as error:
        collected(proto, ["y"], {"i": np.array([9, 9, 9])})
    assert "\n" not in str(error.value)


# ---- Helpers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages_of(monkeypatch):
    """Call it to cut graphs so that no stage gives more bytes for one sample; it returns the sessions opened since."""

    def limit(budget):
        opened = []
        session = Session
        monkeypatch.setattr(taps, "RUN_BYTES", budget)
        monkeypatch.setattr(taps, "RUN_ELEMENTS", 0)
        monkeypatch.setattr(taps, "Session", lambda *args, **options: opened.append(1) or session(*args, **options))
        return opened

    return limit


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def collected(source, tensors, data):
    loaded = load(source)
    return collect(loaded, tensors, Split(read_data(data, loaded), hold_out=False)).tensors


def assert_as_reference(source, feeds=None, tensors=None, tolerance=1e-5, reference=None, samples=5):
    """Collect the statistics of all float tensors (or of these), and compute them again from the reference's values."""
    loaded = load(source)
    feeds = feeds or dict(made_up(loaded, samples))
    tensors = tensors or floats_of(loaded)
    found = collected(loaded, tensors, feeds)
    assert list(found) == list(tensors)
    expected = computed(reference or source, feeds, tensors)
    for name in tensors:
        assert_statistic(found[name], expected[name], tolerance, name)


def made_up(loaded, samples=5):
    random = np.random.default_rng(0)
    for value in loaded.inputs:
        shape = [dim.dim_value or samples for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        numbers = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
        yield value.name, FED.get(value.name, numbers.astype(dtype))


def floats_of(loaded):
    graph = loaded.graph
    made = [name for node in graph.nodes if not node.scope for name in node.outputs if name and graph.is_float(name)]
    fed = [name for name in graph.inputs if graph.is_float(name)]
    return fed + [name for name in made if not graph.is_constant(name)]


def computed(proto, feeds, tensors):
    """The fed arrays and these tensors, as onnx's reference evaluator computes them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    wanted = [name for name in tensors if name not in feeds]
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    values = ReferenceEvaluator(copy).run(wanted, feeds)
    return feeds | dict(zip(wanted, values, strict=True))


def assert_statistic(statistic, values, tolerance=1e-5, name=""):
    """Exact counts; ranges, and the bucket of every value, but for rounding."""
    values = np.asarray(values, np.float64).reshape(-1)
    finite = values[np.isfinite(values)]
    rounding = tolerance * np.abs(finite).max(initial=0)
    assert (statistic.count, statistic.non_finite) == (finite.size, values.size - finite.size), name
    assert statistic.minimum == pytest.approx(finite.min(), rel=tolerance, abs=rounding), name
    assert statistic.maximum == pytest.approx(finite.max(), rel=tolerance, abs=rounding), name
    below = np.cumsum(statistic.histogram)[: FIRST_NON_FINITE - 1]
    sizes = np.sort(np.abs(finite))
    assert np.all(np.searchsorted(sizes + rounding, BUCKET_EDGES[1:]) <= below), name
    assert np.all(below <= np.searchsorted(sizes - rounding, BUCKET_EDGES[1:])), name
