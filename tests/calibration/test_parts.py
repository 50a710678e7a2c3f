"""Parts of a graph as models of their own: together they compute what the whole does."""

import numpy as np
import pytest

from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.calibration.parts import Parts, leading_to, reads, size_of
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.model import load
from tests.graphs import model
from tests.refinement.nets import NETS, OUTPUTS, rows, run

CONSTANTS = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w> {
    two = Constant<value_float=2.0>()
    t = Transpose(w)
    s = Mul(t, two)
    m = MatMul(x, s)
    y = Add(m, two)
}"""


@pytest.mark.parametrize("net", [*NETS, "constants"])
def test_node_by_node_they_compute_what_the_whole_does(net, tmp_path):
    text, shape = NETS.get(net, (CONSTANTS, (4,)))
    source = load(model(text))
    graph = source.graph
    every = leading_to(graph, graph.outputs)
    parts = Parts(graph, tmp_path, every)
    x = rows(3, *shape)
    values = {"x": x}
    for node in (node for node in every if not graph.is_constant(node.first_output)):
        session = Session(parts.write([node], node.outputs))
        feed = {name: values[name] for name in parts.inputs([node])}
        values |= zip(node.outputs, session.run(Batch(feed, 3), node.outputs)[0], strict=True)
    for name, expected in run(source.proto, {"x": x}).items():
        np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-5)


def test_a_part_can_give_sizes_in_place_of_tensors(tmp_path):
    graph = load(model(OUTPUTS)).graph
    nodes = leading_to(graph, ["r"])
    session = Session(Parts(graph, tmp_path, nodes).write(nodes, ["c", "r"], sizes=True))
    sizes = session.run(Batch({"x": rows(3, 16, 8, 8)}, 3), session.outputs)[0]
    assert list(map(int, sizes)) == [3 * 16 * 8 * 8] * 2


def test_the_nodes_that_lead_to_a_tensor_in_order():
    graph = load(model(OUTPUTS)).graph
    assert [node.first_output for node in leading_to(graph, ["r"])] == ["c", "r"]
    assert [node.first_output for node in leading_to(graph, ["p"])] == ["c", "r", "d", "p"]
    assert leading_to(graph, ["x"]) == []


def test_what_nodes_read_that_is_no_constant():
    graph = load(model(OUTPUTS)).graph
    by_name = {node.first_output: node for node in graph.nodes}
    assert reads(graph, [by_name["c"]]) == {"x"}
    assert reads(graph, [by_name["d"], by_name["y"]]) == {"r", "f"}


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 3), 6), ((), 1), ((0, 3), 0), ((None, 3), None), (None, None), ((None,), None)]
)
def test_the_size_of_a_shape(shape, size):
    assert size_of(shape) == size
