"""A user's filters: vetoes on quantizing, by node name, glob, op type, or a function of the node."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import TypeAlias

from ..errors import FilterError, nearest
from ..graph import Graph, Node

Selection: TypeAlias = "str | Callable[[Node], bool] | Iterable[str | Callable[[Node], bool]]"


def vetoed(
    graph: Graph, include: Selection = (), exclude: Selection = (), op_types: Iterable[str] = ()
) -> frozenset[str]:
    """The first outputs of the nodes that the user keeps in float.

    A node goes by its name or by one of its outputs; names may be globs (`*`, `?`, `[...]`). A literal name wins
    over its reading as a glob. Raises FilterError, with the nearest names, where an entry matches nothing.
    """
    out = _selected(graph, exclude, "exclude")
    if include := entries(include):
        out |= {node.first_output for node in graph.nodes} - _selected(graph, include, "include")
    if kinds := set(entries(op_types)):
        present = {node.op for node in graph.nodes}
        for kind in sorted(map(str, kinds - present)):
            raise FilterError(
                f"op_types: the model has no {kind!r}.{nearest(kind, present)} It has {', '.join(sorted(present))}"
            )
        out |= {node.first_output for node in graph.nodes if node.op not in kinds}
    return frozenset(out)


def entries(selection: Selection) -> list[str | Callable[[Node], bool]]:
    """A selection as a list."""
    return [selection] if isinstance(selection, str) or callable(selection) else list(selection)


def _selected(graph: Graph, selection: Selection, filter_name: str) -> set[str]:
    chosen: set[str] = set()
    for entry in entries(selection):
        matched = {node.first_output for node in graph.nodes if entry(node)} if callable(entry) else named(graph, entry)
        if not matched:
            raise FilterError(_nothing(graph, entry, filter_name))
        chosen |= matched
    return chosen


def named(graph: Graph, text: str) -> set[str]:
    """The first outputs of the nodes that go by `text`: a node's name, one of its outputs, or a glob over these."""
    exact = {
        node.first_output for node in graph.nodes if text == node.name or text in (*node.outputs, *node.proto.output)
    }
    if exact or not any(character in text for character in "*?["):
        return exact
    return {
        node.first_output
        for node in graph.nodes
        if any(fnmatch.fnmatchcase(name, text) for name in (node.name, *node.outputs) if name)
    }


def nearest_node(graph: Graph, text: str) -> str:
    """' Did you mean ...?' with the node names or outputs closest to `text`."""
    return nearest(text, [name for node in graph.nodes for name in (node.name, *node.outputs) if name])


def _nothing(graph: Graph, entry: str | Callable[[Node], bool], filter_name: str) -> str:
    if callable(entry):
        return f"{filter_name}: the function chooses no node of the model"
    return f"{filter_name}: no node is called {entry!r}.{nearest_node(graph, entry)}"
