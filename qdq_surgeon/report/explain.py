"""The full story of one node: every edge that it reads, every pair on what it makes, and every rule that failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ..edges import GRAPH_OUTPUT, Edge, Miss, Plan, Site
from ..errors import FilterError
from ..graph import Graph, Node
from ..rules.filters import named, nearest_node


def explain(plan: Plan, graph: Graph, text: str) -> str:
    """Explain the nodes that go by `text`: a node's name, one of its outputs, or a glob.

    Raises FilterError, with the nearest names, where there is no such node.
    """
    found = named(graph, text)
    if not found:
        raise FilterError(f"no node is called {text!r}.{nearest_node(graph, text)}")
    teller = _Teller(plan, graph)
    return "\n\n".join("\n".join(teller.story(node)) for node in graph.nodes if node.first_output in found)


class _Teller:
    """A plan by edge and by node, so that each story costs no more than its node."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self._graph = graph
        self._because = plan.because
        self._quantized: dict[Edge, tuple[Site, str]] = {
            read.edge: (site, read.rule) for site in plan.sites for read in site.reads
        }
        self._kept: dict[Edge, str] = {item.edge: item.rule for item in plan.kept}
        self._misses: defaultdict[str, list[Miss]] = defaultdict(list)
        for miss in plan.misses:
            self._misses[miss.edge.key].append(miss)

    def story(self, node: Node) -> Iterator[str]:
        yield node.label
        for tensor, edge in zip(node.inputs, node.edges, strict=True):
            if tensor:
                yield f"  reads '{tensor}' in slot {edge.slot}: {self._state(tensor, edge)}"
        for output in filter(None, node.outputs):
            for edge in self._graph.readers(output):
                reader = "a graph output" if edge.slot == GRAPH_OUTPUT else str(edge)
                yield f"  makes '{output}' for {reader}: {self._state(output, edge)}"
        for miss in self._misses[node.first_output]:
            yield f"  did not apply: {miss.rule}: {miss.reason}"

    def _state(self, tensor: str, edge: Edge) -> str:
        if edge in self._quantized:
            site, rule = self._quantized[edge]
            return f"quantized{site.notes} by {rule}: {self._because[rule]}"
        if edge in self._kept:
            rule = self._kept[edge]
            return f"float by {rule}: {self._because[rule]}"
        if not self._graph.is_float(tensor):
            return "not a float tensor"
        if edge.slot != GRAPH_OUTPUT and self._graph.reading_node(edge) is None:
            return "float: it is read in a body that is not planned, as those of If, Loop and Scan are"
        domain, _, op = edge.op.rpartition("::")
        return f"float: {op} is of the domain {domain}, not ONNX's own" if domain else "float: no rule speaks of it"
