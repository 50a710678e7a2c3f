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
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.calibration.statistics import BUCKET_EDGES, FIRST_NON_FINITE
from qdq_surgeon.calibration.taps import Reader, same_values
from qdq_surgeon.errors import DataError, ModelError
from qdq_surgeon.model import load
from tests.graphs import model, shuffled

CONV_RELU = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
}"""

CONVOLUTIONS = {
    "conv, relu and pool": CONV_RELU,
    "channels of which the last block is not full": """g (float[N,3,8,8] x) => (y) <float[20,3,3,3] w, float[20,20,1,1] v> {
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
    "residual": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w, float[16,16,3,3] v, float[16,16,3,3] u, float[16] b> {
        c = Conv(x, w, b)
        r = Relu(c)
        e = Conv<pads=[1,1,1,1]>(r, v, b)
        a = Add(e, r)
        s = Relu(a)
        f = Conv<pads=[1,1,1,1]>(s, u)
        z = Add(s, f)
        y = GlobalAveragePool(z)
    }""",
    "concat": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w, float[32,3,1,1] v, float[8,3,1,1] u, float[16,56,1,1] t> {
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
    "read in the ordinary layout too": """g (float[N,3,8,8] x) => (y, s) <float[16,3,1,1] w, float[16,16,1,1] v, int64[1] axes = {1}> {
        c = Conv(x, w)
        r = Relu(c)
        y = Conv(r, v)
        m = ReduceMean<axes=[2,3], keepdims=0>(r)
        s = Softmax(m)
    }""",
    "read inside of a body": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w, float[16,16,1,1] v> {
        c = Conv(x, w)
        r = Relu(c)
        d = Conv(r, v)
        s = ReduceSum<keepdims=0>(d)
        zero = Constant<value_float=0.0>()
        some = Greater(s, zero)
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
    "batch normalization": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w, float[16] s, float[16] b, float[16] m, float[16] v = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
        c = Conv(x, w)
        n = BatchNormalization(c, s, b, m, v)
        h = HardSigmoid(n)
        y = Mul(n, h)
    }""",
    "resized": """g (float[N,3,8,8] x) => (y) <float[16,3,1,1] w, float[16,8,2,2] t, float[4] scales = {1, 1, 2, 2}> {
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
    "If reads tapped tensors": """g (float[N,4] x) => (y) <float[4,4] w, float limit = {0.0}> {
        m = MatMul(x, w)
        t = Tanh(m)
        s = ReduceSum<keepdims=0>(m)
        some = Greater(s, limit)
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


@pytest.mark.parametrize("name", GRAPHS)
def test_statistics_equal_those_of_the_reference_evaluator(name):
    assert_as_reference(model(GRAPHS[name]))


def assert_as_reference(proto, feeds=None, tensors=None, tolerance=1e-5, **options):
    """Collect the statistics of all float tensors (or of these), and compute them again from the reference's values."""
    loaded = load(proto)
    feeds = feeds or {value.name: array for value, array in made_up(loaded)}
    tensors = tensors or floats_of(loaded)
    split = Split(read_data(feeds, loaded), hold_out=False)
    found = collect(loaded, tensors, split, **options)
    assert list(found.tensors) == list(tensors)
    expected = computed(proto, feeds, tensors)
    for name in tensors:
        assert_statistic(found.tensors[name], expected[name], tolerance, name)


def made_up(loaded, samples=5):
    random = np.random.default_rng(0)
    for value in loaded.inputs:
        shape = [dim.dim_value or samples for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        yield value, random.standard_normal(shape).astype(dtype)


def floats_of(loaded):
    graph = loaded.graph
    made = [name for node in graph.nodes for name in node.outputs if name and graph.is_float(name)]
    fed = [name for name in graph.inputs if graph.is_float(name)]
    return fed + [name for name in made if not graph.is_constant(name)]


def computed(proto, feeds, tensors):
    """The tensors as onnx's reference evaluator computes them."""
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
