"""Models from ONNX text, and plans as text. Tests say `from tests.graphs import model, plan_text`."""

from __future__ import annotations

import random
import re
import zlib
from typing import Any

import numpy as np
import onnx.parser
import onnx.shape_inference
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

import qdq_surgeon


def model(text: str, opset: int = 17) -> ModelProto:
    """Parse one graph in ONNX text. A text that begins with '<' brings its own header.

    What the graph declares in <...> without a value, and no node makes, becomes a weight with seeded random
    values: `g (float[1,3,8,8] x) => (y) <float[16,3,3,3] w> { y = Conv(x, w) }`.
    """
    header = "" if text.lstrip().startswith("<") else f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(header + text)
    made = {output for node in proto.graph.node for output in node.output}
    for value in [value for value in proto.graph.value_info if value.name not in made]:
        proto.graph.value_info.remove(value)
        proto.graph.initializer.append(_random_weight(value))
    return proto


def typed(text: str, opset: int = 17) -> ModelProto:
    """As `model`, with the types and shapes of the outputs filled in, which TensorRT wants."""
    return onnx.shape_inference.infer_shapes(model(text, opset))


def plan_text(proto: ModelProto, placement: str = "tensorrt", **filters: Any) -> str:
    """The plan of a model as `--plan` prints it; `filters` are include, exclude, op_types and predicates."""
    return str(qdq_surgeon.plan(proto, placement=placement, **filters))


def decisions(proto: ModelProto, placement: str = "tensorrt", **filters) -> str:
    """What the plan decides, by rule: its text without the first line, the reasons and the predicates' sentences."""
    text = plan_text(proto, placement, **filters).partition("\n\n")[2]
    text = re.sub(r"(?m)^(  [\w#-]+):.*$", r"\1", text)
    return re.sub(r"(?m)^(    .*' is .*?) \(.*$", r"\1", text)


def shuffled(proto: ModelProto, seed: int) -> ModelProto:
    """The same model with its nodes and initializers stored in another order."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for field in (copy.graph.node, copy.graph.initializer):
        items = random.Random(seed).sample(list(field), len(field))
        del field[:]
        field.extend(items)
    return copy


def _random_weight(value: ValueInfoProto) -> TensorProto:
    declared = value.type.tensor_type
    shape = [dim.dim_value for dim in declared.shape.dim]
    values = 0.1 * np.random.default_rng(zlib.crc32(value.name.encode())).standard_normal(shape)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(declared.elem_type)), value.name)
