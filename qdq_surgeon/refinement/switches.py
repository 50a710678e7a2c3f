"""A Q/DQ model with a switch at every pair, so that one session runs with any of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..calibration.feeds import Batch
from ..calibration.sessions import Session
from ..existing import graphs_of, is_linear, replace_items
from ..graph import FreshNames, Graph


class Switched:
    """Runs a Q/DQ model with only some of its pairs; without all others it is the float model.

    `pairs` names them: by what their DequantizeLinear makes.
    """

    def __init__(self, quantized: ModelProto, results: Sequence[str], custom_ops: Sequence[Path] = ()) -> None:
        proto, self._flags = _with_switches(quantized)
        self.pairs = tuple(self._flags)
        types = Graph(quantized).element_type
        kinds = {name: types(name) or TensorProto.FLOAT for name in results}
        del proto.graph.output[:]
        proto.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
        self._results = results
        self._session = Session(proto, simulate=True, custom_ops=custom_ops)

    def run(self, batch: Batch, pairs: Collection[str]) -> list[NDArray[Any]]:
        """The results with these pairs."""
        flags = {flag: np.array(pair in pairs) for pair, flag in self._flags.items()}
        return self._session.run(Batch(batch.feed | flags, batch.samples), self._results)[0]


def _with_switches(quantized: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """The model with every pair in the branch of an If, and the input that switches each, by the pair's output."""
    view = Graph(quantized, deep=True)
    proto = ModelProto()
    proto.CopyFrom(quantized)
    names = FreshNames(proto)
    flags: dict[str, str] = {}
    for scope, graph in reversed(list(graphs_of(proto.graph))):
        quantizers = {node.output[0]: node for node in graph.node if is_linear(node, "QuantizeLinear")}
        nodes = []
        for node in graph.node:
            quantize = quantizers.get(node.input[0]) if is_linear(node, "DequantizeLinear") else None
            if quantize is not None:
                kind = view.element_type(view.key(scope, quantize.input[0])) or TensorProto.FLOAT
                flags[node.output[0]] = names.fresh(f"{node.output[0]}_switch")
                node = _switch(quantize, node, flags[node.output[0]], kind, names)
            nodes.append(node)
        replace_items(graph.node, nodes)
    proto.graph.input.extend(helper.make_tensor_value_info(flag, TensorProto.BOOL, []) for flag in flags.values())
    return proto, flags


def _switch(quantize: NodeProto, dequantize: NodeProto, flag: str, kind: int, names: FreshNames) -> NodeProto:
    """If(flag): the pair, else what it reads."""
    output = dequantize.output[0]
    stored, through, past = (names.fresh(f"{output}_{word}") for word in ("stored", "through", "past"))
    inner = [NodeProto(), NodeProto()]
    inner[0].CopyFrom(quantize)
    inner[1].CopyFrom(dequantize)
    inner[0].output[0] = inner[1].input[0] = stored
    inner[1].output[0] = through
    branches = (
        (inner, through),
        ([helper.make_node("Identity", [quantize.input[0]], [past])], past),
    )
    bodies = [
        helper.make_graph(nodes, result, [], [helper.make_tensor_value_info(result, kind, None)])
        for nodes, result in branches
    ]
    return helper.make_node("If", [flag], [output], then_branch=bodies[0], else_branch=bodies[1])
