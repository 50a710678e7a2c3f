import onnx
import pytest

from qdq_surgeon.edges import Edge
from qdq_surgeon.errors import PlacementError
from qdq_surgeon.graph import Graph
from qdq_surgeon.model import load
from qdq_surgeon.rules.patterns import (
    MAX_DEPTH,
    captures,
    match_input,
    match_node,
    parse,
    read_captures,
    root_ops,
)
from tests.graphs import model

DEEP = [f"t{index}" for index in range(1, MAX_DEPTH)]


def graph_of(nodes: str) -> Graph:
    return load(model(f"g (float[4,4] p, float[4,4] q, float[4,4] r) => (y) {{ {nodes} }}")).graph


def matches(pattern: str, nodes: str, any_order: bool = False) -> list[dict[str, str]]:
    """What the names stand for, in each way in which the pattern fits the node that makes y."""
    graph = graph_of(nodes)
    node = graph.producer("y")
    assert node
    found = match_node(parse(pattern), node, graph, any_order)
    return [{name: " ".join(bound.tensors) for name, bound in match.items()} for match in found]


# ---- what fits ---------------------------------------------------------------------------------------------------


def test_an_op_captures_its_inputs_by_slot():
    assert matches("Sub(a, b)", "y = Sub(p, q)") == [{"a": "p", "b": "q"}]


def test_another_op_does_not_fit():
    assert matches("Sub(a, b)", "y = Add(p, q)") == []


def test_an_op_reads_all_its_inputs():
    assert matches("Clip(a, b)", "y = Clip(p, q)") == [{"a": "p", "b": "q"}]
    assert matches("Clip(a, b)", "y = Clip(p, q, r)") == []
    assert matches("Clip(a, b)", "y = Clip(p)") == []


def test_one_op_of_several():
    assert matches("(Add | Sub)(a, b)", "y = Add(p, q)") == [{"a": "p", "b": "q"}]
    assert matches("(Add | Sub)(a, b)", "y = Sub(p, q)") == [{"a": "p", "b": "q"}]
    assert matches("(Add | Sub)(a, b)", "y = Mul(p, q)") == []


def test_ops_nest():
    assert matches("Relu(Add(a, b))", "s = Add(p, q) y = Relu(s)") == [{"a": "p", "b": "q"}]
    assert matches("Relu(Add(a, b))", "s = Sub(p, q) y = Relu(s)") == []
    assert matches("Relu(Add(a, b))", "y = Relu(p)") == []


def test_a_node_in_the_middle_can_be_captured():
    assert matches("y := Relu(s := Add(a, _))", "s = Add(p, q) y = Relu(s)") == [{"y": "y", "s": "s", "a": "p"}]


def test_a_star_takes_all_inputs():
    assert matches("Concat(*xs)", "y = Concat<axis=0>(p, q, r)") == [{"xs": "p q r"}]
    assert matches("Concat(*xs)", "y = Concat<axis=0>(p)") == [{"xs": "p"}]


def test_a_star_after_names_takes_the_others():
    assert matches("Sum(a, *rest)", "y = Sum(p, q, r)") == [{"a": "p", "rest": "q r"}]


def test_a_star_leaves_out_absent_inputs():
    assert matches("Clip(a, *limits)", "y = Clip(p, , r)") == [{"a": "p", "limits": "r"}]


def test_a_star_without_a_name_captures_nothing():
    assert matches("Concat(*_)", "y = Concat<axis=0>(p, q)") == [{}]


def test_dots_leave_the_other_inputs_unspoken():
    assert matches("Clip(a, ...)", "y = Clip(p, q, r)") == [{"a": "p"}]
    assert matches("Clip(a, ...)", "y = Clip(p)") == [{"a": "p"}]


def test_an_optional_input_may_be_there_or_not():
    assert matches("Clip(a, low or None)", "y = Clip(p, q)") == [{"a": "p", "low": "q"}]
    assert matches("Clip(a, low or None)", "y = Clip(p)") == [{"a": "p"}]
    assert matches("Clip(a, low or None, high)", "y = Clip(p, , r)") == [{"a": "p", "high": "r"}]


def test_an_optional_input_that_is_there_must_fit():
    assert matches("Clip(a, Relu(_) or None)", "l = Relu(q) y = Clip(p, l)") == [{"a": "p"}]
    assert matches("Clip(a, Relu(_) or None)", "y = Clip(p, q)") == []


def test_an_attribute_has_the_value_given():
    assert matches("Concat(*xs, axis=1)", "y = Concat<axis=1>(p, q)") == [{"xs": "p q"}]
    assert matches("Concat(*xs, axis=-1)", "y = Concat<axis=-1>(p, q)") == [{"xs": "p q"}]
    assert matches("Concat(*xs, axis=1)", "y = Concat<axis=0>(p, q)") == []


def test_an_absent_attribute_has_the_default_of_the_schema():
    assert matches("Gemm(a, b, transB=0)", "y = Gemm(p, q)") == [{"a": "p", "b": "q"}]
    assert matches("Gemm(a, b, transB=0)", "y = Gemm<transB=1>(p, q)") == []
    assert matches("Gemm(a, b, transB=1)", "y = Gemm(p, q)") == []
    assert matches("DepthToSpace(a, mode='DCR')", "y = DepthToSpace<blocksize=2>(p)") == [{"a": "p"}]


def test_an_attribute_may_be_a_string_a_list_or_a_float():
    assert matches("DepthToSpace(a, mode='CRD')", 'y = DepthToSpace<blocksize=2, mode="CRD">(p)') == [{"a": "p"}]
    assert matches("Transpose(a, perm=[1, 0])", "y = Transpose<perm=[1,0]>(p)") == [{"a": "p"}]
    assert matches("Transpose(a, perm=(1, 0))", "y = Transpose<perm=[1,0]>(p)") == [{"a": "p"}]
    assert matches("Transpose(a, perm=[0, 1])", "y = Transpose<perm=[1,0]>(p)") == []
    assert matches("Elu(a, alpha=0.5)", "y = Elu<alpha=0.5>(p)") == [{"a": "p"}]


def test_a_float_attribute_is_compared_as_the_float32_that_onnx_stores():
    assert matches("LeakyRelu(a, alpha=0.2)", "y = LeakyRelu<alpha=0.2>(p)") == [{"a": "p"}]
    assert matches("LeakyRelu(a, alpha=0.01)", "y = LeakyRelu(p)") == [{"a": "p"}]
    assert matches("LeakyRelu(a, alpha=0.2)", "y = LeakyRelu<alpha=0.3>(p)") == []


def test_an_underscore_is_any_tensor():
    assert matches("Add(_, b)", "y = Add(p, q)") == [{"b": "q"}]


def test_an_underscore_with_brackets_is_any_op():
    assert matches("Relu(_(...))", "s = Sub(p, q) y = Relu(s)") == [{}]
    assert matches("Relu(_(...))", "y = Relu(p)") == []
    assert matches("_(a, ...)", "y = Sub(p, q)") == [{"a": "p"}]


def test_input_is_a_graph_input():
    assert matches("Relu(x := Input())", "y = Relu(p)") == [{"x": "p"}]
    assert matches("Relu(Input())", "s = Neg(p) y = Relu(s)") == []


def test_input_at_the_top_fits_graph_inputs():
    found = list(match_input(parse("x := Input()"), "p", graph_of("y = Relu(p)")))
    assert [match["x"].tensors for match in found] == [("p",)]
    assert list(match_input(parse("Relu(x)"), "p", graph_of("y = Relu(p)"))) == []


def test_the_same_name_twice_is_the_same_tensor():
    silu = "Mul(x, Sigmoid(x))"
    assert matches(silu, "s = Sigmoid(p) y = Mul(p, s)") == [{"x": "p"}]
    assert matches(silu, "s = Sigmoid(p) y = Mul(q, s)") == []


def test_alternatives_are_tried_in_order():
    pattern = "Neg(h := Relu(a) | Sigmoid(b))"
    assert matches(pattern, "h = Relu(p) y = Neg(h)") == [{"h": "h", "a": "p"}]
    assert matches(pattern, "h = Sigmoid(p) y = Neg(h)") == [{"h": "h", "b": "p"}]
    assert matches(pattern, "h = Tanh(p) y = Neg(h)") == []


def test_alternatives_may_stand_at_the_top():
    assert matches("Relu(a) | Neg(Sigmoid(a))", "h = Sigmoid(p) y = Neg(h)") == [{"a": "p"}]
    assert matches("Relu(a) | Neg(Sigmoid(a))", "y = Relu(p)") == [{"a": "p"}]


def test_an_alternative_may_be_any_tensor():
    assert matches("Neg(Relu(a) | b)", "y = Neg(p)") == [{"b": "p"}]
    assert matches("Neg(Relu(a) | b)", "h = Relu(p) y = Neg(h)") == [{"a": "p"}, {"b": "h"}]


def test_any_order_tries_the_inputs_of_commutative_ops_in_all_orders():
    assert matches("Add(Relu(a), b)", "h = Relu(p) y = Add(q, h)") == []
    assert matches("Add(Relu(a), b)", "h = Relu(p) y = Add(q, h)", any_order=True) == [{"a": "p", "b": "q"}]
    assert matches("Add(a, b)", "y = Add(p, q)", any_order=True) == [{"a": "p", "b": "q"}, {"a": "q", "b": "p"}]


def test_any_order_with_a_star_gives_each_input_its_turn():
    found = matches("Sum(main, *skips)", "y = Sum(p, q, r)", any_order=True)
    assert found == [{"main": "p", "skips": "q r"}, {"main": "q", "skips": "p r"}, {"main": "r", "skips": "p q"}]


def test_any_order_reaches_the_ops_inside():
    nodes = "h = Relu(p) m = Mul(q, h) y = Neg(m)"
    assert matches("Neg(Mul(Relu(a), b))", nodes, any_order=True) == [{"a": "p", "b": "q"}]


def test_any_order_leaves_ops_that_do_not_commute_as_they_are():
    assert matches("Sub(Relu(a), b)", "h = Relu(p) y = Sub(q, h)", any_order=True) == []
    assert matches("MatMul(a, b)", "y = MatMul(p, q)", any_order=True) == [{"a": "p", "b": "q"}]


def test_an_op_of_another_domain():
    proto = model("g (float[4] x) => (y) { y = com.microsoft.Gelu(x) }")
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    graph = load(proto).graph
    node = graph.producer("y")
    assert node
    assert list(match_node(parse("com.microsoft.Gelu(a)"), node, graph, False))
    assert not list(match_node(parse("Gelu(a)"), node, graph, False))


def test_the_domain_of_onnx_may_be_written_out():
    assert matches("ai.onnx.Relu(a)", "y = Relu(p)") == [{"a": "p"}]


def test_the_deepest_pattern_can_be_matched():
    nodes = "".join(f"{out} = Relu({x}) " for x, out in zip(["p", *DEEP], [*DEEP, "y"], strict=True))
    assert matches("Relu(" * MAX_DEPTH + "x" + ")" * MAX_DEPTH, nodes) == [{"x": "p"}]


def test_a_capture_knows_the_edges_by_which_the_pattern_reads_it():
    graph = graph_of("s = Sigmoid(p) y = Mul(p, s)")
    node = graph.producer("y")
    assert node
    (match,) = match_node(parse("y := Mul(x, Sigmoid(x))"), node, graph, False)
    assert match["x"].edges == (Edge((), "y", 0), Edge((), "s", 0))
    assert match["y"].edges == ()


def test_captures_lists_the_names():
    assert captures(parse("y := Add(a, Relu(b := Neg(_)), *rest)")) == {"y", "a", "b", "rest"}
    assert captures(parse("Clip(a, low or None) | Neg(x := Input())")) == {"a", "low", "x"}
    assert captures(parse("_(...)")) == set()


def test_read_captures_leaves_out_the_top():
    assert read_captures(parse("y := Add(a, Relu(b := Neg(_)), *rest)")) == {"a", "b", "rest"}
    assert read_captures(parse("(y := Relu(a)) | (x := Input())")) == {"a"}


def test_root_ops_says_where_a_pattern_can_start():
    assert root_ops(parse("(Add | Sum)(*xs)")) == {"Add", "Sum"}
    assert root_ops(parse("y := Relu(a) | Neg(a)")) == {"Relu", "Neg"}
    assert root_ops(parse("_(...)")) is None
    assert root_ops(parse("x := Input()")) == frozenset()


def test_a_pattern_may_run_over_several_lines():
    assert parse("\n  Add(\n    a,\n    b,\n  )\n") == parse("Add(a, b)")


# ---- what is refused, and what to write instead ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("Conv(Relu, w)", "Relu stands without brackets: write Relu(...) for a tensor made by Relu"),
        ("Relu", "Relu stands without brackets: write Relu(...)"),
        ("Add(Relu(a) | Sigmoid, b)", "Sigmoid stands without brackets: write Sigmoid(...)"),
        ("Add | Sum", "Add stands without brackets: write Add(...)"),
        ("Cov(x, w)", "ONNX has no op 'Cov'. Did you mean 'Conv'"),
        ("(Add | Summ)(*xs)", "ONNX has no op 'Summ'. Did you mean 'Sum'"),
        ("FusedConv(x)", "An op of another domain is domain.FusedConv(...)"),
        ("Conv(..., w)", "in 'Conv(..., w)', ... must be the last input"),
        ("Concat(*xs, y)", "in 'Concat(*xs, y)', *xs must be the last input"),
        ("Concat(*xs, ...)", "in 'Concat(*xs, ...)', *xs must be the last input"),
        ("Conv(x", "the pattern 'Conv(x' cannot be read: '(' was never closed"),
        ("Conv(x) Relu", "cannot be read"),
        ("", "'()' has no meaning in a pattern: write Op(...)"),
        ("x", "the pattern 'x' names no op: write Op(x), or Input() for a graph input"),
        ("x or None", "names no op: write Op(x or None)"),
        ("_", "names no op: write Op(_)"),
        ("Conv(x, None)", "'None' has no meaning in a pattern: write Op(...), a name, `name or None` or _"),
        ("Conv(x, 'w')", "\"'w'\" has no meaning in a pattern"),
        ("Relu(x and y)", "'x and y' has no meaning in a pattern"),
        ("Relu(x + y)", "'x + y' has no meaning in a pattern"),
        ("Relu(x or y)", "'x or y' has no meaning in a pattern: write Op(...), a name, `name or None`"),
        ("Relu(x), Neg(y)", "'(Relu(x), Neg(y))' has no meaning in a pattern"),
        ("Input(x)", "Input() takes nothing in its brackets: write name := Input()"),
        ("Concat(*xs, axis=n)", "in 'Concat(*xs, axis=n)', an attribute is written name=value, with a plain value"),
        ("Concat(*xs, **more)", "an attribute is written name=value"),
        ("Relu(X := Neg(a))", "'X' cannot name a capture: use a lower-case name"),
        ("Concat(*Xs)", "'Xs' cannot name a capture: use a lower-case name"),
        ("Relu(out)", "'out' cannot name a capture: use a lower-case name other than 'out'"),
        ("a := (b := Relu(c))", "a and b name the same tensor: keep one of them"),
        ("Conv(x, b := (c or None))", "write (b or None), not b := (... or None)"),
        ("Conv(x, w, group={[]:1})", "an attribute is written name=value, with a plain value"),
        ("Conv(x, w, group={1: 2})", "an attribute is written name=value, with a plain value"),
        ("Conv(x, w, group=0xfffffffffffffffff)", "an attribute is written name=value, with a plain value"),
        ("Conv(x, w, groups=1)", "Conv has no attribute 'groups'. Did you mean 'group'? It has auto_pad, dilations"),
        ("Relu(x, axis=1)", "Relu has no attribute 'axis'. It has none: take axis out"),
        ("(Gemm | MatMul)(a, b, transB=1)", "MatMul has no attribute 'transB'. It has none: take transB out, or write"),
        ("Relu(x, w, v)", "in 'Relu(x, w, v)', Relu takes 1 input at most: take out 2"),
        ("Relu(x, w or None)", "Relu takes 1 input at most: take out 1"),
        ("Relu(x, w, *more)", "Relu takes 1 input at most: take out 1"),
        ("(Add | Relu)(a, b)", "Relu takes 1 input at most: take out 1, or write the ops apart: Add(...) | Relu(...)"),
        ("ai.onnx.Rellu(x)", "ONNX has no op 'Rellu'. Did you mean 'Relu'"),
        ("Relu(" * 60 + "x" + ")" * 60, "the pattern is too large: it nests too deep or has too many alternatives"),
        (" | ".join(["Relu(x)"] * 3000), "the pattern is too large"),
        ("-" * 7000 + "x", "the pattern is too large"),
        ("Relu(" * 3000, "too many nested parentheses"),
        ("Relu(\0)", "null bytes"),
    ],
)
def test_a_wrong_pattern_says_what_to_write(pattern, message):
    with pytest.raises(PlacementError) as error:
        parse(pattern)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "_(x, groups=1)",
        "_(a, b, c, d, e, f, g)",
        "com.microsoft.Relu(x, y, groups=1)",
        "(Relu | com.microsoft.Relu)(x, y or None)",
        "ai.onnx.ml.Scaler(x, groups=1)",
        "BatchNormalization(x, s, b, m, v, spatial=1)",
        "Concat(a, b, c, d, e, f, g)",
        "(Gemm | MatMul)(a, b, bias or None)",
        "Relu(x, ...)",
        " | ".join(["Relu(x)"] * 300),
    ],
)
def test_what_the_schemas_do_not_forbid_can_be_read(pattern):
    parse(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "__import__('os').system('x')",
        "__import__('os').getpid()",
        "Relu(__import__('os').getpid())",
        "Relu(open('/etc/passwd'))",
        "(lambda: 1)()",
        "Relu([x for x in (1, 2)])",
        "Relu(f'{x}')",
        "Concat(*xs, axis=__import__('os').getpid())",
        "exec('1')",
    ],
)
def test_code_in_a_pattern_is_refused(pattern):
    with pytest.raises(PlacementError):
        parse(pattern)


def test_a_pattern_is_never_executed(tmp_path):
    with pytest.raises(PlacementError):
        parse(f"Relu(open('{tmp_path}/made', 'w'))")
    assert not (tmp_path / "made").exists()
