"""What the engine did with every pair, on small siblings of real networks. Built with TensorRT-RTX."""

import numpy as np
import onnx
import pytest

import qdq_surgeon
from qdq_surgeon.report.html import audit_page
from qdq_surgeon.tensorrt.audit import audit
from tests.graphs import typed as model

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'qdq-surgeon[rtx]'")
pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'qdq-surgeon[rtx]'")

TWO_CONVS = """g (float[1,16,16,16] x) => (y) <float[16,16,3,3] w, float[32,16,3,3] v> {
  a = Conv<pads=[1,1,1,1]>(x, w)
  b = Relu(a)
  y = Conv<pads=[1,1,1,1]>(b, v)
}"""
BOTTLENECK = """g (float[1,32,16,16] x) => (y) <float[16,32,1,1] w1, float[16,16,3,3] w2, float[64,16,1,1] w3,
  float[64,32,1,1] w4, float[32,64] w5> {
  a = Conv(x, w1) b = Relu(a)
  c = Conv<pads=[1,1,1,1]>(b, w2) d = Relu(c)
  e = Conv(d, w3) s = Conv(x, w4)
  f = Add(e, s) h = Relu(f)
  p = GlobalAveragePool(h) q = Flatten(p)
  y = Gemm<transB=1>(q, w5)
}"""
INVERTED = """g (float[1,16,16,16] x) => (y) <float[64,16,1,1] w1, float[64,1,3,3] w2, float[16,64,1,1] w3> {
  a = Conv(x, w1) b = Relu(a)
  c = Conv<group=64, pads=[1,1,1,1]>(b, w2) d = Relu(c)
  e = Conv(d, w3)
  y = Add(x, e)
}"""
ENCODER = """g (float[1,32,64] x) => (y) <float[64] g1, float[64] b1, float[64,64] wq, float[64,64] wk, float[64,64] wv,
  float[64,64] wo, float[64] g2, float[64] b2, float[64,256] w1, float[256,64] w2> {
  n = LayerNormalization(x, g1, b1)
  q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)
  t = Transpose<perm=[0,2,1]>(k)
  s = MatMul(q, t) p = Softmax(s) a = MatMul(p, v)
  o = MatMul(a, wo) r = Add(x, o)
  m = LayerNormalization(r, g2, b2)
  h = MatMul(m, w1) i = Relu(h) j = MatMul(i, w2)
  y = Add(r, j)
}"""


def quantized(text, **options):
    proto = model(text)
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(0).standard_normal((4, *shape[1:])).astype(np.float32)
    return qdq_surgeon.quantize(proto, {"x": data}, compare=False, **options).model


def node(proto, output):
    return next(node for node in proto.graph.node if node.output[0] == output)


@pytest.mark.parametrize(
    ("text", "planned"), [(BOTTLENECK, 5), (INVERTED, 3), (ENCODER, 6)], ids=["resnet", "mobilenet", "encoder"]
)
def test_every_planned_op_runs_in_int8(text, planned):
    done = audit(quantized(text), backend="tensorrt-rtx")
    assert (len(done.planned), done.in_float) == (planned, ())
    assert done.float_figures.int8_ops == 0


def test_the_share_of_macs_is_that_of_the_convs_in_int8():
    done = audit(quantized(TWO_CONVS, exclude="a"), backend="tensorrt-rtx")
    first, second = 16 * 256 * 16 * 9, 32 * 256 * 16 * 9
    assert [op.macs for op in done.ops] == [first, second]
    assert done.figures.int8_macs == pytest.approx(second / (first + second))


def test_an_op_that_was_not_planned_says_which_rule_left_it_alone():
    text = "g (float[1,16,16,16] x) => (y) <float[4,16,3,3] w> { y = Conv<pads=[1,1,1,1]>(x, w) }".replace(
        "4,16", "5,15"
    )
    proto = quantized(TWO_CONVS)
    (odd,) = audit(model(text.replace("1,16,16", "1,15,16")), backend="tensorrt-rtx", beside_float=False).ops
    assert (odd.planned, odd.int8) == (False, False)
    assert odd.reason.startswith("small-conv: ")
    assert all(op.reason == "" for op in audit(proto, backend="tensorrt-rtx", beside_float=False).ops)


def test_a_float_weight_beside_int8_data_runs_in_float_and_lint_says_why():
    proto = quantized(TWO_CONVS)
    node(proto, "y").input[1] = "v"
    done = audit(proto, backend="tensorrt-rtx")
    assert [(op.node, op.reason) for op in done.in_float] == [("Conv y", "one-sided")]


def test_an_op_between_dq_and_conv_runs_in_float_and_lint_says_why():
    proto = quantized(TWO_CONVS)
    conv = node(proto, "y")
    between = onnx.helper.make_node("Sigmoid", [conv.input[0]], ["between"])
    conv.input[0] = "between"
    proto.graph.node.insert(list(proto.graph.node).index(conv), between)
    done = audit(proto, backend="tensorrt-rtx")
    assert [op.node for op in done.in_float] == ["Conv y"]
    assert "op-between" in done.in_float[0].reason


def test_nodes_without_names_and_with_equal_names_are_told_apart():
    proto = quantized(TWO_CONVS)
    for op in proto.graph.node:
        op.name = "same" if op.op_type == "Conv" else ""
    assert len(audit(proto, backend="tensorrt-rtx", beside_float=False).planned) == 2


def test_the_text_says_backend_and_figures():
    text = str(audit(quantized(TWO_CONVS), backend="tensorrt-rtx"))
    for words in ("TensorRT-RTX", "2 of 2 planned ops run in INT8", "kernels", "activation bytes moved", "float"):
        assert words in text


def test_the_page_stands_alone_and_escapes_names():
    page = audit_page("<model>.onnx", audit(quantized(TWO_CONVS), backend="tensorrt-rtx"))
    assert page.startswith("<!doctype html>")
    assert "&lt;model&gt;.onnx" in page
    assert "<script" not in page
    assert "http" not in page


def test_a_conv_transpose_in_float_is_explained_by_name():
    text = "g (float[1,16,16,16] x) => (y) <float[16,32,2,2] w> { y = ConvTranspose<strides=[2,2]>(x, w) }"
    (op,) = audit(quantized(text), backend="tensorrt-rtx", beside_float=False).in_float
    assert op.reason.startswith("TensorRT-RTX has no INT8 ConvTranspose")


def test_attention_in_int8_is_seen_as_such():
    text = """g (float[1,64,64] x) => (y) <float[64,64] wq, float[64,64] wk, float[64,64] wv> {
      q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
      t = Transpose<perm=[0,2,1]>(k)
      s = MatMul(q, t) p = Softmax(s) y = MatMul(p, v)
    }"""
    done = audit(quantized(text, placement="cases/attention-int8,tensorrt"), backend="tensorrt-rtx", beside_float=False)
    assert (len(done.planned), done.in_float) == (5, ())


def test_a_profile_with_a_range_is_audited_at_its_usual_shape():
    text = TWO_CONVS.replace("float[1,16,16,16] x", "float[N,16,16,16] x")
    data = np.random.default_rng(0).standard_normal((4, 16, 16, 16)).astype(np.float32)
    proto = qdq_surgeon.quantize(model(text), {"x": data}, compare=False).model
    ranges = {"x": tuple((batch, 16, 16, 16) for batch in (1, 2, 8))}
    wide = audit(proto, backend="tensorrt-rtx", shapes=ranges, beside_float=False)
    narrow = audit(proto, backend="tensorrt-rtx", shapes={"x": ((2, 16, 16, 16),)}, beside_float=False)
    assert wide.figures == narrow.figures
    assert wide.figures.bytes_moved > 0


def test_macs_that_are_not_known_are_said_to_be_unknown():
    text = "g (float[1,16,16,16] x, float[A,B,16,16] z) => (y) <float[16,16,3,3] w> { a = Add(x, z) y = Conv(a, w) }"
    done = audit(
        qdq_surgeon.quantize(model(text), shapes={"z": (1, 16, 16, 16)}, samples=2, compare=False).model,
        backend="tensorrt-rtx",
        shapes={"z": ((1, 16, 16, 16),)},
    )
    assert "unknown" not in str(done)
    assert done.figures.unknown_macs == 0
