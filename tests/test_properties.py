"""What must hold for any graph: hypothesis draws them from a grammar of the ops that the rules speak of.

The reference is a NumPy interpreter of the float model, in double precision, which rounds by hand what the plan's edges
read. It shares no code with onnxruntime or the package. QDQ_EXAMPLES=10 draws ten times as many graphs.
"""

import itertools
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

import qdq_surgeon

ZOO = Path(os.environ.get("QDQ_ZOO", Path(__file__).resolve().parents[2] / "shared" / "zoo"))
TIMES = int(os.environ.get("QDQ_EXAMPLES", "1"))
SAMPLES = 6
BUCKET = 2 ** (1 / 128)
"""The width of a histogram's bucket: upper edge / lower edge, at most 1 + 1/128."""
WEIGHTED = ("Conv", "Gemm", "MatMul")
MOST_VALUES = 4096
"""The largest tensor per sample that a drawn graph holds."""


def examples(number):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = [Phase.explicit, Phase.generate, *([] if os.environ.get("QDQ_NO_SHRINK") else [Phase.shrink])]
    return settings(
        phases=phases,
        max_examples=number * TIMES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )


# ---- the grammar ---------------------------------------------------------------------------------------------


class Draft:
    """A graph in the making. `shapes` are per sample: without the batch axis."""

    def __init__(self, draw, outer=None):
        self.draw = draw
        self.count = outer.count if outer else itertools.count()
        self.random = outer.random if outer else np.random.default_rng(draw(st.integers(0, 2**16)))
        self.shapes = dict(outer.shapes) if outer else {}
        self.weights = dict(outer.weights) if outer else {}
        self.nodes, self.initializers, self.flags = [], [], outer.flags if outer else []

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def fresh(self):
        return f"t{next(self.count)}"

    def node(self, op, inputs, *shapes, **attributes):
        outputs = [self.fresh() for _ in shapes]
        name = self.pick("", f"n{next(self.count)}")
        self.nodes.append(helper.make_node(op, inputs, outputs, name, **attributes))
        self.shapes.update(zip(outputs, shapes, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    def constant(self, value, dtype=np.float32):
        name = self.fresh()
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def vector(self, size, low=-1.0, high=1.0):
        return self.constant(self.random.uniform(low, high, size))

    def weight(self, shape, channel_axis, fan_in):
        """Channels of very different size; an initializer, a Constant node, transposed, or one that is there."""
        form = self.pick("initializer", "initializer", "constant", "transposed", "shared")
        if form == "shared" and shape in self.weights:
            return self.weights[shape]
        wide = [-1 if axis == channel_axis % len(shape) else 1 for axis in range(len(shape))]
        spread = 2 ** self.random.uniform(-2, 2, shape[channel_axis]).reshape(wide)
        values = (self.random.standard_normal(shape) * spread / math.sqrt(fan_in)).astype(np.float32)
        if form == "constant":
            name = self.fresh()
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)))
        elif form == "transposed":
            order = list(reversed(range(values.ndim)))
            stored = self.constant(values.transpose(order))
            name = self.fresh()
            self.nodes.append(helper.make_node("Transpose", [stored], [name], perm=order))
        else:
            name = self.constant(values)
        self.weights[shape] = name
        return name

    def body(self, name, result, inputs=(), outputs=()):
        """A control-flow body around what was drafted here."""
        info = [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", *self.shapes[result]])]
        return helper.make_graph(self.nodes, name, list(inputs), [*outputs, *info], self.initializers)


def conv(draft, x, keep=False):
    channels, height, width = draft.shapes[x]
    kernel = 1 if min(height, width) < 3 else draft.pick(1, 3)
    pads = [kernel // 2] * 4 if keep or kernel == 1 else draft.pick([1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0])
    stride = 1 if keep else draft.pick(1, 1, 2)
    made = channels if keep else draft.pick(8, 16, 24)
    kind = draft.pick("plain", "plain", "grouped", "depthwise")
    if kind == "depthwise":
        made, group = channels, channels
    else:
        group = 2 if kind == "grouped" and channels % 2 == made % 2 == 0 else 1
    weight = draft.weight((made, channels // group, kernel, kernel), 0, channels // group * kernel**2)
    bias = draft.pick([], [draft.vector(made)])
    sizes = [(size + pads[axis] + pads[axis + 2] - kernel) // stride + 1 for axis, size in enumerate((height, width))]
    options = {"pads": pads, "strides": [stride] * 2, "group": group, "kernel_shape": [kernel] * 2}
    return draft.node("Conv", [x, weight, *bias], (made, *sizes), **options)


def gemm(draft, x, keep=False):
    (size,) = draft.shapes[x]
    made = size if keep else draft.pick(8, 16, 20)
    turned = draft.pick(0, 1)
    weight = draft.weight((made, size) if turned else (size, made), 0 if turned else 1, size)
    bias = draft.pick([], [draft.vector(made)])
    return draft.node("Gemm", [x, weight, *bias], (made,), transB=turned)


def matmul(draft, x, keep=False):
    *rest, size = draft.shapes[x]
    made = size if keep else draft.pick(16, 24)
    return draft.node("MatMul", [x, draft.weight((size, made), -1, size)], (*rest, made))


def matmul_left(draft, x):
    rows, columns = draft.shapes[x]
    return draft.node("MatMul", [draft.weight((16, rows), -2, rows), x], (16, columns))


def attention(draft, x):
    rows, columns = draft.shapes[x]
    turned = draft.node("Transpose", [x], (columns, rows), perm=[0, 2, 1])
    scores = draft.node("MatMul", [x, turned], (rows, rows))
    shares = draft.node("Softmax", [scores], (rows, rows), axis=-1)
    return draft.node("MatMul", [shares, x], (rows, columns))


def weighted(draft, x, keep=False):
    op = {3: conv, 2: matmul, 1: draft.pick(gemm, gemm, matmul)}[len(draft.shapes[x])]
    return op(draft, x, keep)


def same(draft, x):
    """A weighted op whose output has the shape of its input."""
    return weighted(draft, x, keep=True)


def pointwise(draft, x):
    shape, op = draft.shapes[x], draft.pick("Relu", "Relu", "Clip", "Sigmoid", "HardSwish", "Bias")
    if op == "Clip":
        return draft.node(op, [x, draft.constant(0.0), draft.constant(6.0)], shape)
    if op == "HardSwish":
        gate = draft.node("HardSigmoid", [x], shape, alpha=1 / 6, beta=0.5)
        return draft.node("Mul", [x, gate], shape)
    if op == "Bias":
        return draft.node("Add", [x, draft.vector(shape[-1:])], shape)
    return draft.node(op, [x], shape)


def batch_norm(draft, x):
    channels = draft.shapes[x][0]
    bounds = ((0.5, 2), (-1, 1), (-1, 1), (0.5, 2))
    return draft.node("BatchNormalization", [x, *(draft.vector(channels, *b) for b in bounds)], draft.shapes[x])


def pool(draft, x):
    channels, height, width = draft.shapes[x]
    op = draft.pick("MaxPool", "MaxPool", "AveragePool", "GlobalAveragePool")
    if op == "GlobalAveragePool" or min(height, width) < 2:
        return draft.node("GlobalAveragePool", [x], (channels, 1, 1))
    kernel, pads = draft.pick((2, [0, 0, 0, 0]), (3, [1, 1, 1, 1]))
    sizes = [(size + 2 * pads[0] - kernel) // 2 + 1 for size in (height, width)]
    return draft.node(op, [x], (channels, *sizes), kernel_shape=[kernel] * 2, strides=[2, 2], pads=pads)


def residual(draft, x):
    branch = same(draft, x)
    if len(draft.shapes[x]) == 3 and draft.pick(True, False):
        branch = batch_norm(draft, branch)
    others = [x] if draft.pick(True, True, False) else [same(draft, x)]
    inputs = draft.pick([branch, *others], [*others, branch])
    return draft.node("Add", inputs, draft.shapes[x])


def concat(draft, x):
    shape = draft.shapes[x]
    fitting = [name for name, other in draft.shapes.items() if len(other) == len(shape) and other[1:] == shape[1:]]
    chosen = draft.draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=2))
    made = shape[0] + sum(draft.shapes[name][0] for name in chosen)
    return draft.node("Concat", [x, *chosen], (made, *shape[1:]), axis=1)


def split(draft, x):
    size, *rest = draft.shapes[x]
    if size < 2:
        return pointwise(draft, x)
    sizes = (size // 2, size - size // 2)
    first, second = draft.node("Split", [x, draft.constant(sizes, np.int64)], *((s, *rest) for s in sizes), axis=1)
    return draft.pick(first, second)


def cut(draft, x):
    size, *rest = draft.shapes[x]
    start, stop = draft.pick((0, size - size // 2), (size // 2, size))
    bounds = [draft.constant([value], np.int64) for value in (start, stop, 1)]
    return draft.node("Slice", [x, *bounds], (stop - start, *rest))


def transpose(draft, x):
    shape = draft.shapes[x]
    order = draft.draw(st.permutations(range(len(shape))))
    return draft.node("Transpose", [x], tuple(shape[axis] for axis in order), perm=[0, *(a + 1 for a in order)])


def reshape(draft, x):
    shape = draft.shapes[x]
    size = math.prod(shape)
    if len(shape) > 1 and draft.pick(True, False):
        return draft.node("Flatten", [x], (size,))
    made = draft.pick((size,), (16, size // 16), (16, 4, size // 64), (size // 4, 2, 2))
    if math.prod(made) != size:
        made = (size,)
    return draft.node("Reshape", [x, draft.constant([0, *made], np.int64)], made)


def resize(draft, x):
    channels, height, width = draft.shapes[x]
    scales = draft.constant([1, 1, 2, 2])
    options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return draft.node("Resize", [x, "", scales], (channels, height * 2, width * 2), **options)


def pad(draft, x):
    channels, height, width = draft.shapes[x]
    value = draft.pick([], [draft.constant(0.0)], [draft.constant(0.5)])
    pads = draft.constant([0, 0, 1, 0, 0, 0, 1, 0], np.int64)
    return draft.node("Pad", [x, pads, *value], (channels, height + 2, width))


def softmax(draft, x):
    return draft.node("Softmax", [x], draft.shapes[x], axis=-1)


def layer_norm(draft, x):
    shape = draft.shapes[x]
    inputs = [x, draft.vector(shape[-1:], 0.5, 2), draft.vector(shape[-1:])]
    return draft.node("LayerNormalization", inputs, shape, axis=-1)


def branch(draft, x):
    if not draft.flags:
        draft.flags.append(draft.fresh())
    bodies = []
    for name in ("then_branch", "else_branch"):
        inner = Draft(draft.draw, draft)
        made = x
        for _ in range(draft.pick(1, 2)):
            made = draft.pick(same, pointwise, residual)(inner, made)
        bodies.append((name, inner.body(name, made)))
    return draft.node("If", draft.flags[:1], draft.shapes[x], **dict(bodies))


def loop(draft, x):
    inner = Draft(draft.draw, draft)
    step, on, still, carried = (draft.fresh() for _ in range(4))
    inner.shapes[carried] = draft.shapes[x]
    made = draft.pick(pointwise, residual)(inner, same(inner, carried))
    inner.nodes.append(helper.make_node("Identity", [on], [still]))
    inputs = [
        helper.make_tensor_value_info(step, TensorProto.INT64, []),
        helper.make_tensor_value_info(on, TensorProto.BOOL, []),
        helper.make_tensor_value_info(carried, TensorProto.FLOAT, ["N", *draft.shapes[x]]),
    ]
    body = inner.body("body", made, inputs, [helper.make_tensor_value_info(still, TensorProto.BOOL, [])])
    trips, go = draft.constant(2, np.int64), draft.constant(True, np.bool_)
    return draft.node("Loop", [trips, go, x], draft.shapes[x], body=body)


def scan(draft, x):
    """Row by row along axis 1."""
    rows, *shape = draft.shapes[x]
    inner = Draft(draft.draw, draft)
    row = draft.fresh()
    inner.shapes[row] = tuple(shape)
    made = draft.pick(pointwise, residual)(inner, same(inner, row))
    body = inner.body("body", made, [helper.make_tensor_value_info(row, TensorProto.FLOAT, ["N", *shape])])
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    return draft.node("Scan", [x], (rows, *shape), body=body, num_scan_inputs=1, **axes)


def sequence(draft, x):
    """One half of a tensor, which an If may take out of a sequence that it captures."""
    size, *rest = draft.shapes[x]
    if size % 2:
        return pointwise(draft, x)
    halves, shape = draft.fresh(), (size // 2, *rest)
    sizes = draft.constant([size // 2] * 2, np.int64)
    draft.nodes.append(helper.make_node("SplitToSequence", [x, sizes], [halves], axis=1))
    if draft.pick(True, False):
        return draft.node("SequenceAt", [halves, draft.constant(draft.pick(0, 1), np.int64)], shape)
    if not draft.flags:
        draft.flags.append(draft.fresh())
    bodies = {}
    for index, name in enumerate(("then_branch", "else_branch")):
        inner = Draft(draft.draw, draft)
        half = inner.node("SequenceAt", [halves, inner.constant(index, np.int64)], shape)
        bodies[name] = inner.body(name, same(inner, half))
    return draft.node("If", draft.flags[:1], shape, **bodies)


def own_function(draft, x):
    return draft.node("Swish", [x], draft.shapes[x], domain=OWN)


OWN = "own"
SWISH = [helper.make_node("Sigmoid", ["p"], ["k"]), helper.make_node("Mul", ["p", "k"], ["r"])]

OF_ANY_RANK = (
    *(pointwise, pointwise, residual, concat, split, cut, transpose, reshape),
    *(branch, loop, sequence, own_function),
)
OF_RANK = {
    3: (conv, conv, conv, batch_norm, pool, pool, resize, pad),
    2: (matmul, matmul, matmul_left, attention, softmax, scan),
    1: (gemm, gemm, matmul, softmax),
}


@st.composite
def models(draw):
    """A model with one float input, whose first step is a weighted op."""
    draft = Draft(draw)
    opset = draft.pick(13, 17)
    x = draft.fresh()
    draft.shapes[x] = draft.pick((3, 8, 8), (16, 6, 6), (16, 24), (32,))
    made = [weighted(draft, x)]
    for _ in range(draft.draw(st.integers(1, 6))):
        read = draft.pick(*made[-3:])
        shape = draft.shapes[read]
        steps = [*OF_ANY_RANK, *OF_RANK[len(shape)], *([layer_norm] if opset >= 17 else [])]
        if math.prod(shape) * 4 > MOST_VALUES:
            steps = [cut, pointwise]
        made.append(draft.pick(*steps)(draft, read))
        if len(steps) > 2 and draft.pick(True, True, False):
            made.append(weighted(draft, made[-1]))
    read = Counter(name for node in draft.nodes for name in names_read(node))
    results = [name for name in made if not read[name]]
    results += [name for name in draft.draw(st.lists(st.sampled_from(made), max_size=1)) if read[name]]
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", *draft.shapes[x]])]
    inputs += [helper.make_tensor_value_info(flag, TensorProto.BOOL, []) for flag in draft.flags]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *draft.shapes[name]]) for name in results]
    graph = helper.make_graph(draft.nodes, "g", inputs, outputs, draft.initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    swish = helper.make_function(OWN, "Swish", ["p"], ["r"], SWISH, imports[:1])
    proto = helper.make_model(graph, ir_version=8, opset_imports=imports, functions=[swish])
    onnx.checker.check_model(proto, full_check=True)
    return proto


def feeds(proto, size=SAMPLES):
    """The same samples in batches of a size; where the model asks for a flag, once with it and once without."""
    x, *flags = proto.graph.input
    shape = [dim.dim_value for dim in x.type.tensor_type.shape.dim[1:]]
    values = np.random.default_rng(1).standard_normal((SAMPLES, *shape)).astype(np.float32)
    for flag in (True, False) if flags else (True,):
        for start in range(0, SAMPLES, size):
            yield {x.name: values[start : start + size], **{value.name: np.array(flag) for value in flags}}


# ---- the reference -------------------------------------------------------------------------------------------


def windows(x, kernel, strides, pads, fill):
    around = [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])]
    view = np.lib.stride_tricks.sliding_window_view(np.pad(x, around, constant_values=fill), kernel, axis=(2, 3))
    return view[:, :, :: strides[0], :: strides[1]]


def by_conv(x, w, b=None, *, pads, strides, group, kernel_shape):
    view = windows(x, kernel_shape, strides, pads, 0.0)
    parts = zip(np.split(view, group, axis=1), np.split(w, group, axis=0), strict=True)
    made = np.concatenate([np.einsum("nchwij,ocij->nohw", part, some) for part, some in parts], axis=1)
    return made if b is None else made + b[:, None, None]


def by_norm(x, scale, bias, mean, var):
    scale, bias, mean, var = (value.reshape(-1, *[1] * (x.ndim - 2)) for value in (scale, bias, mean, var))
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def by_softmax(x, *, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def by_layer_norm(x, scale, bias, *, axis):
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + 1e-5) * scale + bias


def by_split(x, sizes, *, axis):
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def by_pad(x, pads, value=0.0):
    half = len(pads) // 2
    return np.pad(x, list(zip(pads[:half], pads[half:], strict=True)), constant_values=value)


OPS = {
    "Add": np.add,
    "AveragePool": lambda x, *, kernel_shape, strides, pads: np.nanmean(
        windows(x, kernel_shape, strides, pads, np.nan), (-2, -1)
    ),
    "BatchNormalization": by_norm,
    "Clip": np.clip,
    "Concat": lambda *xs, axis: np.concatenate(xs, axis),
    "Constant": lambda *, value: value,
    "Conv": by_conv,
    "Flatten": lambda x: x.reshape(len(x), -1),
    "Gemm": lambda x, w, b=0.0, *, transB: x @ (w.T if transB else w) + b,  # noqa: N803
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdims=True),
    "HardSigmoid": lambda x, *, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "Identity": lambda x: x,
    "LayerNormalization": by_layer_norm,
    "MatMul": np.matmul,
    "MaxPool": lambda x, *, kernel_shape, strides, pads: windows(x, kernel_shape, strides, pads, -np.inf).max((-2, -1)),
    "Mul": np.multiply,
    "Pad": by_pad,
    "Relu": lambda x: np.maximum(x, 0),
    "Reshape": lambda x, shape: x.reshape(len(x), *shape[1:]),
    "Resize": lambda x, _, scales, **how: x.repeat(int(scales[2]), 2).repeat(int(scales[3]), 3),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SequenceAt": lambda parts, index: parts[int(index)],
    "Slice": lambda x, start, stop, axis: np.take(x, range(*start, *stop), int(axis[0])),
    "Softmax": by_softmax,
    "Split": by_split,
    "SplitToSequence": lambda x, sizes, *, axis: [by_split(x, sizes, axis=axis)],
    "Swish": lambda x: x / (1 + np.exp(-x)),
    "Transpose": lambda x, *, perm: x.transpose(perm),
}


def double(value):
    return value.astype(np.float64) if value.dtype == np.float32 else value


def evaluate(graph, known, read, scope=()):
    """All tensors of a graph. `read(scope, node, slot, value)` gives what the node's input takes of a float tensor."""
    known = known | {tensor.name: double(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    for node in graph.node:
        inputs = [read(scope, node, slot, known[name]) if name else None for slot, name in enumerate(node.input)]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "If":
            name = "then_branch" if inputs[0] else "else_branch"
            made = inside(node, attributes[name], name, known, read, scope)
        elif node.op_type == "Loop":
            made = looped(node, attributes["body"], inputs, known, read, scope)
        elif node.op_type == "Scan":
            rows = [{attributes["body"].input[0].name: row} for row in np.moveaxis(inputs[0], 1, 0)]
            steps = [inside(node, attributes["body"], "body", known | row, read, scope)[0] for row in rows]
            made = np.stack(steps, 1)
        else:
            if "value" in attributes:
                attributes["value"] = double(numpy_helper.to_array(attributes["value"]))
            made = OPS[node.op_type](*inputs, **attributes)
        known |= zip(node.output, made if isinstance(made, (tuple, list)) else [made], strict=True)
    return known


def inside(node, body, name, known, read, scope):
    found = evaluate(body, known, read, (*scope, f"{node.output[0]}.{name}"))
    return [found[value.name] for value in body.output]


def looped(node, body, inputs, known, read, scope):
    trips, go, *carried = inputs
    for step in range(int(trips)):
        given = dict(zip((value.name for value in body.input), (step, go, *carried), strict=True))
        go, *carried = inside(node, body, "body", known | given, read, scope)
    return carried


def rounded(value, scale, axis):
    """INT8 and back: half to even, -128..127, zero point 0."""
    if axis is not None:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(value.ndim)])
    return np.clip(np.rint(value / scale), -128, 127) * scale, scale


class Rounding:
    """Rounds by hand what the plan's edges read, and compares it with what onnxruntime's nodes read.

    Both must be the same multiple of the scale, but for one step where a value lies between two; the rest of the graph
    then goes on with onnxruntime's, so that no such step spreads. Pairs in bodies are only rounded by hand.
    """

    def __init__(self, plan, scales, quantized, feed):
        self.pairs = {
            (edge.scope, edge.reader, edge.slot): (np.float64(scales.of(site)), site.axis)
            for site in scales.sites(plan)
            for edge in site.edges
        }
        self.reads = {node.output[0]: node.input for node in quantized.graph.node}
        names = {self.reads[reader][slot] for scope, reader, slot in self.pairs if not scope}
        self.found = run(quantized, feed, sorted(names), as_is=True)

    def __call__(self, scope, node, slot, value):
        key = (scope, node.output[0], slot)
        if key not in self.pairs:
            return value
        by_hand, scale = rounded(value, *self.pairs[key])
        if scope:
            return by_hand
        found = np.float64(self.found[self.reads[node.output[0]][slot]])
        steps, wanted = found / scale, np.clip(value / scale, -128, 127)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
        np.testing.assert_array_less(np.abs(steps - wanted), 0.5 + 5e-3)
        return found


def run(proto, feed, names, as_is=False):
    copy = ModelProto()
    copy.CopyFrom(proto)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in present)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if as_is:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feed), strict=True)) if names else {}


# ---- a stripper that shares no code with the package ---------------------------------------------------------


def names_read(node):
    yield from node.input
    for item in node.attribute:
        yield from (name for inner in item.g.node for name in names_read(inner))


def stripped(proto):
    result = ModelProto()
    result.CopyFrom(proto)
    strip(result.graph, {})
    kept = [entry for entry in result.metadata_props if not entry.key.startswith("qdq_surgeon.")]
    refill(result.metadata_props, kept)
    return result


def strip(graph, outer):
    ours = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    sources = outer | {node.output[0]: node.input[0] for node in ours}
    constants = {name for node in ours for name in node.input[1:]}
    refill(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in constants])
    refill(graph.node, [node for node in graph.node if node not in ours])
    for node in graph.node:
        for slot, name in enumerate(node.input):
            while name in sources:
                name = sources[name]
            node.input[slot] = name
        for item in node.attribute:
            if item.HasField("g"):
                strip(item.g, sources)


def refill(field, items):
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


# ---- the properties ------------------------------------------------------------------------------------------


def quantized(proto, method="mse"):
    plan = qdq_surgeon.plan(proto)
    statistics = qdq_surgeon.calibrate(proto, plan, feeds(proto))
    scales = qdq_surgeon.choose(proto, plan, statistics, method)
    return plan, scales, qdq_surgeon.insert(proto, plan, scales)


@examples(45)
@given(models())
def test_onnxruntime_computes_what_rounding_by_hand_gives(proto):
    plan, scales, result = quantized(proto)
    onnx.checker.check_model(result, full_check=True)
    assert_sound(proto, plan, scales, result)
    names = [value.name for value in proto.graph.output]
    for feed in feeds(proto):
        rounding = Rounding(plan, scales, result, feed)
        given_ = {name: double(array) for name, array in feed.items()}
        by_hand = evaluate(proto.graph, given_, rounding)
        exact = evaluate(proto.graph, given_, lambda scope, node, slot, value: value)
        found = run(result, feed, names, as_is=True)
        optimized = run(result, feed, names)
        for name in names:
            assert found[name].shape == by_hand[name].shape == optimized[name].shape
            assert_close(found[name], by_hand[name], exact[name], any(scope for scope, *_ in rounding.pairs))


def assert_close(found, by_hand, exact, in_bodies):
    """Equal but for float32; where pairs in bodies may round differently, far nearer to it than the float model."""
    reach = np.abs(by_hand).max(initial=1e-3)
    if not in_bodies:
        np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-4 * reach)
        return
    error, noise = np.linalg.norm(found - by_hand), np.linalg.norm(exact - by_hand)
    assert error <= 0.3 * noise + 1e-4 * np.linalg.norm(by_hand)


@examples(40)
@given(models())
def test_taking_the_pairs_out_gives_the_input_back_byte_for_byte(proto):
    before = proto.SerializeToString()
    _, _, result = quantized(proto, "max")
    assert stripped(result).SerializeToString() == before
    assert proto.SerializeToString() == before


@examples(60)
@given(models())
def test_weighted_ops_are_quantized_as_a_whole_and_biases_and_outputs_never(proto):
    plan = qdq_surgeon.plan(proto)
    edges = [(site, edge) for site in plan.sites for edge in site.edges]
    assert all(edge.slot == int(site.weight) for site, edge in edges if edge.op in ("Conv", "Gemm"))
    assert all(edge.slot >= 0 for _, edge in edges)
    nodes = {node.first_output: node for node in qdq_surgeon.load(proto).graph.nodes}
    assert all(site.axis == channel_axis(nodes[edge.key], edge.slot) for site, edge in edges if site.weight)
    slots = {}
    for _, edge in edges:
        slots.setdefault((edge.op, edge.key), set()).add(edge.slot)
    assert all(found == {0, 1} for (op, _), found in slots.items() if op in WEIGHTED)


def channel_axis(node, slot):
    """Where a weight has its output channels: Conv, Gemm, and MatMul with two-dimensional weights on either side."""
    turned = any(item.name == "transB" and item.i for item in node.proto.attribute)
    return {"Conv": 0, "Gemm": int(not turned), "MatMul": slot}[node.op]


@examples(30)
@given(models())
def test_max_puts_the_largest_value_at_127(proto):
    plan, scales, _ = quantized(proto, "max")
    largest = {}

    def record(scope, node, slot, value):
        if isinstance(value, list):
            return value
        seen = largest.get((scope, node.output[0], slot), 0)
        largest[scope, node.output[0], slot] = np.maximum(seen, np.abs(value).max())
        return value

    for feed in feeds(proto):
        evaluate(proto.graph, {name: double(array) for name, array in feed.items()}, record)
    shared = {tensor for share in plan.shares for tensor in share.tensors} | {site.source for site in plan.sites}
    for site in scales.sites(plan):
        edge, scale = site.edges[0], scales.of(site).max()
        wanted = largest[edge.scope, edge.reader, edge.slot]
        if site.source or site.tensor in shared:
            assert scale * 127 >= wanted * (1 - 1e-4) or not wanted
        else:
            np.testing.assert_allclose(scale * 127 if wanted else 0, wanted, rtol=1e-4, atol=1e-6)


def assert_sound(proto, plan, scales, result):
    """Scales are positive, finite, of the right shape, and written beside INT8 zero points of 0."""
    graph = qdq_surgeon.load(proto).graph
    for site in scales.sites(plan):
        scale = scales.of(site)
        assert scale.dtype == np.float32
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
        assert scale.shape == (() if site.axis is None else (graph.shape(site.tensor)[site.axis],))
        assert site.weight or site.axis is None
    for inner in graphs(result.graph):
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in inner.initializer}
        pairs = [node for node in inner.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        for scale, zero in ((stored[node.input[1]], stored[node.input[2]]) for node in pairs):
            assert (zero.dtype, zero.shape, zero.any()) == (np.int8, scale.shape, False)


def graphs(graph):
    yield graph
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("g"):
                yield from graphs(item.g)


@examples(120)
@given(models(), st.integers(0, 2**16))
def test_the_plan_depends_neither_on_names_nor_on_the_stored_order(proto, seed):
    words = {f"{letter}{index}" for letter in "tn" for index in range(400)}
    codes = random.Random(seed).sample(range(10**6), len(words))
    new = {word: f"{'tn'[word[0] == 'n']}_{code}" for word, code in zip(sorted(words), codes, strict=True)}
    other = ModelProto()
    other.CopyFrom(proto)
    rename(other.graph, new, random.Random(seed))
    expected = re.sub(r"\b[tn]\d+\b", lambda found: new[found[0]], qdq_surgeon.plan(proto).to_json())
    assert without_digest(qdq_surgeon.plan(other).to_json()) == without_digest(expected)


def without_digest(text):
    return {key: value for key, value in json.loads(text).items() if key != "model_digest"}


def rename(graph, new, shuffle):
    """Other names for all tensors and nodes, and another order of nodes and initializers, in bodies too."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = new[value.name]
    for node in graph.node:
        node.name = new.get(node.name, "")
        node.input[:] = [new.get(name, "") for name in node.input]
        node.output[:] = [new[name] for name in node.output]
        for item in node.attribute:
            if item.HasField("g"):
                rename(item.g, new, shuffle)
    for field in (graph.node, graph.initializer):
        refill(field, shuffle.sample(list(field), len(field)))


@examples(25)
@given(models(), st.sampled_from(("mse", "max", "percentile:99.9")))
def test_batches_of_another_size_give_the_same_scales(proto, method):
    plan = qdq_surgeon.plan(proto)
    chosen = [
        qdq_surgeon.choose(proto, plan, qdq_surgeon.calibrate(proto, plan, feeds(proto, size)), method)
        for size in (SAMPLES, 4, 1)
    ]
    for scales in chosen[1:]:
        assert scales.values.keys() == chosen[0].values.keys()
        assert scales.dropped.keys() == chosen[0].dropped.keys()
        for key, scale in scales.values.items():
            np.testing.assert_allclose(scale, chosen[0].values[key], rtol=BUCKET - 1)


# ---- two exports of one network ------------------------------------------------------------------------------


@pytest.mark.skipif(not (ZOO / "ultraface").exists(), reason=f"the model zoo is not at {ZOO}")
def test_a_model_and_its_simplified_twin_get_the_same_sites():
    """One has BatchNormalization behind its Convs, in the other it is folded into the weights."""
    raw, simplified = (
        qdq_surgeon.load(ZOO / "ultraface" / f"version-RFB-320{end}.onnx") for end in ("", "_simplified")
    )
    directions = {node.first_output: direction(raw.graph, node) for node in convs(raw)}
    names = {node.first_output: node.first_output for node in convs(raw)}
    twins = {node.first_output: twin(direction(simplified.graph, node), directions) for node in convs(simplified)}
    assert sorted(twins.values()) == sorted(names)
    assert sites_by_conv(simplified, twins) == sites_by_conv(raw, names)


def convs(loaded):
    return [node for node in loaded.graph.nodes if node.op == "Conv"]


def direction(graph, node):
    """The weight of each output channel as a unit vector of fixed sign: what folding BN into it does not change."""
    rows = graph.value(node.inputs[1]).reshape(graph.shape(node.inputs[1])[0], -1).astype(np.float64)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1, keepdims=True), 1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True) * np.sign(largest)
    return rows / np.where(norms == 0, 1, norms)


def twin(rows, directions):
    """The one Conv with the same directions."""
    (found,) = [
        name for name, other in directions.items() if other.shape == rows.shape and np.allclose(other, rows, atol=1e-4)
    ]
    return found


def sites_by_conv(loaded, names):
    """Every site as its kind and its readers: a Conv by its name in `names`, another node by its op."""
    return Counter(
        (
            site.weight,
            site.axis,
            tuple(sorted((names.get(read.edge.key, read.edge.op), read.edge.slot, read.rule) for read in site.reads)),
        )
        for site in qdq_surgeon.plan(loaded).sites
    )
