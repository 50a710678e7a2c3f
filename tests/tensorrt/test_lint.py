"""Every code: a planted fault that it finds, at the right node, and a sibling in which it finds nothing."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qdq_surgeon
from qdq_surgeon.errors import ModelError, QdqError
from qdq_surgeon.rules.placement import presets
from qdq_surgeon.tensorrt.lint import TARGETS, lint
from qdq_surgeon.tensorrt.lint_rules import ERROR, RULES
from tests.graphs import model

CONSTANTS = {
    "s": np.float32(0.05),
    "s2": np.float32(0.1),
    "z": np.int8(0),
    "s16": np.full(16, 0.01, np.float32),
    "z16": np.zeros(16, np.int8),
}


def build(text, opset=17, **constants):
    """A model from ONNX text; constants that it reads come from CONSTANTS, or are given."""
    proto = model(text, opset)
    read = {name for node in proto.graph.node for name in node.input}
    read -= {name for node in proto.graph.node for name in node.output}
    for name, value in (CONSTANTS | constants).items():
        if name in read:
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return proto


def pair(tensor, scale="s", zero_point="z", axis=None):
    """A Q/DQ pair on a tensor: `x_d` is what `x` becomes."""
    attributes = "" if axis is None else f"<axis = {axis}>"
    return f"""{tensor}_q = QuantizeLinear{attributes}({tensor}, {scale}, {zero_point})
    {tensor}_d = DequantizeLinear{attributes}({tensor}_q, {scale}, {zero_point})"""


def weight(tensor, axis=0):
    return pair(tensor, "s16", "z16", axis)


X, W = pair("x"), weight("w")


def conv(x=X, w=W, opset=17, kind="float", tail="y = Conv(x_d, w_d)", **constants):
    """A Conv with a pair on data and weight; what is given replaces its part."""
    return build(
        f"g ({kind}[1,16,8,8] x) => ({kind}[1,16,6,6] y) <{kind}[16,16,3,3] w> {{ {x}\n {w}\n {tail} }}",
        opset,
        **constants,
    )


def half(**constants):
    """The constants of `conv` in FP16."""
    values = {"s": np.float16(0.05), "s16": np.full(16, 0.01, np.float16)} | constants
    return {"kind": "float16", "opset": 19} | values


def found(proto, target="trt10"):
    return {(finding.code, finding.node) for finding in lint(proto, target).findings}


def test_a_clean_model_has_no_findings():
    assert found(conv()) == set()
    assert found(conv(**half())) == set()
    assert str(lint(conv(), "trt10")) == "0 errors, 0 warnings for trt10"


WITHOUT_ZERO_POINT = "x_q = QuantizeLinear(x, s)\n x_d = DequantizeLinear(x_q, s)"
INT32_BIAS = "b_d = DequantizeLinear(b, s)\n y = Conv(x_d, w_d, b_d)"

ERRORS = [
    ("zero-point-missing", "QuantizeLinear x_q", lambda: conv(x=WITHOUT_ZERO_POINT)),
    ("zero-point-not-zero", "QuantizeLinear x_q", lambda: conv(z=np.int8(3))),
    ("zero-point-not-int8", "QuantizeLinear x_q", lambda: conv(z=np.uint8(0))),
    ("zero-point-shape", "QuantizeLinear w_q", lambda: conv(w=pair("w", "s16", "z", 0))),
    ("scale-not-constant", "QuantizeLinear x_q", lambda: conv(x=f"s = ReduceMax<keepdims = 0>(x)\n {X}")),
    ("scale-not-positive", "QuantizeLinear x_q", lambda: conv(s=np.float32(0))),
    ("scale-not-positive", "QuantizeLinear x_q", lambda: conv(s=np.float32(-0.1))),
    ("scale-not-positive", "QuantizeLinear x_q", lambda: conv(s=np.float32("inf"))),
    ("scale-not-positive", "QuantizeLinear w_q", lambda: conv(s16=np.full(16, np.nan, np.float32))),
    ("scale-double", "QuantizeLinear x_q", lambda: conv(s=np.float64(0.05))),
    ("scale-zero-in-fp16", "QuantizeLinear x_q", lambda: conv(**half(s=np.float16(1e-6)))),
    ("scale-zero-in-fp16", "QuantizeLinear x_q", lambda: conv(**half(s=np.float16(0)))),
    ("scale-type", "QuantizeLinear x_q", lambda: conv(**half(s=np.float32(0.05)))),
    ("fp16-scale-opset", "QuantizeLinear x_q", lambda: conv(**half() | {"opset": 17})),
    ("per-channel-opset", "QuantizeLinear w_q", lambda: conv(opset=12)),
    ("pair-mismatch", "DequantizeLinear x_d", lambda: conv(x=X.replace("x_q, s,", "x_q, s2,"))),
    ("pair-mismatch", "DequantizeLinear w_d", lambda: conv(w=W.replace("Linear<axis = 0>(w,", "Linear<axis = 1>(w,"))),
    ("activation-per-channel", "QuantizeLinear x_q", lambda: conv(x=pair("x", "s16", "z16", 1))),
    ("axis-missing", "QuantizeLinear w_q", lambda: conv(w=pair("w", "s16", "z16"))),
    ("axis-wrong", "DequantizeLinear w_d", lambda: conv(w=weight("w", 1))),
    ("bias-int32", "DequantizeLinear b_d", lambda: conv(tail=INT32_BIAS, b=np.arange(16, dtype=np.int32))),
    ("operator-form", "ConvInteger i", lambda: conv(tail="i = ConvInteger(x_q, w_q)\n y = Cast<to = 1>(i)")),
    (
        "operator-form",
        "DynamicQuantizeLinear a",
        lambda: conv(tail="a, c, d = DynamicQuantizeLinear(x_d)\n y = Conv(x_d, w_d)"),
    ),
]


@pytest.mark.parametrize(("code", "node", "planted"), ERRORS, ids=[f"{code}-{node}" for code, node, _ in ERRORS])
def test_errors_are_found_where_they_are(code, node, planted):
    report = lint(planted(), "trt10")
    assert (code, node) in {(finding.code, finding.node) for finding in report.errors}
    assert {finding.code for finding in report.errors} == {code}


def test_a_bad_pair_is_told_once():
    """Q and DQ read the same zero point: one finding."""
    assert found(conv(z=np.int8(3))) == {("zero-point-not-zero", "QuantizeLinear x_q")}


def test_duplicate_names_count_where_one_is_a_q_or_dq():
    proto = conv()
    for node in proto.graph.node:
        node.name = "same" if node.op_type in ("Conv", "QuantizeLinear") else ""
    (finding,) = lint(proto, "trt10").findings
    assert (finding.code, finding.node) == ("duplicate-names", "QuantizeLinear same")
    proto = conv(tail="c = Conv(x_d, w_d)\n y = Relu(c)")
    for node in proto.graph.node:
        node.name = "" if node.op_type in qdq_surgeon.graph.QDQ_OPS else "same"
    assert found(proto) == set()


@pytest.mark.parametrize(
    ("op", "shape", "axis", "right"),
    [
        ("Gemm(x_d, w_d)", "16,32", 0, 1),
        ("Gemm<transB = 1>(x_d, w_d)", "32,16", 1, 0),
        ("MatMul(x_d, w_d)", "16,32", 0, 1),
        ("MatMul(x_d, w_d)", "16,32", -2, -1),
        ("MatMul(w_d, x_d)", "32,16", 1, 0),
        ("Gemm(w_d, x_d)", "32,16", 1, 0),
        ("Gemm<transA = 1>(w_d, x_d)", "16,32", 0, 1),
    ],
)
def test_the_axis_follows_the_consumer(op, shape, axis, right):
    def build_with(axis):
        size = int(shape.split(",")[axis])
        return build(
            f"g (float[16,16] x) => (y) <float[{shape}] w> {{ {X}\n {pair('w', 'sw', 'zw', axis)}\n y = {op} }}",
            sw=np.full(size, 0.01, np.float32),
            zw=np.zeros(size, np.int8),
        )

    assert found(build_with(axis)) == {("axis-wrong", "DequantizeLinear w_d")}
    assert found(build_with(right)) == set()


@pytest.mark.parametrize(("axis", "codes"), [(0, set()), (1, {("axis-wrong", "DequantizeLinear w_d")})])
def test_the_axis_is_followed_through_a_transpose(axis, codes):
    text = (
        "g (float[8,16] x) => (y) <float[16,16] w> { %s\n %s\n t = Transpose<perm = [1, 0]>(w_d)\n y = MatMul(x_d, t) }"
    )
    assert found(build(text % (X, weight("w", axis)))) == codes


def test_weights_stored_as_int8_need_no_q():
    stored = "w_d = DequantizeLinear<axis = 0>(w8, s16, z16)"
    integers = np.ones((16, 16, 3, 3), np.int8)
    assert found(conv(w=stored, w8=integers)) == set()
    assert found(conv(w=stored.replace(", z16", ""), w8=integers)) == set()
    wrong = conv(w=stored, w8=integers.astype(np.uint8), z16=np.full(16, 128, np.uint8))
    assert {code for code, _ in found(wrong)} == {"zero-point-not-int8", "zero-point-not-zero"}


def test_constants_may_be_constant_nodes():
    """As torch.onnx writes them."""
    constants = "s = Constant<value = float {0.05}>()\n z = Constant<value = int8 {%d}>()\n"
    assert found(conv(x=constants % 0 + X)) == set()
    assert found(conv(x=constants % 7 + X)) == {("zero-point-not-zero", "QuantizeLinear x_q")}


def test_fp8_pairs_are_left_alone():
    proto = build(f"g (float[1,16,8,8] x) => (y) {{ {X}\n y = Relu(x_d) }}", opset=19)
    (zero_point,) = [tensor for tensor in proto.graph.initializer if tensor.name == "z"]
    zero_point.CopyFrom(onnx.helper.make_tensor("z", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]))
    assert lint(proto, "trt10").errors == ()


# ---- warnings: planted and clean ----------------------------------------------------------------------------------

HEAD = "g (float[1,16,8,8] x) => (float[1,16,8,8] y) <float[16,16,1,1] w, float[16,16,1,1] v> "
TWO_CONVS = f"{X}\n {W}\n {weight('v')}\n c = Conv(x_d, w_d)\n e = Conv(x_d, v_d)"
QUERY = "g (float[1,4,32,16] q, float[1,4,16,32] k, float[1,4,32,16] v) => (y) "

WARNINGS = [
    (
        "one-sided",
        "Conv y",
        HEAD + f"{{ {X}\n y = Conv(x_d, w) }}",
        HEAD + f"{{ {X}\n {W}\n y = Conv(x_d, w_d) }}",
    ),
    (
        "one-sided",
        "Conv y",
        HEAD + f"{{ {W}\n y = Conv(x, w_d) }}",
        HEAD + f"{{ {X}\n {W}\n m = MaxPool<kernel_shape = [1, 1]>(x_d)\n y = Conv(m, w_d) }}",
    ),
    (
        "op-between",
        "Relu r",
        HEAD + f"{{ {X}\n {W}\n r = Relu(x_d)\n y = Conv(r, w_d) }}",
        HEAD + f"{{ {W}\n r = Relu(x)\n {pair('r')}\n y = Conv(r_d, w_d) }}",
    ),
    (
        "pair-in-epilogue",
        "Relu y",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n {pair('c')}\n y = Relu(c_d) }}",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n y = Relu(c) }}",
    ),
    (
        "pair-in-epilogue",
        "Mul y",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n {pair('c')}\n g = Sigmoid(c)\n y = Mul(c_d, g) }}",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n g = Sigmoid(c)\n y = Mul(c, g) }}",
    ),
    (
        "pair-in-epilogue",
        "Add y",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n {pair('c')}\n y = Add(x_d, c_d) }}",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n y = Add(x_d, c) }}",
    ),
    (  # the skip may come from a Conv of its own: it has a pair, the other branch has none
        "pair-in-epilogue",
        "Add y",
        HEAD + f"{{ {TWO_CONVS}\n {pair('c')}\n {pair('e')}\n y = Add(e_d, c_d) }}",
        HEAD + f"{{ {TWO_CONVS}\n {pair('e')}\n y = Add(e_d, c) }}",
    ),
    (
        "residual-skip-float",
        "Add y",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n y = Add(x, c) }}",
        HEAD + f"{{ {X}\n {W}\n c = Conv(x_d, w_d)\n y = Add(x_d, c) }}",
    ),
    (
        "residual-skip-float",
        "Add y",
        HEAD + f"{{ {TWO_CONVS}\n y = Add(e, c) }}",
        HEAD + "{ c = Conv(x, w)\n y = Add(x, c) }",
    ),
    (
        "float-consumer",
        "Add a",
        HEAD + f"{{ e = Exp(x)\n {X}\n {pair('e')}\n a = Add(x_d, e_d)\n y = Exp(a) }}",
        HEAD + f"{{ e = Exp(x)\n {X}\n {pair('e')}\n a = Add(x_d, e_d)\n {pair('a')}\n {W}\n y = Conv(a_d, w_d) }}",
    ),
    (
        "float-consumer",
        "GlobalAveragePool a",
        HEAD + f"{{ {X}\n a = GlobalAveragePool(x_d)\n y = Exp(a) }}",
        HEAD + f"{{ {X}\n a = GlobalAveragePool(x_d)\n {pair('a')}\n {W}\n y = Conv(a_d, w_d) }}",
    ),
    (  # a Q behind a Concat moves to the Concat's inputs
        "float-consumer",
        "AveragePool a",
        HEAD + f"{{ {X}\n a = AveragePool<kernel_shape = [1, 1]>(x_d)\n y = Concat<axis = 1>(a, x) }}",
        "g (float[1,8,8,8] x) => (y) <float[16,16,1,1] w> "
        + f"{{ {X}\n a = AveragePool<kernel_shape = [1, 1]>(x_d)\n"
        + f"b = Concat<axis = 1>(a, x)\n {pair('b')}\n {W}\n y = Conv(b_d, w_d) }}",
    ),
    (
        "concat-scales-differ",
        "Concat y",
        HEAD + f"{{ e = Exp(x)\n {X}\n {pair('e', 's2')}\n y = Concat<axis = 1>(x_d, e_d) }}",
        HEAD + f"{{ e = Exp(x)\n {X}\n {pair('e')}\n y = Concat<axis = 1>(x_d, e_d) }}",
    ),
    (
        "several-scales",
        "QuantizeLinear p",
        HEAD + f"{{ {X}\n p = QuantizeLinear(x, s2, z)\n o = DequantizeLinear(p, s2, z)\n {W}\n {weight('v')}\n"
        "e = Conv(x_d, w_d)\n c = Conv(o, v_d)\n y = Concat<axis = 1>(e, c) }",
        HEAD + f"{{ {X}\n p = QuantizeLinear(x, s, z)\n o = DequantizeLinear(p, s, z)\n {W}\n {weight('v')}\n"
        "e = Conv(x_d, w_d)\n c = Conv(o, v_d)\n y = Concat<axis = 1>(e, c) }",
    ),
    (
        "half-attention",
        "MatMul y",
        QUERY + f"{{ {pair('q')}\n {pair('k')}\n a = MatMul(q_d, k_d)\n p = Softmax(a)\n y = MatMul(p, v) }}",
        QUERY + f"{{ {pair('q')}\n {pair('k')}\n {pair('v')}\n a = MatMul(q_d, k_d)\n p = Softmax(a)\n"
        f"{pair('p')}\n y = MatMul(p_d, v_d) }}",
    ),
    (
        "output-quantized",
        "DequantizeLinear y",
        HEAD + "{ e = Exp(x)\n q = QuantizeLinear(e, s, z)\n y = DequantizeLinear(q, s, z) }",
        HEAD + "{ y = Exp(x) }",
    ),
    (
        "tiny-shape",
        "Conv y",
        HEAD.replace("[16,16,1,1] w", "[16,16,1,3] w") + f"{{ {X}\n {W}\n y = Conv(x_d, w_d) }}",
        HEAD.replace("[16,16,1,1] w", "[16,16,3,3] w") + f"{{ {X}\n {W}\n y = Conv(x_d, w_d) }}",
    ),
    (
        "tiny-shape",
        "MatMul y",
        f"g (float[4,8] x) => (y) <float[8,16] w> {{ {X}\n {weight('w', 1)}\n y = MatMul(x_d, w_d) }}",
        f"g (float[4,32] x) => (y) <float[32,16] w> {{ {X}\n {weight('w', 1)}\n y = MatMul(x_d, w_d) }}",
    ),
    (
        "conv-transpose-per-channel",
        "ConvTranspose y",
        HEAD + f"{{ {X}\n {W}\n y = ConvTranspose(x_d, w_d) }}",
        HEAD + f"{{ {X}\n {pair('w')}\n y = ConvTranspose(x_d, w_d) }}",
    ),
]


@pytest.mark.parametrize(
    ("code", "node", "planted", "clean"), WARNINGS, ids=[f"{code}-{node}" for code, node, _, _ in WARNINGS]
)
def test_warnings_are_found_where_they_are_and_nowhere_else(code, node, planted, clean):
    assert found(build(planted)) == {(code, node)}
    assert found(build(clean)) == set()


def test_weights_along_two_axes_are_no_second_scale():
    proto = build(
        f"""g (float[16,16] x) => (y) <float[16,16] w> {{
            {X}
            {weight("w", 1)}
            p = QuantizeLinear<axis = 0>(w, t16, z16)
            o = DequantizeLinear<axis = 0>(p, t16, z16)
            a = Gemm(x_d, w_d)
            b = Gemm<transB = 1>(x_d, o)
            y = Concat<axis = 1>(a, b)
        }}""",
        t16=np.full(16, 0.02, np.float32),
    )
    assert found(proto) == set()


def test_float_attention_is_fine():
    assert found(build(QUERY + "{ a = MatMul(q, k)\n p = Softmax(a)\n y = MatMul(p, v) }")) == set()


def test_the_fp32_rest_is_told_once_and_only_for_tensorrt_11():
    proto = conv(tail="c = Conv(x_d, w_d)\n r = Relu(c)\n e = Exp(r)\n y = Softmax(e)")
    (finding,) = lint(proto, "trt11").findings
    assert (finding.code, finding.detail) == ("fp32-rest", "2 of 4 float ops, such as Exp e")
    assert lint(proto, "trt10").findings == lint(proto, "rtx").findings == ()
    assert lint(conv(**half(), tail="c = Conv(x_d, w_d)\n y = Softmax(c)"), "trt11").findings == ()


def test_every_rule_has_a_case():
    told = {code for code, *_ in ERRORS} | {code for code, *_ in WARNINGS} | {"duplicate-names", "fp32-rest"}
    assert told == {rule.code for rule in RULES}
    assert len({rule.code for rule in RULES}) == len(RULES)
    assert all(set(rule.targets) <= set(TARGETS) for rule in RULES)


# ---- reports and sources ------------------------------------------------------------------------------------------


def test_a_report_groups_by_code_and_says_what_to_do():
    report = lint(conv(z=np.int8(3), tail="a = Conv(x_d, w_d)\n y = Exp(a)"))
    what = {rule.code: rule for rule in RULES}["zero-point-not-zero"]
    assert str(report).splitlines()[:5] == [
        "1 error, 1 warning for trt11",
        "",
        f"error zero-point-not-zero (1): {what.what}",
        f"  mend: {what.mend}",
        "    QuantizeLinear x_q (x): it is 3",
    ]
    assert [finding.severity for finding in report.errors] == [ERROR]
    assert [finding.code for finding in report.warnings] == ["fp32-rest"]


def test_an_unknown_target_is_refused():
    with pytest.raises(QdqError, match="Targets: trt10, trt11, rtx"):
        lint(conv(), "trt12")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        lint(tmp_path / "none.onnx")


def test_a_file_and_a_model_give_the_same_report_and_stay_as_they_are(tmp_path):
    proto = conv(z=np.int8(3))
    before = proto.SerializeToString(deterministic=True)
    onnx.save(proto, tmp_path / "model.onnx")
    assert lint(tmp_path / "model.onnx") == lint(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_pairs_around_control_flow_are_followed():
    """An If body reads a dequantized tensor: that is a reader in float."""
    proto = build(
        f"""g (float[1,16,8,8] x, bool c) => (y) {{
            {X}
            a = GlobalAveragePool(x_d)
            y = If (c) <then_branch = t () => (float[1,16,8,8] u) {{ u = Exp(x_d) }},
                        else_branch = e () => (float[1,16,1,1] u) {{ u = Exp(a) }}>
        }}"""
    )
    assert found(proto) == {("float-consumer", "GlobalAveragePool a")}


# ---- our own output -----------------------------------------------------------------------------------------------

NETS = {
    "residual": """g (float[1,16,8,8] x) => (y)
        <float[16,16,3,3] w, float[16] b, float[16,16,1,1] v, float[16,16,3,3] u, float[32,16] f> {
        c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
        r = Relu(c)
        d = Conv<pads = [1, 1, 1, 1]>(r, u)
        s = Conv(x, v)
        a = Add(d, s)
        p = Relu(a)
        g = GlobalAveragePool(p)
        l = Flatten(g)
        y = Gemm<transB = 1>(l, f)
    }""",
    "concat": """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w, float[16,16,3,3] v, float[16,48,1,1] u> {
        a = Conv(x, w)
        r = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(x, v)
        m = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)
        c = Concat<axis = 1>(r, b, m)
        d = Conv(c, u)
        y = Relu(d)
    }""",
    "mobilenet": """g (float[1,16,8,8] x) => (y)
        <float[32,16,1,1] w, float[32,1,3,3] v, float[16,32,1,1] u, float[32,16] f> {
        low = Constant<value = float {0.0}>()
        high = Constant<value = float {6.0}>()
        a = Conv(x, w)
        b = Clip(a, low, high)
        c = Conv<group = 32, pads = [1, 1, 1, 1]>(b, v)
        d = Clip(c, low, high)
        e = Conv(d, u)
        s = Add(x, e)
        g = GlobalAveragePool(s)
        l = Flatten(g)
        y = Gemm<transB = 1>(l, f)
    }""",
    "transformer": """g (float[1,16,32] x) => (y)
        <float[32,32] wq, float[32,32] wk, float[32,32] wv, float[32,32] wo, float[32] s, float[32] b,
         float[32,64] up, float[64] ub, float[64,32] down> {
        n = LayerNormalization(x, s, b)
        q = MatMul(n, wq)
        k = MatMul(n, wk)
        v = MatMul(n, wv)
        t = Transpose<perm = [0, 2, 1]>(k)
        a = MatMul(q, t)
        p = Softmax(a)
        o = MatMul(p, v)
        h = MatMul(o, wo)
        r = Add(x, h)
        m = LayerNormalization(r, s, b)
        i = MatMul(m, up)
        j = Add(i, ub)
        e = Relu(j)
        d = MatMul(e, down)
        y = Add(r, d)
    }""",
}
NETS["fp16"] = NETS["residual"].replace("float[", "float16[")


@pytest.fixture(scope="module", params=NETS)
def net(request):
    return model(NETS[request.param], 19 if request.param == "fp16" else 17)


@pytest.mark.parametrize("placement", [name for name in presets() if "/" not in name])
def test_what_we_write_has_no_errors(net, placement):
    assert lint(qdq_surgeon.quantize(net, placement=placement, samples=2, compare=False).model).errors == ()


@pytest.mark.parametrize("target", TARGETS)
def test_the_default_placement_gives_no_warning_but_the_fp32_rest(net, target):
    report = lint(qdq_surgeon.quantize(net, samples=2, compare=False).model, target)
    assert {finding.code for finding in report.findings} <= ({"fp32-rest"} if target == "trt11" else set())
