"""What an engine is made of: one frozen type, read from the builder's log or from the engine inspector.

The builder of TensorRT-RTX prints a `Layers:` text with a verbose logger and detailed profiling, also without a GPU.
The engine inspector gives JSON where an engine can be deserialized, which takes a GPU. Both name, for each kernel, the
element type of every tensor and the ONNX nodes that it came from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

IDLE = frozenset({"signal", "wait", "shape_call", "NoOp", "Signal", "Wait"})
"""Layers that start no kernel."""
WIDENING = frozenset({"runtime_fusion"})
"""Layers that dequantize what they read and compute in float."""

BYTES = {"float": 4, "half": 2, "bfloat16": 2, "int8": 1, "fp8": 1, "uint8": 1, "bool": 1, "int32": 4, "int64": 8}
_TYPE_NAMES = {"fp32": "float", "fp16": "half", "bf16": "bfloat16", "float16": "half", "float32": "float"}


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """A tensor at a layer: its element type in lower case ('int8', 'float', 'half' ...) and its dimensions."""

    name: str
    type: str
    dimensions: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dimensions)

    @property
    def nbytes(self) -> int:
        return self.elements * BYTES.get(self.type, 4)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine: what it reads, its constants, what it writes, and the ONNX nodes it came from."""

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: frozenset[str]

    @property
    def is_kernel(self) -> bool:
        return self.kind not in IDLE and bool(self.outputs)

    def computes_int8(self, weight_elements: int | None) -> bool:
        """True for a kernel that reads INT8 data and an INT8 weight of at least so many elements.

        None stands for a product of two activations: then two inputs must be INT8. A layer that dequantizes first
        does not count, nor does an INT8 input beside a float weight.
        """
        if self.kind in WIDENING:
            return False
        data = [tensor for tensor in self.inputs if tensor.type == "int8"]
        if weight_elements is None:
            return len(data) > 1
        weights = {tensor.type for tensor in self.constants if tensor.elements >= weight_elements}
        return ("int8" in weights and bool(data)) or (not weights and len(data) > 1)


def from_log(messages: Iterable[str]) -> tuple[Layer, ...]:
    """The layers that a builder printed; () where it printed none."""
    texts = [text for text in messages if text.lstrip().startswith("Layers:")]
    return tuple(_layer(line) for text in texts for line in text.splitlines() if line.startswith("Name: "))


def from_inspector(text: str) -> tuple[Layer, ...]:
    """The layers of the engine inspector's JSON (TensorRT 10 and 11, detailed verbosity)."""
    layers = json.loads(text).get("Layers", [])
    return tuple(_inspected(layer) for layer in layers if isinstance(layer, dict))


def _layer(line: str) -> Layer:
    kind = re.search(r", LayerType: ([^,]*),", line)
    return Layer(
        line.removeprefix("Name: ").split(", LayerType:")[0],
        kind[1] if kind else "",
        _tensors(_section(line, "Inputs")),
        _tensors(_section(line, "Constants")),
        _tensors(_section(line, "Outputs")),
        _nodes(line.rpartition("Metadata:")[2]),
    )


def _section(line: str, key: str) -> str:
    """The text in the brackets behind `key`; brackets inside are counted."""
    start = line.find(f"{key}: [")
    if start < 0:
        return ""
    depth, begin = 0, start + len(key) + 2
    for index in range(begin, len(line)):
        depth += {"[": 1, "]": -1}.get(line[index], 0)
        if not depth:
            return line[begin + 1 : index]
    return line[begin + 1 :]


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    found = re.findall(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)", text)
    return tuple(
        LayerTensor(name, _type(kind), tuple(map(int, filter(str.strip, dims.split(",")))))
        for name, dims, kind in found
    )


def _inspected(layer: dict[str, Any]) -> Layer:
    weights = [layer[key] for key in ("Weights", "Kernel") if isinstance(layer.get(key), dict)]
    constants = [LayerTensor("weights", _type(w.get("Type", "")), (int(w.get("Count", 0)),)) for w in weights]
    constants += map(_inspected_tensor, layer.get("Constants", []))
    return Layer(
        layer.get("Name", ""),
        layer.get("LayerType", ""),
        tuple(map(_inspected_tensor, layer.get("Inputs", []))),
        tuple(constants),
        tuple(map(_inspected_tensor, layer.get("Outputs", []))),
        _nodes(layer.get("Metadata", "") or ""),
    )


def _inspected_tensor(tensor: dict[str, Any]) -> LayerTensor:
    """TensorRT 11 has `Datatype` apart; TensorRT 10 puts it in front of `Format/Datatype`."""
    kind = tensor.get("Datatype") or str(tensor.get("Format/Datatype", "")).split(" ")[0]
    return LayerTensor(tensor.get("Name", ""), _type(kind), tuple(map(int, tensor.get("Dimensions", []))))


def _nodes(metadata: str) -> frozenset[str]:
    return frozenset(re.findall(r"\[ONNX Layer: (.*?)\]", metadata.replace("\x1e", "")))


def _type(text: str) -> str:
    lower = text.lower()
    return _TYPE_NAMES.get(lower, lower)
