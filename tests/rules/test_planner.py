import json
import re
from dataclasses import replace
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

import qdq_surgeon
from qdq_surgeon.edges import Edge, Plan, Read, Site
from qdq_surgeon.errors import FilterError, PlanError
from qdq_surgeon.model import load
from qdq_surgeon.report.explain import explain
from qdq_surgeon.rules.planner import check_plan
from tests.graphs import decisions, model, plan_text, shuffled


def assert_plan(text: str, expected: str, placement: str = "tensorrt", opset: int = 17, **filters) -> None:
    assert decisions(model(text, opset), placement, **filters) == dedent(expected).strip()


def pairs(proto: ModelProto, placement: str = "tensorrt", **filters) -> set[str]:
    """The tensors that get a Q/DQ pair."""
    return {site.tensor for site in qdq_surgeon.plan(proto, placement=placement, **filters).sites}


# ---- residual Add ------------------------------------------------------------------------------------------------

RESIDUAL = """g (float[1,16,8,8] x) => (y) <float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2> {
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  [second] c2 = Conv<pads=[1,1,1,1]>(r1, w2)
  s = Add(c2, x)
  y = Relu(s)
}"""


def test_a_residual_block_in_full():
    assert plan_text(model(RESIDUAL)) == dedent(
        """\
        4 Q/DQ pairs for 5 edges; 3 edges kept float; 0 near misses (placement tensorrt)

        quantized
          conv: An INT8 Conv reads INT8 data and INT8 weights, one scale per output channel; its bias stays float.
            x -> Conv c1[0], Add s[1] (residual-add)
            w1 (axis 0) -> Conv c1[1]
            r1 -> Conv second[0]
            w2 (axis 0) -> Conv second[1]

        kept float
          conv: An INT8 Conv reads INT8 data and INT8 weights, one scale per output channel; its bias stays float.
            b1 -> Conv c1[2]
          residual-add: The skip input sets the precision of the fused Conv+Add; \
the Conv branch must reach the Add bare.
            c2 -> Add s[0]
          graph-output: A graph's own outputs keep their type.
            y -> graph output y"""
    )


def test_the_longer_branch_of_a_downsampling_bottleneck_stays_bare():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <
          float[16,16,1,1] w1, float[16,16,3,3] w2, float[64,16,1,1] w3, float[64,16,1,1] wd
        > {
          c1 = Conv(x, w1)
          r1 = Relu(c1)
          c2 = Conv<pads=[1,1,1,1]>(r1, w2)
          r2 = Relu(c2)
          c3 = Conv(r2, w3)
          d = Conv(x, wd)
          s = Add(d, c3)
          y = Relu(s)
        }""",
        """
        quantized
          conv
            x -> Conv d[0], Conv c1[0]
            wd (axis 0) -> Conv d[1]
            w1 (axis 0) -> Conv c1[1]
            r1 -> Conv c2[0]
            w2 (axis 0) -> Conv c2[1]
            r2 -> Conv c3[0]
            w3 (axis 0) -> Conv c3[1]
          residual-add
            d -> Add s[0]

        kept float
          residual-add
            c3 -> Add s[1]
          graph-output
            y -> graph output y
        """,
    )


@pytest.mark.parametrize(("slots", "bare", "quantized"), [("c1, c2", "c1", "c2"), ("c2, c1", "c2", "c1")])
def test_a_tie_keeps_the_lower_slot_bare(slots, bare, quantized):
    proto = model(
        f"""g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,1,1] w2> {{
          c1 = Conv(x, w1)
          c2 = Conv(x, w2)
          y = Add({slots})
        }}"""
    )
    assert pairs(proto) == {"x", "w1", "w2", quantized}
    assert bare not in pairs(proto)


def test_a_sum_of_three_keeps_its_deepest_branch_bare():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3> {
          a = Conv(x, w1)
          b = Conv(x, w2)
          r = Relu(b)
          c = Conv(r, w3)
          y = Sum(x, a, c)
        }""",
        """
        quantized
          conv
            x -> Conv a[0], Conv b[0], Sum y[0] (residual-add)
            w1 (axis 0) -> Conv a[1]
            w2 (axis 0) -> Conv b[1]
            r -> Conv c[0]
            w3 (axis 0) -> Conv c[1]
          residual-add
            a -> Sum y[1]

        kept float
          residual-add
            c -> Sum y[2]
          graph-output
            y -> graph output y
        """,
    )


def test_the_skip_of_an_inverted_bottleneck_is_a_conv_output_read_twice():
    assert_plan(
        """g (float[1,32,8,8] x) => (y) <
          float[16,32,1,1] w0, float[96,16,1,1] w1, float[96,1,3,3] w2, float[16,96,1,1] w3,
          float zero = {0}, float six = {6}
        > {
          p = Conv(x, w0)
          c1 = Conv(p, w1)
          r1 = Clip(c1, zero, six)
          c2 = Conv<group=96, pads=[1,1,1,1]>(r1, w2)
          r2 = Clip(c2, zero, six)
          c3 = Conv(r2, w3)
          y = Add(p, c3)
        }""",
        """
        quantized
          conv
            x -> Conv p[0]
            w0 (axis 0) -> Conv p[1]
            p -> Conv c1[0], Add y[0] (residual-add)
            w1 (axis 0) -> Conv c1[1]
            r1 -> Conv c2[0]
            w2 (axis 0) -> Conv c2[1]
            r2 -> Conv c3[0]
            w3 (axis 0) -> Conv c3[1]

        kept float
          activation
            c1 -> Clip r1[0]
            c2 -> Clip r2[0]
          residual-add
            c3 -> Add y[1]
          graph-output
            y -> graph output y
        """,
    )


def test_a_convnext_block():
    assert_plan(
        """g (float[1,3,32,32] image) => (y) <
          float[32,3,4,4] w0, float[32,1,7,7] w1, float[32] scale, float[32] shift,
          float[32,128] w2, float[128] b2, float[128,32] w3, float[32] b3, float[32,1,1] gamma
        > {
          x = Conv<strides=[4,4]>(image, w0)
          c = Conv<group=32, pads=[3,3,3,3]>(x, w1)
          t = Transpose<perm=[0,2,3,1]>(c)
          n = LayerNormalization(t, scale, shift)
          m2 = MatMul(n, w2)
          a2 = Add(m2, b2)
          h = Gelu(a2)
          m3 = MatMul(h, w3)
          a3 = Add(m3, b3)
          u = Transpose<perm=[0,3,1,2]>(a3)
          l = Mul(gamma, u)
          y = Add(l, x)
        }""",
        """
        quantized
          conv
            image -> Conv x[0]
            w0 (axis 0) -> Conv x[1]
            x -> Conv c[0], Add y[1] (residual-add)
            w1 (axis 0) -> Conv c[1]
          matmul
            n -> MatMul m2[0]
            w2 (axis 1) -> MatMul m2[1]
            h -> MatMul m3[0]
            w3 (axis 1) -> MatMul m3[1]

        kept float
          normalization
            t -> LayerNormalization n[0]
          bias-add
            m2 -> Add a2[0]
            b2 -> Add a2[1]
            m3 -> Add a3[0]
            b3 -> Add a3[1]
          activation
            a2 -> Gelu h[0]
          residual-add
            l -> Add y[0]
          graph-output
            y -> graph output y
        """,
        opset=20,
    )


def test_two_branches_of_one_conv_are_no_residual():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,1,1] w2> {
          c = Conv(x, w1)
          a = Relu(c)
          b = Softplus(c)
          s = Add(a, b)
          y = Conv(s, w2)
        }""",
        """
        quantized
          conv
            x -> Conv c[0]
            w1 (axis 0) -> Conv c[1]
            s -> Conv y[0]
            w2 (axis 0) -> Conv y[1]
          add
            a -> Add s[0]
            b -> Add s[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_an_add_without_a_conv_branch_is_quantized_where_its_output_is():
    assert_plan(
        """g (float[1,16,8,8] a, float[1,16,8,8] b) => (y) <float[16,16,1,1] w> {
          s = Add(a, b)
          y = Conv(s, w)
        }""",
        """
        quantized
          add
            a -> Add s[0]
            b -> Add s[1]
          conv
            s -> Conv y[0]
            w (axis 0) -> Conv y[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_an_add_without_a_conv_branch_stays_float_where_its_output_does():
    assert_plan(
        "g (float[1,16,8,8] a, float[1,16,8,8] b) => (y) { s = Add(a, b) y = Neg(s) }",
        """
        kept float
          graph-output
            y -> graph output y

        near misses
          residual-add
            Add s: main 'a' is not fused_branch
          add
            Add s: y 's' is not consumed_quantized
        """,
    )


def test_a_conv_branch_that_is_a_graph_output_too_is_not_bare():
    proto = model(
        """g (float[1,16,8,8] x) => (y, c) <float[16,16,1,1] w1, float[16,16,1,1] w2> {
          c = Conv(x, w1)
          s = Add(c, x)
          y = Conv(s, w2)
        }"""
    )
    assert pairs(proto) == {"x", "w1", "w2", "s", "c"}


PREACTIVATION = """g (float[1,3,16,16] image) => (y) <
  float[16,3,3,3] w0, float[16,16,3,3] w1, float[16,16,3,3] w2,
  float[16] scale, float[16] shift, float[16] mean, float[16] var
> {
  c0 = Conv<pads=[1,1,1,1]>(image, w0)
  x = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c0)
  n1 = BatchNormalization(x, scale, shift, mean, var)
  r1 = Relu(n1)
  c1 = Conv<pads=[1,1,1,1]>(r1, w1)
  n2 = BatchNormalization(c1, scale, shift, mean, var)
  r2 = Relu(n2)
  c2 = Conv<pads=[1,1,1,1]>(r2, w2)
  s = Add(c2, x)
  n3 = BatchNormalization(s, scale, shift, mean, var)
  y = Relu(n3)
}"""


def test_a_preactivation_block():
    assert_plan(
        PREACTIVATION,
        """
        quantized
          conv
            image -> Conv c0[0]
            w0 (axis 0) -> Conv c0[1]
            r1 -> Conv c1[0]
            w1 (axis 0) -> Conv c1[1]
            r2 -> Conv c2[0]
            w2 (axis 0) -> Conv c2[1]
          residual-add
            x -> Add s[1]

        kept float
          normalization
            x -> BatchNormalization n1[0]
            c1 -> BatchNormalization n2[0]
            s -> BatchNormalization n3[0]
          residual-add
            c2 -> Add s[0]
          graph-output
            y -> graph output y

        near misses
          max-pool
            MaxPool x: y 'x' is not moved_to_quantized
          max-pool-joins
            MaxPool x: x 'c0' is not quantized_elsewhere
        """,
    )


def test_a_preactivation_block_in_the_case_of_resnet_v2():
    assert_plan(
        PREACTIVATION,
        """
        quantized
          conv
            image -> Conv c0[0]
            w0 (axis 0) -> Conv c0[1]
            r1 -> Conv c1[0]
            w1 (axis 0) -> Conv c1[1]
            r2 -> Conv c2[0]
            w2 (axis 0) -> Conv c2[1]
          max-pool-always
            c0 -> MaxPool x[0]
          batch-norm-not-after-conv
            x (scale of c0) -> BatchNormalization n1[0], Add s[1] (residual-add)
            s -> BatchNormalization n3[0]

        kept float
          normalization
            c1 -> BatchNormalization n2[0]
          residual-add
            c2 -> Add s[0]
          graph-output
            y -> graph output y
        """,
        placement="cases/resnet-v2,tensorrt",
    )


# ---- Concat and pools --------------------------------------------------------------------------------------------


def test_two_concats_that_share_a_tensor():
    assert_plan(
        """g (float[1,16,8,8] a, float[1,16,8,8] b, float[1,16,8,8] c) => (y1, y2) <
          float[16,32,1,1] w1, float[16,32,1,1] w2
        > {
          k1 = Concat<axis=1>(a, b)
          k2 = Concat<axis=1>(b, c)
          y1 = Conv(k1, w1)
          y2 = Conv(k2, w2)
        }""",
        """
        quantized
          concat
            a -> Concat k1[0]
            b -> Concat k1[1], Concat k2[0]
            c -> Concat k2[1]
          conv
            k1 -> Conv y1[0]
            w1 (axis 0) -> Conv y1[1]
            k2 -> Conv y2[0]
            w2 (axis 0) -> Conv y2[1]

        one scale
          concat
            a, b, k1 if within a factor of 4
            b, c, k2 if within a factor of 4

        kept float
          graph-output
            y1 -> graph output y1
            y2 -> graph output y2
        """,
    )


def test_a_concat_that_is_read_in_float_has_no_pairs():
    assert_plan(
        "g (float[1,16,8,8] a, float[1,16,8,8] b) => (y) { k = Concat<axis=1>(a, b) y = Neg(k) }",
        """
        kept float
          graph-output
            y -> graph output y

        near misses
          concat
            Concat k: y 'k' is not moved_to_quantized
        """,
    )


INCEPTION = """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,3,3] w2, float[16,48,1,1] w3> {
  c1 = Conv(x, w1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(x, w2)
  r2 = Relu(c2)
  p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
  k = Concat<axis=1>(r1, r2, p)
  y = Conv(k, w3)
}"""


def test_an_inception_concat_with_a_max_pool_branch_in_full():
    assert plan_text(model(INCEPTION)) == dedent(
        """\
        8 Q/DQ pairs for 10 edges; 1 edge kept float; 0 near misses (placement tensorrt)

        quantized
          conv: An INT8 Conv reads INT8 data and INT8 weights, one scale per output channel; its bias stays float.
            x -> Conv c1[0], Conv c2[0], MaxPool p[0] (max-pool)
            w1 (axis 0) -> Conv c1[1]
            w2 (axis 0) -> Conv c2[1]
            k -> Conv y[0]
            w3 (axis 0) -> Conv y[1]
          concat: With one scale for all inputs and the output, Concat moves INT8 data without a conversion.
            r1 -> Concat k[0]
            r2 -> Concat k[1]
            p (scale of x) -> Concat k[2]

        one scale
          concat: With one scale for all inputs and the output, Concat moves INT8 data without a conversion.
            r1, r2, p, k if within a factor of 4

        kept float
          graph-output: A graph's own outputs keep their type.
            y -> graph output y"""
    )


def test_a_max_pool_joins_the_pair_that_its_tensor_already_has():
    assert_plan(
        """g (float[1,16,8,8] x) => (y, p) <float[16,16,1,1] w> {
          y = Conv(x, w)
          p = MaxPool<kernel_shape=[2,2]>(x)
        }""",
        """
        quantized
          conv
            x -> Conv y[0], MaxPool p[0] (max-pool-joins)
            w (axis 0) -> Conv y[1]

        kept float
          graph-output
            y -> graph output y
            p -> graph output p
        """,
    )


def test_what_reads_a_quantized_max_pool_reuses_its_scale():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> {
          a = Neg(x)
          p = MaxPool<kernel_shape=[2,2]>(a)
          y = Conv(p, w)
        }""",
        """
        quantized
          max-pool
            a -> MaxPool p[0]
          conv
            p (scale of a) -> Conv y[0]
            w (axis 0) -> Conv y[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_a_max_pool_in_float_surroundings_stays_float():
    proto = model("g (float[1,16,8,8] x) => (y) { p = MaxPool<kernel_shape=[2,2]>(x) y = Neg(p) }")
    assert pairs(proto) == set()
    assert pairs(proto, "cases/inception,tensorrt") == {"x"}


def test_a_global_average_pool_before_a_classifier():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[32,16] w, float[32] b> {
          p = GlobalAveragePool(x)
          f = Flatten(p)
          y = Gemm<transB=1>(f, w, b)
        }""",
        """
        quantized
          average-pool
            x -> GlobalAveragePool p[0]
          gemm-transposed
            f -> Gemm y[0]
            w (axis 0) -> Gemm y[1]

        kept float
          gemm-transposed
            b -> Gemm y[2]
          graph-output
            y -> graph output y
        """,
    )


def test_a_mean_over_space_is_an_average_pool_and_one_over_channels_is_not():
    text = """g (float[1,16,16,16] x) => (y) <float[16,32] w> {{
      m = ReduceMean<axes=[{axes}], keepdims=0>(x)
      y = MatMul(m, w)
    }}"""
    assert pairs(model(text.format(axes="2,3"))) == {"x", "m", "w"}
    assert pairs(model(text.format(axes="1"))) == {"m", "w"}


def test_an_average_pool_that_is_read_in_float_stays_float():
    assert_plan(
        "g (float[1,16,8,8] x) => (y) { y = GlobalAveragePool(x) }",
        """
        kept float
          graph-output
            y -> graph output y

        near misses
          average-pool
            GlobalAveragePool y: y 'y' is not consumed_quantized
        """,
    )


# ---- weighted ops ------------------------------------------------------------------------------------------------


def test_a_matmul_with_the_weight_on_the_left():
    assert_plan(
        "g (float[64,20] x) => (y) <float[32,64] w> { y = MatMul(w, x) }",
        """
        quantized
          matmul-weight-left
            w (axis 0) -> MatMul y[0]
            x -> MatMul y[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_the_channels_of_a_stack_of_left_weights_are_the_last_axis_but_one():
    (weight, _) = qdq_surgeon.plan(model("g (float[4,64,20] x) => (y) <float[4,32,64] w> { y = MatMul(w, x) }")).sites
    assert (weight.tensor, weight.axis) == ("w", 1)


@pytest.mark.parametrize(
    ("gemm", "data", "weight", "rule", "axis"),
    [
        ("Gemm(x, w, b)", "8,32", "32,64", "gemm", 1),
        ("Gemm<transB=0>(x, w, b)", "8,32", "32,64", "gemm", 1),
        ("Gemm<transB=1>(x, w, b)", "8,32", "64,32", "gemm-transposed", 0),
        ("Gemm<transA=1>(x, w, b)", "32,8", "32,64", "gemm", 1),
        ("Gemm(w, x, b)", "32,20", "64,32", "gemm-weight-left", 0),
        ("Gemm<transB=1>(w, x, b)", "20,32", "64,32", "gemm-weight-left", 0),
        ("Gemm<transA=1>(w, x, b)", "32,20", "32,64", "gemm-weight-left-transposed", 1),
    ],
)
def test_gemm_quantizes_data_and_weight_and_keeps_c(gemm, data, weight, rule, axis):
    plan = qdq_surgeon.plan(model(f"g (float[{data}] x) => (y) <float[{weight}] w, float[1] b> {{ y = {gemm} }}"))
    assert {(site.tensor, site.axis, site.reads[0].rule) for site in plan.sites} == {
        ("x", None, rule),
        ("w", axis, rule),
    }
    assert [(kept.tensor, kept.rule) for kept in plan.kept] == [("b", rule), ("y", "graph-output")]


def test_grouped_and_depthwise_convs():
    assert_plan(
        """g (float[1,32,8,8] x) => (y) <float[32,16,3,3] w, float[32,1,3,3] wd> {
          c = Conv<group=2>(x, w)
          y = Conv<group=32>(c, wd)
        }""",
        """
        quantized
          conv
            x -> Conv c[0]
            w (axis 0) -> Conv c[1]
            c -> Conv y[0]
            wd (axis 0) -> Conv y[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_the_weight_of_a_conv_transpose_has_one_scale():
    assert_plan(
        "g (float[1,16,8,8] x) => (y) <float[16,32,2,2] w, float[32] b> { y = ConvTranspose(x, w, b) }",
        """
        quantized
          conv-transpose
            x -> ConvTranspose y[0]
            w -> ConvTranspose y[1]

        kept float
          conv-transpose
            b -> ConvTranspose y[2]
          graph-output
            y -> graph output y
        """,
    )


def test_a_small_conv_and_a_small_matmul_stay_float():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,7] w1, float[16] b1, float[16,16,1,1] w2, float[64,10] w3,
                                        int64[2] shape = {1,-1}> {
          c1 = Conv<pads=[0,3,0,3]>(x, w1, b1)
          c2 = Conv<strides=[4,4]>(c1, w2)
          f = Reshape(c2, shape)
          y = MatMul(f, w3)
        }""",
        """
        quantized
          conv
            c1 -> Conv c2[0]
            w2 (axis 0) -> Conv c2[1]

        kept float
          small-conv
            x -> Conv c1[0]
            w1 -> Conv c1[1]
            b1 -> Conv c1[2]
          small-matmul
            f -> MatMul y[0]
            w3 -> MatMul y[1]
          graph-output
            y -> graph output y
        """,
    )


def test_a_classifier_with_one_row_is_not_small():
    assert pairs(model("g (float[1,64] x) => (y) <float[64,64] w> { y = MatMul(x, w) }")) == {"x", "w"}


def test_a_conv_whose_weight_is_computed_is_never_half_quantized():
    assert_plan(
        "g (float[1,16,8,8] x, float[16,16,1,1] w) => (y) { y = Conv(x, w) }",
        """
        kept float
          graph-output
            y -> graph output y

        near misses
          conv
            Conv y: w 'w' is not constant
        """,
    )


def test_a_weight_that_two_convs_read_is_one_site():
    assert_plan(
        "g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { c = Conv(x, w) y = Conv(c, w) }",
        """
        quantized
          conv
            x -> Conv c[0]
            w (axis 0) -> Conv c[1], Conv y[1]
            c -> Conv y[0]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_a_weight_that_is_read_along_two_axes_is_two_sites():
    assert_plan(
        "g (float[8,32] x) => (y) <float[32,32] w> { a = MatMul(x, w) y = Gemm<transB=1>(a, w) }",
        """
        quantized
          matmul
            x -> MatMul a[0]
            w (axis 1) -> MatMul a[1]
          gemm-transposed
            a -> Gemm y[0]
            w (axis 0) -> Gemm y[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_the_site_of_a_weight_is_the_tensor_that_the_op_reads():
    assert_plan(
        """g (float[16,16] x) => (y) <
          float[16,16] w2, float16[16,16] w3, float[16,16] w4, float[256] w5, int64[2] shape = {16,16}
        > {
          k = Constant<value = float[16,16] {ONES}>()
          a = MatMul(x, k)
          i = Identity(w2)
          b = MatMul(a, i)
          f = Cast<to=1>(w3)
          c = MatMul(b, f)
          t = Transpose<perm=[1,0]>(w4)
          d = MatMul(c, t)
          r = Reshape(w5, shape)
          y = MatMul(d, r)
        }""".replace("ONES", ",".join(["1"] * 256)),
        """
        quantized
          matmul
            x -> MatMul a[0]
            k (axis 1) -> MatMul a[1]
            a -> MatMul b[0]
            i (axis 1) -> MatMul b[1]
            b -> MatMul c[0]
            f (axis 1) -> MatMul c[1]
            c -> MatMul d[0]
            t (axis 1) -> MatMul d[1]
            d -> MatMul y[0]
            r (axis 1) -> MatMul y[1]

        kept float
          graph-output
            y -> graph output y
        """,
        opset=19,
    )


def test_a_site_knows_whether_it_is_a_weight():
    plan = qdq_surgeon.plan(model("g (float[8,32] x) => (y) <float[32,32] w> { t = Transpose(w) y = MatMul(x, t) }"))
    assert {site.tensor: site.weight for site in plan.sites} == {"x": False, "t": True}


TIED = """g (int64[1,8] ids) => (logits) <float[1000,64] table, float[64,64] w> {
  e = Gather(table, ids)
  h = MatMul(e, w)
  LOGITS
}"""


def test_a_tied_embedding_is_looked_up_in_float_and_multiplied_in_int8():
    assert_plan(
        TIED.replace("LOGITS", "t = Transpose<perm=[1,0]>(table) logits = MatMul(h, t)"),
        """
        quantized
          matmul
            e -> MatMul h[0]
            w (axis 1) -> MatMul h[1]
            h -> MatMul logits[0]
            t (axis 1) -> MatMul logits[1]

        kept float
          embedding
            table -> Gather e[0]
          graph-output
            logits -> graph output logits
        """,
    )


def test_what_is_looked_up_does_not_reuse_the_scales_of_a_weight():
    text = TIED.replace("LOGITS", "f = Flatten<axis=2>(h) logits = Gemm<transB=1>(f, table)")
    assert_plan(
        text,
        """
        quantized
          matmul
            e -> MatMul h[0]
            w (axis 1) -> MatMul h[1]
          gemm-transposed
            f -> Gemm logits[0]
            table (axis 0) -> Gemm logits[1]

        kept float
          embedding
            table -> Gather e[0]
          graph-output
            logits -> graph output logits
        """,
    )


# ---- activations, gates, attention -------------------------------------------------------------------------------


def test_nothing_inside_a_silu_is_quantized():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,1,1] w2> {
          c = Conv(x, w1)
          s = Sigmoid(c)
          m = Mul(c, s)
          y = Conv(m, w2)
        }""",
        """
        quantized
          conv
            x -> Conv c[0]
            w1 (axis 0) -> Conv c[1]
            m -> Conv y[0]
            w2 (axis 0) -> Conv y[1]

        kept float
          silu
            c -> Sigmoid s[0]
            c -> Mul m[0]
            s -> Mul m[1]
          graph-output
            y -> graph output y
        """,
    )


def test_nothing_inside_a_hard_swish_in_several_ops_is_quantized():
    proto = model(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,1,1] w2,
                                         float zero = {0}, float three = {3}, float six = {6}> {
          c = Conv(x, w1)
          a = Add(c, three)
          l = Clip(a, zero, six)
          d = Div(l, six)
          m = Mul(c, d)
          y = Conv(m, w2)
        }"""
    )
    assert pairs(proto) == {"x", "w1", "m", "w2"}


EXCITE = """g (float[1,32,8,8] x) => (y) <
  float[32,32,1,1] w0, float[8,32,1,1] w1, float[32,8,1,1] w2, float[16,32,1,1] w3
> {
  a = Conv(x, w0)
  r = Relu(a)
  p = GlobalAveragePool(r)
  f = Conv(p, w1)
  h = Relu(f)
  e = Conv(h, w2)
  gate = Sigmoid(e)
  m = Mul(r, gate)
  y = Conv(m, w3)
}"""


def test_squeeze_and_excite():
    assert_plan(
        EXCITE,
        """
        quantized
          conv
            x -> Conv a[0]
            w0 (axis 0) -> Conv a[1]
            p -> Conv f[0]
            w1 (axis 0) -> Conv f[1]
            h -> Conv e[0]
            w2 (axis 0) -> Conv e[1]
            m -> Conv y[0]
            w3 (axis 0) -> Conv y[1]
          average-pool
            r -> GlobalAveragePool p[0]

        kept float
          activation
            e -> Sigmoid gate[0]
          graph-output
            y -> graph output y
        """,
    )


def test_squeeze_and_excite_in_the_case_of_efficientnet():
    assert_plan(
        EXCITE,
        """
        quantized
          conv
            x -> Conv a[0]
            w0 (axis 0) -> Conv a[1]
            p -> Conv f[0]
            w1 (axis 0) -> Conv f[1]
            h -> Conv e[0]
            w2 (axis 0) -> Conv e[1]
            m -> Conv y[0]
            w3 (axis 0) -> Conv y[1]
          average-pool
            r -> GlobalAveragePool p[0], Mul m[0] (squeeze-and-excite)
          squeeze-and-excite
            gate -> Mul m[1]

        kept float
          activation
            e -> Sigmoid gate[0]
          graph-output
            y -> graph output y
        """,
        placement="cases/efficientnet,tensorrt",
    )


def test_a_silu_is_no_squeeze_and_excite():
    proto = model("g (float[1,16,8,8] x) => (y) { s = Sigmoid(x) y = Mul(x, s) }")
    assert pairs(proto, "cases/efficientnet,tensorrt") == set()


ATTENTION = """g (float[1,LENGTH,64] x, float[1,LENGTH,LENGTH] mask) => (y) <
  float[64,64] wq, float[64,64] wk, float[64,64] wv, float[64,64] wo, float eight = {8}
> {
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  t = Transpose<perm=[0,2,1]>(k)
  s = MatMul(q, t)
  d = Div(s, eight)
  a = Add(d, mask)
  p = Softmax<axis=-1>(a)
  o = MatMul(p, v)
  y = MatMul(o, wo)
}"""


def attention(length: int = 32) -> str:
    return ATTENTION.replace("LENGTH", str(length))


def test_attention_stays_float():
    assert_plan(
        attention(),
        """
        quantized
          matmul
            x -> MatMul q[0], MatMul k[0], MatMul v[0]
            wq (axis 1) -> MatMul q[1]
            wk (axis 1) -> MatMul k[1]
            wv (axis 1) -> MatMul v[1]
            o -> MatMul y[0]
            wo (axis 1) -> MatMul y[1]

        kept float
          attention-matmul
            q -> MatMul s[0]
            t -> MatMul s[1]
            p -> MatMul o[0]
            v -> MatMul o[1]
          attention-scores
            d -> Add a[0]
            mask -> Add a[1]
          normalization
            a -> Softmax p[0]
          graph-output
            y -> graph output y
        """,
    )


def test_attention_in_int8():
    assert_plan(
        attention(),
        """
        quantized
          matmul
            x -> MatMul q[0], MatMul k[0], MatMul v[0]
            wq (axis 1) -> MatMul q[1]
            wk (axis 1) -> MatMul k[1]
            wv (axis 1) -> MatMul v[1]
            o -> MatMul y[0]
            wo (axis 1) -> MatMul y[1]
          attention-int8
            q -> MatMul s[0]
            t -> MatMul s[1]
            p (range 0..1) -> MatMul o[0]
            v -> MatMul o[1]

        kept float
          attention-scores
            d -> Add a[0]
            mask -> Add a[1]
          normalization
            a -> Softmax p[0]
          graph-output
            y -> graph output y
        """,
        placement="cases/attention-int8,tensorrt",
    )


@pytest.mark.parametrize(
    "scores",
    [
        "a = Identity(s)",
        "a = Div(s, eight)",
        "a = Mul(s, eight)",
        "a = Add(s, mask)",
        "d = Mul(s, eight) a = Add(d, mask)",
        "d = Mul(s, eight) a = Add(mask, d)",
    ],
)
def test_attention_in_int8_knows_the_usual_ways_to_scale_and_mask(scores):
    text = re.sub(r"d = .*\n.*\n", f"{scores}\n", attention())
    text = text.replace("a = Identity(s)\n  p = Softmax<axis=-1>(a)", "p = Softmax<axis=-1>(s)")
    assert {"q", "t", "p", "v"} <= pairs(model(text), "cases/attention-int8,tensorrt")


def test_attention_over_a_long_sequence_is_not_quantized_in_half():
    assert not {"q", "t", "p", "v"} & pairs(model(attention(length=1024)), "cases/attention-int8,tensorrt")


@pytest.mark.parametrize("case", ["resnet-v1", "resnet-v2", "mobilenet", "efficientnet", "inception"])
def test_an_attention_mask_stays_float_in_every_case(case):
    assert not {"mask", "d"} & pairs(model(attention()), f"cases/{case},tensorrt")


# ---- what is left alone ------------------------------------------------------------------------------------------


def test_shape_arithmetic_is_left_alone():
    assert_plan(
        """g (float[2,16,8,8] x) => (y) <float[1024,32] w, int64[1] minus = {-1}, int64[1] zero = {0}> {
          shape = Shape(x)
          n = Gather(shape, zero)
          size = Concat<axis=0>(n, minus)
          flat = Reshape(x, size)
          y = Gemm(flat, w)
        }""",
        """
        quantized
          gemm
            flat -> Gemm y[0]
            w (axis 1) -> Gemm y[1]

        kept float
          graph-output
            y -> graph output y
        """,
    )


def test_a_model_in_double_is_left_alone():
    assert_plan("g (double[1,16,8,8] x) => (y) <double[16,16,1,1] w> { c = Conv(x, w) y = Add(c, x) }", "")


def test_a_model_in_half_precision_is_planned_alike():
    text = "g (float16[1,16,8,8] x) => (y) <float16[16,16,1,1] w> { c = Conv(x, w) y = Add(c, x) }"
    assert decisions(model(text, opset=19)) == decisions(model(text.replace("float16", "float")))


def test_what_an_if_captures_has_one_pair_for_all_its_readers():
    proto = model(
        """g (bool flag, float[1,16,8,8] x) => (y, z) <float[16,16,1,1] w> {
          y = Conv(x, w)
          z = If(flag) <
            then_branch = t () => (float[1,16,8,8] a) { a = Conv(x, w) },
            else_branch = e () => (float[1,16,8,8] b) { b = Identity(x) }>
        }"""
    )
    assert decisions(proto) == dedent(
        """\
        quantized
          conv
            x -> Conv y[0], Conv z.then_branch/a[0]
            w (axis 0) -> Conv y[1], Conv z.then_branch/a[1]

        kept float
          graph-output
            y -> graph output y
            z -> graph output z"""
    )


def test_a_graph_input_gets_no_pair_of_its_own():
    assert pairs(model("g (float[1,16,8,8] x) => (y) { y = Relu(x) }")) == set()


# ---- other placements --------------------------------------------------------------------------------------------


def test_a_residual_block_with_all_add_inputs():
    assert_plan(
        RESIDUAL,
        """
        quantized
          conv
            x -> Conv c1[0], Add s[1] (all-add-inputs)
            w1 (axis 0) -> Conv c1[1]
            r1 -> Conv second[0]
            w2 (axis 0) -> Conv second[1]
          all-add-inputs
            c2 -> Add s[0]

        kept float
          conv
            b1 -> Conv c1[2]
          graph-output
            y -> graph output y
        """,
        placement="tensorrt-all-add-inputs",
    )


def test_a_residual_block_with_weights_only():
    assert_plan(
        RESIDUAL,
        """
        quantized
          conv-weight
            w1 (axis 0) -> Conv c1[1]
            w2 (axis 0) -> Conv second[1]

        kept float
          conv-weight
            b1 -> Conv c1[2]
          graph-output
            y -> graph output y
        """,
        placement="weights-only",
    )


def test_a_residual_block_in_the_recipe_of_tflite():
    assert_plan(
        RESIDUAL,
        """
        quantized
          graph-input
            x -> Conv c1[0], Add s[1]
          conv-weight
            w1 (axis 0) -> Conv c1[1]
            w2 (axis 0) -> Conv second[1]
          fused-activation-output
            r1 -> Conv second[0]
          weighted-output
            c2 -> Add s[0]

        kept float
          conv-weight
            b1 -> Conv c1[2]
          fused-activation-output
            c1 -> Relu r1[0]
          add-activation-output
            s -> Relu y[0]
          graph-output
            y -> graph output y
        """,
        placement="tflite",
    )


def test_the_recipe_of_tflite_quantizes_behind_batch_normalization():
    proto = model(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w1, float[16,16,1,1] w2,
             float[16] scale, float[16] shift, float[16] mean, float[16] var> {
          c = Conv(x, w1)
          n = BatchNormalization(c, scale, shift, mean, var)
          r = Relu(n)
          y = Conv(r, w2)
        }"""
    )
    assert pairs(proto, "tflite") == {"x", "w1", "r", "w2"}


# ---- verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def placement(tmp_path):
    def write(rules: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(dedent(rules))
        return str(path)

    return write


def test_a_match_that_loses_one_edge_quantizes_none_and_names_the_winner(placement):
    mine = placement(
        """
        [[rule]]
        name = "hands-off"
        match = "Conv(_, w)"
        keep_float = ["w"]
        because = "This weight is mine."
        [[rule]]
        include = "tensorrt"
        """
    )
    assert_plan(
        "g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { y = Conv(x, w) }",
        """
        kept float
          hands-off
            w -> Conv y[1]
          graph-output
            y -> graph output y

        near misses
          conv
            Conv y: 'w' into Conv y[1] is already kept float by hands-off
        """,
        placement=mine,
    )


def test_a_weight_wanted_along_another_axis_is_lost_to_the_first_rule(placement):
    mine = placement(
        """
        [[rule]]
        name = "other-axis"
        match = "Conv(_, w)"
        quantize = ["w"]
        axis = { w = 1 }
        because = "The other axis."
        [[rule]]
        include = "tensorrt"
        """
    )
    plan = qdq_surgeon.plan(
        model("g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { y = Conv(x, w) }"), placement=mine
    )
    assert [(site.tensor, site.axis) for site in plan.sites] == [("w", 1)]
    assert [(miss.rule, miss.reason) for miss in plan.near_misses] == [
        ("conv", "'w' into Conv y[1] is already quantized along another axis by other-axis")
    ]


@pytest.mark.parametrize(
    ("axis", "match", "reason"),
    [
        (4, "Conv(_, w)", "'w' has no axis 4"),
        (-5, "Conv(_, w)", "'w' has no axis -5"),
        (0, "Conv(w, _)", "'x' is not constant, so it cannot have a scale per channel"),
    ],
)
def test_an_axis_that_does_not_fit_is_a_miss(placement, axis, match, reason):
    mine = placement(
        f"""
        [[rule]]
        name = "wrong-axis"
        match = "{match}"
        quantize = ["w"]
        axis = {{ w = {axis} }}
        because = "No such axis."
        """
    )
    proto = model("g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { y = Conv(x, w) }")
    plan = qdq_surgeon.plan(proto, placement=mine)
    assert not plan.sites
    assert [miss.reason for miss in plan.near_misses] == [reason]


def test_a_rule_may_only_share(placement):
    mine = placement(
        """
        [[rule]]
        include = "tensorrt"
        [[rule]]
        name = "one-scale"
        match = "Sub(a, b)"
        share = ["a", "b"]
        because = "Both sides on one scale."
        """
    )
    plan = qdq_surgeon.plan(
        model(
            """g (float[1,16,8,8] x, float[1,16,8,8] z) => (y, p, q) <float[16,16,1,1] w> {
              y = Sub(x, z)
              p = Conv(x, w)
              q = Conv(z, w)
            }"""
        ),
        placement=mine,
    )
    assert [(share.rule, share.tensors, share.limit) for share in plan.shares] == [("one-scale", ("x", "z"), None)]


def test_a_node_without_inputs_can_be_missed(placement):
    mine = placement(
        """
        [[rule]]
        name = "anything"
        match = "y := _(*xs)"
        where = { y = "activation" }
        quantize = ["xs"]
        because = "Any op."
        """
    )
    proto = model("g (float[1] x) => (y) { k = Constant<value_float = 1.0>() y = Mul(x, k) }")
    plan = qdq_surgeon.plan(proto, placement=mine)
    assert [str(miss) for miss in plan.misses] == [
        "Constant k: y 'k' is not activation (the tensor is float and not constant)"
    ]


def test_out_speaks_of_every_edge_that_can_read_a_pair(placement):
    mine = placement(
        """
        [[rule]]
        name = "output"
        match = "a := Relu(_)"
        quantize = ["out(a)"]
        because = "What a Relu writes."
        """
    )
    assert_plan(
        """g (bool flag, float[4] x) => (y, shape, z, a) {
          a = Relu(x)
          y = Mul(a, a)
          shape = Shape(a)
          z = If(flag) <
            then_branch = t () => (float[4] p) { p = Neg(a) }, else_branch = e () => (float[4] q) { q = Abs(a) }>
        }""",
        """
        quantized
          output
            a -> Mul y[0], Mul y[1], Neg z.then_branch/p[0], Abs z.else_branch/q[0]

        kept float
          graph-output
            y -> graph output y
            z -> graph output z
            a -> graph output a
        """,
        placement=mine,
    )


# ---- filters -----------------------------------------------------------------------------------------------------

WITHOUT_SECOND = """
quantized
  conv
    x -> Conv c1[0], Add s[1] (residual-add)
    w1 (axis 0) -> Conv c1[1]

kept float
  conv
    b1 -> Conv c1[2]
  filter
    r1 -> Conv second[0]
    w2 -> Conv second[1]
  residual-add
    c2 -> Add s[0]
  graph-output
    y -> graph output y
"""


@pytest.mark.parametrize(
    "exclude",
    ["second", "sec*", "s?cond", "[rs]econd", "c2", ["second"], lambda node: node.name == "second"],
)
def test_an_excluded_conv_stays_float_and_the_residual_rule_stands(exclude):
    assert_plan(RESIDUAL, WITHOUT_SECOND, exclude=exclude)


def test_an_excluded_add_keeps_its_skip_float():
    assert_plan(
        RESIDUAL,
        """
        quantized
          conv
            x -> Conv c1[0]
            w1 (axis 0) -> Conv c1[1]
            r1 -> Conv second[0]
            w2 (axis 0) -> Conv second[1]

        kept float
          conv
            b1 -> Conv c1[2]
          residual-add
            c2 -> Add s[0]
          filter
            x -> Add s[1]
          graph-output
            y -> graph output y
        """,
        exclude="s",
    )


def test_include_leaves_out_all_other_nodes():
    assert pairs(model(RESIDUAL), include="second") == {"r1", "w2"}
    assert pairs(model(RESIDUAL), include=["second", "s"]) == {"r1", "w2", "x"}
    assert pairs(model(RESIDUAL), include=lambda node: node.op == "Add") == {"x"}


def test_exclude_takes_away_from_include():
    assert pairs(model(RESIDUAL), include=["c1", "second"], exclude="c1") == {"r1", "w2"}


def test_op_types_leave_out_all_other_ops():
    assert pairs(model(RESIDUAL), op_types=["Add"]) == {"x"}
    assert pairs(model(RESIDUAL), op_types=["Add", "Conv"]) == {"x", "w1", "r1", "w2"}
    assert decisions(model(RESIDUAL), op_types="Conv") == decisions(model(RESIDUAL), exclude="s")


def test_a_name_that_looks_like_a_glob_is_first_a_name():
    proto = model(RESIDUAL)
    proto.graph.node[0].name, proto.graph.node[2].name = "block[0]", "block0"
    assert pairs(proto, exclude="block[0]") == {"x", "r1", "w2"}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"exclude": "secnd"}, "exclude: no node is called 'secnd'. Did you mean 'second'?"),
        ({"include": "secnd"}, "include: no node is called 'secnd'. Did you mean 'second'?"),
        ({"exclude": ["second", "zzz*"]}, "exclude: no node is called 'zzz*'."),
        ({"exclude": lambda node: False}, "exclude: the function chooses no node of the model"),
        ({"op_types": "Cnv"}, "op_types: the model has no 'Cnv'. Did you mean 'Conv'? It has Add, Conv, Relu"),
        ({"op_types": ["Conv", "Gemm"]}, "op_types: the model has no 'Gemm'."),
    ],
)
def test_a_filter_that_matches_nothing_is_refused_with_the_nearest_names(filters, message):
    with pytest.raises(FilterError) as error:
        plan_text(model(RESIDUAL), **filters)
    assert str(error.value).startswith(message)


def test_a_pool_whose_reader_is_excluded_has_no_orphan_pair():
    assert_plan(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> {
          a = Neg(x)
          p = MaxPool<kernel_shape=[2,2]>(a)
          y = Conv(p, w)
        }""",
        """
        kept float
          filter
            p -> Conv y[0]
            w -> Conv y[1]
          graph-output
            y -> graph output y

        near misses
          max-pool
            MaxPool p: y 'p' is not moved_to_quantized
          max-pool-joins
            MaxPool p: x 'a' is not quantized_elsewhere
        """,
        exclude="y",
    )


def test_a_concat_one_of_whose_readers_is_excluded_has_no_pairs():
    proto = model(
        """g (float[1,16,8,8] a, float[1,16,8,8] b) => (y, z) <float[16,32,1,1] w> {
          k = Concat<axis=1>(a, b)
          y = Conv(k, w)
          z = Conv(k, w)
        }"""
    )
    assert pairs(proto) == {"a", "b", "k", "w"}
    assert pairs(proto, exclude="z") == {"k", "w"}


def read_slots(proto: ModelProto, reader: str, placement: str, **filters) -> list[int]:
    """The slots by which the node that makes `reader` reads a pair."""
    edges = [edge for site in qdq_surgeon.plan(proto, placement=placement, **filters).sites for edge in site.edges]
    return sorted(edge.slot for edge in edges if edge.reader == reader)


def test_an_excluded_node_reads_a_quantized_graph_input_in_float():
    assert read_slots(model(RESIDUAL), "c1", "tflite") == [0, 1]
    assert read_slots(model(RESIDUAL), "c1", "tflite", exclude="c1") == []


@pytest.mark.parametrize("filters", [{}, {"exclude": "b"}, {"exclude": "c"}, {"include": "a"}])
def test_a_filter_never_leaves_another_conv_half_quantized(filters):
    proto = model(
        """g (float[1,16,8,8] x) => (a, b) <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3> {
          c = Conv(x, w1)
          a = Conv(c, w2)
          b = Conv(c, w3)
        }"""
    )
    assert read_slots(proto, "a", "tflite", **filters) in ([], [0, 1])


def test_the_edges_of_an_excluded_node_are_kept_on_purpose():
    plan = qdq_surgeon.plan(model(RESIDUAL), exclude="second")
    assert plan.because["filter"] == "Your filter keeps this node in float."
    assert not plan.near_misses


# ---- the same plan for the same model ----------------------------------------------------------------------------

MODELS = {
    "residual": (RESIDUAL, "tensorrt"),
    "preactivation": (PREACTIVATION, "cases/resnet-v2,tensorrt"),
    "inception": (INCEPTION, "tensorrt"),
    "squeeze-and-excite": (EXCITE, "cases/efficientnet,tensorrt"),
    "attention": (attention(), "cases/attention-int8,tensorrt"),
    "tflite": (INCEPTION, "tflite"),
    "small product": (
        "g (float[4,4] x) => (y) <float[4,32] w1, float[32,32] w2, float[32,8] w3> "
        "{ a = MatMul(x, w1) b = MatMul(a, w2) c = MatMul(b, w3) y = MatMul(c, x) }",
        "tensorrt",
    ),
    "spatial mean": (
        "g (float[1,16,16,16] x) => (y) <float[16,32] w> "
        "{ a = Neg(x) r = Relu(a) m = ReduceMean<axes=[2,3], keepdims=0>(r) y = MatMul(m, w) }",
        "tensorrt",
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_does_not_depend_on_the_stored_order(name, seed):
    text, placement = MODELS[name]
    proto = model(text)
    plan = qdq_surgeon.plan(proto, placement=placement)
    other = qdq_surgeon.plan(shuffled(proto, seed), placement=placement)
    assert str(other) == str(plan)
    assert other == plan


BLOCKS = {
    "conv": "{t} = Conv({a}, weight)",
    "relu": "{t} = Relu({a})",
    "silu": "s{t} = Sigmoid({a}) {t} = Mul({a}, s{t})",
    "add": "{t} = Add({a}, {b})",
    "residual": "f{t} = Conv({a}, weight) {t} = Add(f{t}, {b})",
    "concat": "k{t} = Concat<axis=1>({a}, {b}) {t} = Conv(k{t}, wide)",
    "pool": "{t} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({a})",
}


@st.composite
def graphs(draw) -> ModelProto:
    """Chains, residual blocks and concats over two inputs; each block reads tensors made shortly before."""
    blocks = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=2, max_size=12))
    nodes, tensors = [], ["t0", "t1"]
    for index, block in enumerate(blocks, start=2):
        a, b = (draw(st.sampled_from(tensors[-4:])) for _ in "ab")
        nodes.append(BLOCKS[block].format(t=f"t{index}", a=a, b=b))
        tensors.append(f"t{index}")
    return model(
        f"""g (float[1,16,8,8] t0, float[1,16,8,8] t1) => ({tensors[-1]}) <
          float[16,16,1,1] weight, float[16,32,1,1] wide
        > {{ {" ".join(nodes)} }}"""
    )


def all_names(proto: ModelProto) -> set[str]:
    graph = proto.graph
    values = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    return values.union(*((*node.input, *node.output) for node in graph.node))


def renamed(proto: ModelProto, names: dict[str, str]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.initializer):
        value.name = names[value.name]
    for node in copy.graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    return copy


@given(graphs(), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_any_graph_is_planned_alike_in_any_stored_order(proto, seed):
    assert decisions(shuffled(proto, seed)) == decisions(proto)


@given(graphs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_graph_is_planned_alike_under_other_names(proto, random):
    names = sorted(all_names(proto))
    others = [f"n{index:03}" for index in range(len(names))]
    random.shuffle(others)
    back = dict(zip(others, names, strict=True))
    text = decisions(renamed(proto, dict(zip(names, others, strict=True))))
    assert re.sub(r"\bn\d{3}\b", lambda found: back[found[0]], text) == decisions(proto)


# ---- saved plans, and the story of one node ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_plan_reads_back_unchanged(name):
    text, placement = MODELS[name]
    plan = qdq_surgeon.plan(model(text), placement=placement)
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert str(back) == str(plan)
    assert back.to_json() == plan.to_json()


def saved(**changes) -> str:
    raw = json.loads(qdq_surgeon.plan(model(RESIDUAL)).to_json())
    return json.dumps({key: value for key, value in (raw | changes).items() if value is not None})


def test_a_saved_plan_may_come_with_a_comparison():
    assert Plan.from_json(saved(comparison={"outputs": []})) == qdq_surgeon.plan(model(RESIDUAL))


@pytest.mark.parametrize("text", ["", "hello", "null", "3", "[]", "{}", '{"format": 1}'])
def test_a_text_that_is_no_saved_plan_is_refused(text):
    with pytest.raises(PlanError, match=r"not a saved plan .*: make one with --plan --json"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None},
        {"sites": None},
        {"model_digest": None},
        {"more": 1},
        {"sites": [1]},
        {"sites": [{"tensor": "x"}]},
        {"kept": [{"tensor": "x", "edge": {"scope": []}, "rule": "conv"}]},
    ],
)
def test_a_damaged_plan_is_refused(changes):
    with pytest.raises(PlanError, match=r"not a saved plan .*: make one with --plan --json"):
        Plan.from_json(saved(**changes))


def test_a_plan_that_is_cut_short_is_refused():
    with pytest.raises(PlanError, match="not a saved plan"):
        Plan.from_json(saved()[:-20])


def test_a_plan_of_another_format_is_refused():
    with pytest.raises(PlanError, match="another format than 1: make it again with --plan --json"):
        Plan.from_json(saved(format=2))


def test_a_plan_of_another_model_does_not_fit():
    plan = qdq_surgeon.plan(model(RESIDUAL))
    check_plan(load(model(RESIDUAL)), plan)
    with pytest.raises(PlanError, match="the plan belongs to another model: make one for this model"):
        check_plan(load(model(INCEPTION)), plan)


@pytest.mark.parametrize(
    "edge",
    [Edge((), "c1", 1), Edge((), "c1", 9), Edge((), "c1", -3), Edge((), "nowhere", 0), Edge((), "y", -1)],
)
def test_a_plan_whose_edges_do_not_read_its_tensors_does_not_fit(edge):
    loaded = load(model(RESIDUAL))
    plan = replace(qdq_surgeon.plan(loaded), sites=(Site("x", (Read(edge, "conv"),)),))
    with pytest.raises(PlanError, match=r"the plan lets .* read 'x', which it does not do in this model"):
        check_plan(loaded, plan)


def test_a_plan_with_two_pairs_for_one_edge_does_not_fit():
    loaded = load(model(RESIDUAL))
    site = Site("x", (Read(Edge((), "c1", 0), "conv"),))
    with pytest.raises(PlanError, match="the plan has two pairs for"):
        check_plan(loaded, replace(qdq_surgeon.plan(loaded), sites=(site, site)))


def story(text: str, name: str, **options) -> str:
    loaded = load(model(text))
    return explain(qdq_surgeon.plan(loaded, **options), loaded.graph, name)


def test_explain_tells_the_story_of_a_residual_add():
    assert story(RESIDUAL, "s") == dedent(
        """\
        Add s
          reads 'c2' in slot 0: float by residual-add: The skip input sets the precision of the fused Conv+Add; \
the Conv branch must reach the Add bare.
          reads 'x' in slot 1: quantized by residual-add: The skip input sets the precision of the fused Conv+Add; \
the Conv branch must reach the Add bare.
          makes 's' for Relu y[0]: float: no rule speaks of it
          did not apply: bias-add: b 'x' is not constant (the tensor is a float constant: an initializer, \
or made from constants alone)
          did not apply: attention-scores: y 's' is not feeds_softmax (the tensor leads to a Softmax through \
arithmetic and data movement alone: it holds attention scores)
          did not apply: add: y 's' is not consumed_quantized (the tensor is read quantized, and by nothing in float, \
looking through data movement, Relu and Clip)"""
    )


def test_explain_finds_nodes_by_name_output_and_glob():
    assert story(RESIDUAL, "second") == story(RESIDUAL, "c2")
    assert story(RESIDUAL, "c*") == story(RESIDUAL, "c1") + "\n\n" + story(RESIDUAL, "c2")


def test_explain_speaks_of_pairs_outputs_filters_and_what_is_no_float():
    text = """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w, int64[4] size = {1,16,64,1}> {
      r = Reshape(x, size)
      y = Conv(r, w)
    }"""
    assert "reads 'w' in slot 1: quantized (axis 0) by conv: An INT8 Conv" in story(text, "y")
    assert "makes 'y' for a graph output: float by graph-output: A graph's own outputs" in story(text, "y")
    assert "reads 'size' in slot 1: not a float tensor" in story(text, "r")
    assert "reads 'x' in slot 0: float: no rule speaks of it" in story(text, "r")
    assert "makes 'r' for Conv y[0]: quantized by conv" in story(text, "r")
    assert "reads 'r' in slot 0: float by filter: Your filter keeps this node" in story(text, "y", exclude="y")


def test_explain_of_an_unknown_node_names_the_nearest():
    with pytest.raises(FilterError, match=r"no node is called 'secnd'. Did you mean 'second'"):
        story(RESIDUAL, "secnd")


def test_an_edge_is_its_scope_reader_and_slot():
    assert Edge((), "y", 0, "Conv", "first") == Edge((), "y", 0, "Relu", "second")
    assert Edge((), "y", 0) != Edge((), "y", 1)
    assert Edge((), "y", 0) != Edge(("z.then_branch",), "y", 0)
