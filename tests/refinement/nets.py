"""Small networks, and what it takes to quantize and run them. Tests say `from tests.refinement.nets import ...`."""

import numpy as np
from onnx import numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.model import load
from qdq_surgeon.pipeline import calibrate, choose, insert
from tests.graphs import model

RESIDUAL = """g (float[N,16,8,8] x) => (float[N,16,8,8] z) <float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    s = Add(c2, x)
    z = Relu(s)
}"""

CONCAT = """g (float[N,16,8,8] x) => (float[N,16,8,8] y)
<float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,32,1,1] w3> {
    a = Conv<pads=[1,1,1,1]>(x, w1)
    b = Conv<pads=[1,1,1,1]>(x, w2)
    ra = Relu(a)
    rb = Relu(b)
    t = Concat<axis=1>(ra, rb)
    y = Conv(t, w3)
}"""

OUTPUTS = """g (float[N,16,8,8] x) => (float[N,16,8,8] r, float[N,16] y, float[N,16,4,4] p)
<float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16,1024] fw, float[16] fb> {
    c = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, w2)
    f = Flatten(d)
    y = Gemm<transB=1>(f, fw, fb)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
}"""
"""Three outputs; one of them, r, is read by the next op too."""

WITH_IF = """g (float[N,16] x) => (float[N,16] z) <float[16,16] w, float[16] b, float[16,16] v, float limit = {0}> {
    y = Gemm(x, w, b)
    r = Relu(y)
    m = ReduceMean<keepdims=0>(x)
    t = Greater(m, limit)
    o = If (t) <
        then_branch = yes () => (float[N,16] a) { q = Gemm(r, v)\n a = Add(q, y) },
        else_branch = no () => (float[N,16] d) { d = Gemm(y, v) }
    >
    z = Gemm(o, w)
}"""

WITH_LOOP = """g (float[N,16] x) => (float[N,16] z) <float[16,16] w, float[16] b, float[16,16] v, int64 three = {3}> {
    y = Gemm(x, w, b)
    yes = Constant<value = bool {1}>()
    l = Loop (three, yes, y) <body = again (int64 i, bool going, float[N,16] state) => (bool on, float[N,16] next) {
        on = Identity(going)
        u = MatMul(state, v)
        s = Add(u, y)
        next = Relu(s)
    }>
    z = Gemm(l, w)
}"""

NETS = {
    "residual": (RESIDUAL, (16, 8, 8)),
    "concat": (CONCAT, (16, 8, 8)),
    "several outputs": (OUTPUTS, (16, 8, 8)),
    "If": (WITH_IF, (16,)),
    "Loop": (WITH_LOOP, (16,)),
}


def rows(count, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def singles(x):
    """Each sample as a batch of its own."""
    return [Batch({"x": x[index : index + 1]}, 1) for index in range(len(x))]


def prepared(text_or_proto, x, opset=17, **filters):
    """The loaded model, its plan, and the model with pairs, calibrated on x."""
    source = load(model(text_or_proto, opset) if isinstance(text_or_proto, str) else text_or_proto)
    plan = qdq_surgeon.plan(source, **filters)
    scales = choose(source, plan, calibrate(source, plan, {"x": x}))
    return source, plan, insert(source, plan, scales)


def run(proto, feed, simulate=False):
    """All outputs by name."""
    session = Session(proto, simulate=simulate)
    return dict(zip(session.outputs, session.run(Batch(feed, 1), session.outputs)[0], strict=True))


def with_weights(proto, **values):
    """A copy of a model with these initializers."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(values[tensor.name], np.float32), tensor.name))
    return copy


def weight(proto, name):
    return numpy_helper.to_array(next(tensor for tensor in proto.graph.initializer if tensor.name == name)).copy()
