from dataclasses import dataclass, field

import pytest

from qdq_surgeon.edges import GRAPH_OUTPUT, Edge
from qdq_surgeon.graph import Graph
from qdq_surgeon.model import load
from qdq_surgeon.rules.predicates import PAIR_PREDICATES, PREDICATES, Subject, sentence
from tests.graphs import model


@dataclass
class View:
    """A graph, and the edges that a rule has quantized so far."""

    graph: Graph
    quantized: set[Edge] = field(default_factory=set)

    def is_quantized(self, edge: Edge) -> bool:
        return edge in self.quantized


def view(text: str, *quantized: str) -> View:
    """`quantized` are edges, each written as the first output of the reading node and its slot: "c 0"."""
    edges = {Edge((), reader, int(slot)) for reader, slot in map(str.split, quantized)}
    return View(load(model(text)).graph, edges)


def holds(predicate: str, view: View, *tensors: str) -> bool:
    function = PREDICATES.get(predicate) or PAIR_PREDICATES[predicate]
    return function(view, *(Subject(tensor, view.graph.producer(tensor)) for tensor in tensors))  # type: ignore


@pytest.mark.parametrize("name", [*PREDICATES, *PAIR_PREDICATES])
def test_every_condition_is_one_sentence_that_a_report_can_quote(name):
    function = PREDICATES.get(name) or PAIR_PREDICATES[name]
    assert function.__doc__
    assert function.__doc__.strip().endswith(".")
    assert "\n" not in function.__doc__.strip()
    assert sentence(function)[0].islower()
    assert not sentence(function).endswith(".")


# ---- on one tensor -----------------------------------------------------------------------------------------------

MIXED = """g (float[4,4] x, int64[4] ids, double[4] d) => (y, n, e) <float[4,4] w, int64[1] i = {1}> {
  k = Identity(w)
  y = MatMul(x, k)
  n = Add(ids, i)
  e = Neg(d)
}"""


def test_activation():
    graph = view(MIXED)
    assert holds("activation", graph, "x")
    assert holds("activation", graph, "y")
    assert not holds("activation", graph, "w")
    assert not holds("activation", graph, "k")
    assert not holds("activation", graph, "ids")
    assert not holds("activation", graph, "d")


def test_constant():
    graph = view(MIXED)
    assert holds("constant", graph, "w")
    assert holds("constant", graph, "k")
    assert not holds("constant", graph, "x")
    assert not holds("constant", graph, "i")


def test_single_use():
    graph = view("g (float[4] x) => (y) { a = Relu(x) b = Neg(a) c = Abs(a) y = Add(b, c) }")
    assert holds("single_use", graph, "b")
    assert holds("single_use", graph, "y")
    assert not holds("single_use", graph, "a")


def test_single_use_counts_a_node_that_reads_twice():
    assert not holds("single_use", view("g (float[4] x) => (y) { a = Relu(x) y = Mul(a, a) }"), "a")


def test_single_use_counts_a_graph_output():
    assert not holds("single_use", view("g (float[4] x) => (a, y) { a = Relu(x) y = Neg(a) }"), "a")


def test_single_use_counts_the_body_of_an_if():
    captured = view(
        """g (bool f, float[4] x) => (y, z) {
          a = Relu(x)
          y = Neg(a)
          z = If(f) <
            then_branch = t () => (float[4] p) { p = Abs(a) },
            else_branch = e () => (float[4] q) { q = Abs(a) }>
        }"""
    )
    assert not holds("single_use", captured, "a")


def test_single_use_leaves_out_what_leads_to_no_output():
    assert holds("single_use", view("g (float[4] x) => (y) { a = Relu(x) y = Neg(a) dead = Abs(a) }"), "a")


def branch(nodes: str) -> View:
    """A Conv that makes c, then `nodes`, which make t, then an Add that reads t."""
    return view(
        f"""g (float[1,16,8,8] x, float[1,16,8,8] z) => (y) <
          float[16,16,1,1] w, float[16] scale, float[16] bias, float[16] mean, float[16] var,
          float[1,16,1,1] k, float three = {{3}}, float six = {{6}}, float zero = {{0}}, float root = {{1.414}},
          float one = {{1}}, float half = {{0.5}}, float slope
        > {{ c = Conv(x, w) {nodes} y = Add(t, z) }}"""
    )


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("t = Relu(c)", id="activation"),
        pytest.param("t = PRelu(c, slope)", id="activation with a slope"),
        pytest.param("t = Clip(c, zero, six)", id="clip"),
        pytest.param("b = BatchNormalization(c, scale, bias, mean, var) t = Relu(b)", id="bn and activation"),
        pytest.param("t = Add(c, k)", id="bias"),
        pytest.param("t = Add(k, c)", id="bias on the left"),
        pytest.param("m = Mul(c, k) t = Add(m, k)", id="unfolded bn"),
        pytest.param("t = Transpose<perm=[0,2,3,1]>(c)", id="transpose"),
        pytest.param("i = Identity(c) t = Dropout(i)", id="identity and dropout"),
        pytest.param("s = Sigmoid(c) t = Mul(c, s)", id="silu"),
        pytest.param("s = Sigmoid(c) t = Mul(s, c)", id="silu, turned"),
        pytest.param("b = Add(c, k) s = Sigmoid(b) t = Mul(b, s)", id="bias and silu"),
        pytest.param("a = Add(c, three) l = Clip(a, zero, six) d = Div(l, six) t = Mul(c, d)", id="hard swish"),
        pytest.param("h = HardSigmoid(c) t = Mul(c, h)", id="hard swish by HardSigmoid"),
        pytest.param("s = Softplus(c) h = Tanh(s) t = Mul(c, h)", id="mish"),
        pytest.param(
            "d = Div(c, root) e = Erf(d) a = Add(e, one) m = Mul(c, a) t = Mul(m, half)", id="gelu in several ops"
        ),
    ],
)
def test_fused_branch_sees_the_conv_through(nodes):
    assert holds("fused_branch", branch(nodes), "t")


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("t = MaxPool<kernel_shape=[1,1]>(c)", id="pool"),
        pytest.param("t = Add(c, z)", id="add of two activations"),
        pytest.param("t = Mul(c, z)", id="mul of two activations"),
        pytest.param("t = Softmax(c)", id="softmax"),
        pytest.param("r = Relu(c) n = Neg(c) p = Add(r, n) t = Relu(p)", id="two branches"),
        pytest.param("s = Sigmoid(z) t = Mul(c, s)", id="a gate from elsewhere"),
        pytest.param("t = Relu(z)", id="no conv"),
    ],
)
def test_fused_branch_stops_at(nodes):
    assert not holds("fused_branch", branch(nodes), "t")


def test_fused_branch_starts_at_conv_gemm_or_matmul():
    graph = view(
        """g (float[16,16] x, float[1,16,8,8] i) => (a, b, c, d) <float[16,16] w, float[16,16,1,1] k> {
          a = MatMul(x, w)
          b = Gemm(x, w)
          c = ConvTranspose(i, k)
          d = Relu(x)
        }"""
    )
    assert holds("fused_branch", graph, "a")
    assert holds("fused_branch", graph, "b")
    assert holds("fused_branch", graph, "c")
    assert not holds("fused_branch", graph, "d")
    assert not holds("fused_branch", graph, "x")


def test_fused_branch_needs_the_tensors_between_to_have_one_reader():
    assert holds("fused_branch", branch("r = Relu(c) t = Dropout(r)"), "t")
    twice = view(
        """g (float[1,16,8,8] x) => (t, n) <float[16,16,1,1] w> { c = Conv(x, w) t = Relu(c) n = Neg(c) }""",
    )
    assert not holds("fused_branch", twice, "t")


def test_fused_branch_does_not_see_through_a_silu_whose_x_is_read_elsewhere():
    graph = view(
        """g (float[1,16,8,8] x) => (t, n) <float[16,16,1,1] w> {
          c = Conv(x, w)
          s = Sigmoid(c)
          t = Mul(c, s)
          n = Neg(c)
        }"""
    )
    assert not holds("fused_branch", graph, "t")


CONSUMED = """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w, int64[4] shape = {{1,16,64,1}}> {{
  a = Neg(x)
  {between}
  y = Conv(t, w)
}}"""


@pytest.mark.parametrize(
    "between",
    [
        pytest.param("t = Identity(a)", id="identity"),
        pytest.param("t = Relu(a)", id="relu"),
        pytest.param("t = Clip(a)", id="clip"),
        pytest.param("t = MaxPool<kernel_shape=[2,2]>(a)", id="max pool"),
        pytest.param("t = Reshape(a, shape)", id="reshape"),
        pytest.param("r = Relu(a) m = MaxPool<kernel_shape=[2,2]>(r) t = Transpose<perm=[0,1,3,2]>(m)", id="a chain"),
        pytest.param('t = Resize<mode="nearest">(a, , , shape)', id="nearest resize"),
    ],
)
def test_consumed_quantized_looks_through(between):
    text = CONSUMED.format(between=between)
    assert holds("consumed_quantized", view(text, "y 0"), "a")
    assert not holds("consumed_quantized", view(text), "a")


@pytest.mark.parametrize(
    "between",
    [
        pytest.param("t = Sigmoid(a)", id="sigmoid"),
        pytest.param("t = AveragePool<kernel_shape=[2,2]>(a)", id="average pool"),
        pytest.param('t = Resize<mode="linear">(a, , , shape)', id="linear resize"),
        pytest.param("t = Neg(a)", id="neg"),
    ],
)
def test_consumed_quantized_stops_at(between):
    assert not holds("consumed_quantized", view(CONSUMED.format(between=between), "y 0"), "a")


def test_consumed_quantized_by_the_reader_itself():
    text = "g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { a = Neg(x) y = Conv(a, w) }"
    assert holds("consumed_quantized", view(text, "y 0"), "a")
    assert not holds("consumed_quantized", view(text), "a")


def test_consumed_quantized_allows_no_float_reader():
    text = """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> {
      a = Neg(x)
      c = Conv(a, w)
      d = Conv(a, w)
      y = Add(c, d)
    }"""
    assert holds("consumed_quantized", view(text, "c 0", "d 0"), "a")
    assert not holds("consumed_quantized", view(text, "c 0"), "a")


def test_consumed_quantized_allows_no_graph_output():
    text = "g (float[1,16,8,8] x) => ({outputs}) <float[16,16,1,1] w> {{ a = Neg(x) r = Relu(a) y = Conv(r, w) }}"
    assert holds("consumed_quantized", view(text.format(outputs="y"), "y 0"), "a")
    assert not holds("consumed_quantized", view(text.format(outputs="y, a"), "y 0"), "a")
    assert not holds("consumed_quantized", view(text.format(outputs="y, r"), "y 0"), "a")


def test_consumed_quantized_does_not_mind_who_reads_the_shape():
    text = "g (float[1,16,8,8] x) => (y, s) <float[16,16,1,1] w> {{ a = Neg(x) s = {op}(a) y = Conv(a, w) }}"
    assert holds("consumed_quantized", view(text.format(op="Shape"), "y 0"), "a")
    assert not holds("consumed_quantized", view(text.format(op="Abs"), "y 0"), "a")


def test_consumed_quantized_follows_every_output_of_a_split():
    text = """g (float[1,32,8,8] x) => (y, z) <float[16,16,1,1] w> {
      a = Neg(x)
      l, r = Split<axis=1>(a)
      y = Conv(l, w)
      z = Conv(r, w)
    }"""
    assert holds("consumed_quantized", view(text, "y 0", "z 0"), "a")
    assert not holds("consumed_quantized", view(text, "y 0"), "a")


def test_consumed_quantized_sees_the_body_of_an_if_as_float():
    text = """g (bool f, float[1,16,8,8] x) => (y, z) <float[16,16,1,1] w> {
      a = Neg(x)
      y = Conv(a, w)
      z = If(f) <
        then_branch = t () => (float[1,16,8,8] p) { p = Identity(a) },
        else_branch = e () => (float[1,16,8,8] q) { q = Identity(a) }>
    }"""
    assert not holds("consumed_quantized", view(text, "y 0"), "a")


def test_quantized_elsewhere():
    text = "g (float[1,16,8,8] x) => (y, p) <float[16,16,1,1] w> { y = Conv(x, w) p = MaxPool<kernel_shape=[2,2]>(x) }"
    assert holds("quantized_elsewhere", view(text, "y 0"), "x")
    assert not holds("quantized_elsewhere", view(text), "x")
    assert not holds("quantized_elsewhere", view(text, "y 1"), "x")


def conv(weight: str, group: int = 1, first: bool = False) -> View:
    """A Conv with this weight: on a graph input, or behind an op that keeps it from being the first."""
    channels, *_ = [int(size) * group for size in weight.split(",")[1:]]
    data = "Identity" if first else "Softmax"
    size = ",".join(["9"] * (weight.count(",") - 1))
    return view(
        f"g (float[1,{channels},{size}] x) => (y) <float[{weight}] w> {{ d = {data}(x) y = Conv<group={group}>(d, w) }}"
    )


def test_small_conv_by_channels():
    assert holds("small_conv", conv("8,8,3,3"), "y")
    assert not holds("small_conv", conv("16,8,3,3"), "y")
    assert not holds("small_conv", conv("8,16,3,3"), "y")


def test_small_conv_spares_the_first_conv():
    assert not holds("small_conv", conv("8,3,3,3", first=True), "y")
    assert holds("small_conv", conv("8,3,3,3"), "y")


def test_small_conv_by_alignment():
    assert holds("small_conv", conv("20,17,3,3"), "y")
    assert holds("small_conv", conv("17,3,3,3", first=True), "y")
    assert not holds("small_conv", conv("20,16,3,3"), "y")
    assert not holds("small_conv", conv("24,17,3,3"), "y")


def test_small_conv_by_kernel():
    assert holds("small_conv", conv("16,16,1,7"), "y")
    assert not holds("small_conv", conv("16,16,7,7"), "y")
    assert not holds("small_conv", conv("16,16,7"), "y")


def test_small_conv_in_groups():
    assert not holds("small_conv", conv("32,1,3,3", group=32), "y")
    assert not holds("small_conv", conv("8,1,3,5", group=8), "y")
    assert holds("small_conv", conv("32,1,1,1", group=32), "y")
    assert holds("small_conv", conv("32,1,3,1", group=32), "y")
    assert holds("small_conv", conv("12,1,3,3", group=12), "y")


def test_small_conv_does_not_judge_a_weight_of_unknown_size():
    text = "g (float[1,N,8,8] x, float[M,N,3,3] w) => (y) { y = Conv(x, w) }"
    assert not holds("small_conv", view(text), "y")


def product(left: str, right: str, op: str = "MatMul") -> View:
    return view(f"g (float[{left}] a, float[{right}] b) => (y) {{ y = {op}(a, b) }}")


def test_small_matmul_by_k():
    assert holds("small_matmul", product("32,8", "8,32"), "y")
    assert not holds("small_matmul", product("32,16", "16,32"), "y")


def test_small_matmul_by_n():
    assert holds("small_matmul", product("32,64", "64,15"), "y")
    assert holds("small_matmul", product("32,64", "64,1"), "y")
    assert holds("small_matmul", product("32,64", "64"), "y")
    assert not holds("small_matmul", product("32,64", "64,16"), "y")


def test_small_matmul_does_not_mind_one_row():
    assert not holds("small_matmul", product("1,64", "64,64"), "y")
    assert not holds("small_matmul", product("64", "64,64"), "y")


def test_small_matmul_does_not_judge_dynamic_sizes():
    assert not holds("small_matmul", product("N,K", "K,M"), "y")
    assert holds("small_matmul", product("N,K", "K,8"), "y")
    assert holds("small_matmul", product("N,8", "K,M"), "y")


def test_small_matmul_reads_gemms_transposes():
    assert not holds("small_matmul", product("1,64", "64,64", "Gemm"), "y")
    assert holds("small_matmul", product("32,64", "8,64", "Gemm<transB=1>"), "y")
    assert not holds("small_matmul", product("8,64", "32,64", "Gemm<transB=1>"), "y")
    assert holds("small_matmul", product("8,64", "8,32", "Gemm<transA=1>"), "y")
    assert not holds("small_matmul", product("64,8", "64,32", "Gemm<transA=1>"), "y")


def test_feeds_softmax():
    text = """g (float[1,4,8,8] x, float[1,4,8,8] m) => (y) <int64[3] shape = {4,8,8}> {
      a = Add(x, m)
      r = Reshape(a, shape)
      c = Cast<to=1>(r)
      y = Softmax(c)
    }"""
    assert holds("feeds_softmax", view(text), "a")
    assert holds("feeds_softmax", view(text), "c")
    assert not holds("feeds_softmax", view(text.replace("Softmax", "Relu")), "a")


@pytest.mark.parametrize("between", ["Mul(a, m)", "Div(a, m)", "Max(a, m)", "Add(a, m)", "Where(flag, a, m)"])
def test_scores_are_scores_before_they_are_scaled_masked_or_clamped_too(between):
    text = f"""g (float[4,8] x, float[4,8] m, bool[4,8] flag) => (y) {{
      a = Add(x, m)
      b = {between}
      y = Softmax(b)
    }}"""
    assert holds("feeds_softmax", view(text), "a")


def test_data_movement_leads_to_quantized_readers_but_a_relu_does_not():
    text = "g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { r = Relu(x) y = Conv(r, w) }"
    quantized = view(text, "y 0")
    assert holds("consumed_quantized", quantized, "x")
    assert not holds("moved_to_quantized", quantized, "x")
    assert holds("moved_to_quantized", quantized, "r")


def mean(axes: str, shape: str = "1,16,8,8") -> View:
    return view(f"g (float[{shape}] x) => (y) {{ y = ReduceMean<axes=[{axes}]>(x) }}")


def test_spatial():
    assert holds("spatial", mean("2,3"), "y")
    assert holds("spatial", mean("-1,-2"), "y")
    assert holds("spatial", mean("1,2"), "y")
    assert not holds("spatial", mean("1"), "y")
    assert not holds("spatial", mean("0,2"), "y")
    assert not holds("spatial", mean("1,2,3"), "y")
    assert not holds("spatial", mean("1", "1,8,16"), "y")


def test_spatial_axes_may_be_an_input():
    text = "g (float[1,16,8,8] x) => (y) <int64[{n}] axes = {{{axes}}}> {{ y = ReduceMean(x, axes) }}"
    assert holds("spatial", View(load(model(text.format(n=2, axes="2,3"), opset=18)).graph), "y")
    assert not holds("spatial", View(load(model(text.format(n=1, axes="3"), opset=18)).graph), "y")


def test_short_sequence():
    text = "g (float[1,8,{sequence},{keys}] x) => (y) {{ y = Softmax(x) }}"
    assert holds("short_sequence", view(text.format(sequence=512, keys=512)), "y")
    assert not holds("short_sequence", view(text.format(sequence=513, keys=16)), "y")
    assert not holds("short_sequence", view(text.format(sequence=16, keys=513)), "y")
    assert not holds("short_sequence", view(text.format(sequence="N", keys=16)), "y")


# ---- on two tensors ----------------------------------------------------------------------------------------------


def residual(nodes: str, outputs: str = "y") -> View:
    return view(f"g (float[1,16,8,8] x) => ({outputs}) <float[16,16,1,1] w> {{ {nodes} }}")


def test_deeper_than_a_branch_that_cannot_fuse():
    graph = residual("a = Conv(x, w) b = Neg(x) c = Neg(b) y = Add(a, c)")
    assert holds("deeper_than", graph, "a", "c")


def test_deeper_than_does_not_hold_for_the_ancestor_of_a_branch():
    graph = residual("a = Conv(x, w) y = Add(a, x)")
    assert holds("deeper_than", graph, "a", "x")
    assert not holds("deeper_than", graph, "x", "a")


def test_deeper_than_a_shorter_branch():
    graph = residual("a = Conv(x, w) r = Relu(a) b = Conv(r, w) d = Conv(x, w) y = Add(b, d)")
    assert holds("deeper_than", graph, "b", "d")
    assert not holds("deeper_than", graph, "d", "b")


def test_deeper_than_counts_the_longest_path():
    graph = residual(
        """a = Conv(x, w) b = Relu(a) c = Neg(b) s = Add(c, x) long = Conv(s, w)
           p = Neg(x) q = Neg(p) short = Conv(q, w)
           y = Add(long, short)"""
    )
    assert holds("deeper_than", graph, "long", "short")
    assert not holds("deeper_than", graph, "short", "long")


def test_deeper_than_counts_up_to_the_nearest_common_ancestor():
    graph = residual(
        """p = Neg(x) n = Neg(p)
           a = Conv(n, w) b = Conv(a, w)
           d = Conv(n, w)
           y = Add(d, b)"""
    )
    assert holds("deeper_than", graph, "b", "d")
    assert not holds("deeper_than", graph, "d", "b")


def test_deeper_than_holds_both_ways_at_a_tie():
    graph = residual("a = Conv(x, w) b = Conv(x, w) y = Add(a, b)")
    assert holds("deeper_than", graph, "a", "b")
    assert holds("deeper_than", graph, "b", "a")


def test_deeper_than_where_the_skip_is_the_common_ancestor():
    graph = residual("a = Conv(x, w) b = Conv(a, w) y = Add(b, a)")
    assert holds("deeper_than", graph, "b", "a")
    assert not holds("deeper_than", graph, "a", "b")


def test_deeper_than_among_three():
    graph = residual("a = Conv(x, w) b = Conv(a, w) c = Conv(b, w) d = Conv(x, w) e = Conv(d, w) y = Sum(x, e, c)")
    assert holds("deeper_than", graph, "c", "e")
    assert holds("deeper_than", graph, "c", "x")
    assert not holds("deeper_than", graph, "e", "c")


def test_deeper_than_does_not_depend_on_the_names_of_the_graph_inputs():
    text = """g (float[1,16,8,8] {left}, float[1,16,8,8] {right}) => (y) <float[16,16,1,1] w> {{
      l1 = Neg({left}) l2 = Neg(l1) l3 = Neg(l2) l4 = Add(l3, {right}) l = Conv(l4, w)
      r1 = Neg({right}) r2 = Neg(r1) r3 = Add(r2, {left}) r = Conv(r3, w)
      y = Add(l, r)
    }}"""
    one, other = (view(text.format(left=left, right=right)) for left, right in ("ab", "ba"))
    assert holds("deeper_than", one, "l", "r") == holds("deeper_than", other, "l", "r")
    assert holds("deeper_than", one, "r", "l") == holds("deeper_than", other, "r", "l")


def test_same_as():
    graph = residual("a = Conv(x, w) y = Add(a, x)")
    assert holds("same_as", graph, "a", "a")
    assert not holds("same_as", graph, "a", "x")


def test_a_graph_output_is_an_edge_that_no_node_reads():
    graph = residual("a = Conv(x, w) y = Relu(a)").graph
    (edge,) = graph.readers("y")
    assert edge.slot == GRAPH_OUTPUT
    assert graph.reading_node(edge) is None
