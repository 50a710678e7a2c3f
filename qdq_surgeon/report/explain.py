"""The full story of one node: every edge that it reads, every pair on what it makes, and every rule that failed."""

from __future__ import annotations

from collections.abc import Iterator

from ..edges import GRAPH_OUTPUT, Edge, Plan
from ..errors import FilterError
from ..model import Graph, Node
from ..rules.filters import named, nearest_node


def explain(plan: Plan, graph: Graph, text: str) -> str:
    """Explain the nodes that go by `text`: a node's name, one of its outputs, or a glob.

    Raises FilterError, with the nearest names, where there is no such node.
    """
    found = named(graph, text)
    if not found:
        raise FilterError(f"no node is called {text!r}.{nearest_node(graph, text)}")
    return "\n\n".join("\n".join(_story(plan, graph, node)) for node in graph.nodes if node.first_output in found)


def _story(plan: Plan, graph: Graph, node: Node) -> Iterator[str]:
    quantized = {read.edge: (site, read.rule) for site in plan.sites for read in site.reads}
    kept = {item.edge: item.rule for item in plan.kept}
    yield node.label
    for tensor, edge in zip(node.inputs, node.edges, strict=True):
        if not tensor:
            continue
        yield f"  reads '{tensor}' in slot {edge.slot}: {_state(plan, graph, tensor, edge, quantized, kept)}"
    for output in filter(None, node.outputs):
        for edge in graph.readers(output):
            reader = "a graph output" if edge.slot == GRAPH_OUTPUT else str(edge)
            yield f"  makes '{output}' for {reader}: {_state(plan, graph, output, edge, quantized, kept)}"
    for miss in plan.misses:
        if miss.edge.reader == node.first_output:
            yield f"  did not apply: {miss.rule}: {miss.reason}"


def _state(plan: Plan, graph: Graph, tensor: str, edge: Edge, quantized: dict, kept: dict) -> str:  # type: ignore[type-arg]
    if edge in quantized:
        site, rule = quantized[edge]
        return f"quantized{site.notes} by {rule}: {plan.because[rule]}"
    if edge in kept:
        return f"float by {kept[edge]}: {plan.because[kept[edge]]}"
    return "float: no rule speaks of it" if graph.is_float(tensor) else "not a float tensor"
