"""Does plan + insert grow linearly? Times graphs of 5,000 and 20,000 nodes and prints the ratios.

A ratio of 4 is linear. Absolute times mean nothing on a shared machine; both sides run in turn, best of three.
Calibration is left out: every activation gets the same statistic.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.statistics import Accumulator, Origin
from qdq_surgeon.report.tables import table
from qdq_surgeon.scales import tensors_to_calibrate

SMALL, LARGE = 5_000, 20_000
READERS = 8_000
REPEATS = 3


def residual_chain(nodes: int) -> ModelProto:
    """Blocks of Conv, Relu, Conv, Add, Relu, one behind the other."""
    made: list[NodeProto] = []
    tensor = "x"
    for block in range(nodes // 5):
        first, relu, second, total, out = (f"{name}{block}" for name in ("a", "b", "c", "d", "y"))
        made += [
            helper.make_node("Conv", [tensor, f"w{block % 50}"], [first], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [first], [relu]),
            helper.make_node("Conv", [relu, f"w{block % 50}"], [second], pads=[1, 1, 1, 1]),
            helper.make_node("Add", [second, tensor], [total]),
            helper.make_node("Relu", [total], [out]),
        ]
        tensor = out
    return _model(made, [tensor], 50)


def one_activation_many_readers(nodes: int) -> ModelProto:
    """A Conv chain, and one activation and one weight that two fifths of the nodes read."""
    readers = nodes * READERS // LARGE
    made = [
        helper.make_node("Relu", ["x"], ["shared"]),
        *(helper.make_node("Conv", ["shared", "w0"], [f"r{i}"], pads=[1, 1, 1, 1]) for i in range(readers)),
        helper.make_node("Sum", [f"r{i}" for i in range(readers)], ["t0"]),
    ]
    chain = nodes - len(made)
    made += [helper.make_node("Conv", [f"t{i}", "w0"], [f"t{i + 1}"], pads=[1, 1, 1, 1]) for i in range(chain)]
    return _model(made, [f"t{chain}"], 1)


def two_towers(nodes: int) -> ModelProto:
    """Two Conv chains from one input, added at every level: the common ancestor gets ever further away."""
    made: list[NodeProto] = []
    left = right = "x"
    sums = []
    for level in range(nodes // 5):
        made += [
            helper.make_node("Conv", [source, "w0"], [made_there], pads=[1, 1, 1, 1])
            for source, made_there in (
                (left, f"a{level}"),
                (right, f"b{level}"),
                (f"a{level}", f"p{level}"),
                (f"b{level}", f"q{level}"),
            )
        ]
        made.append(helper.make_node("Add", [f"p{level}", f"q{level}"], [f"s{level}"]))
        left, right = f"a{level}", f"b{level}"
        sums.append(f"s{level}")
    made.append(helper.make_node("Sum", sums, ["y"]))
    return _model(made, ["y"], 1)


def _model(nodes: list[NodeProto], outputs: list[str], weights: int) -> ModelProto:
    generator = np.random.default_rng(0)
    values = [generator.standard_normal((16, 16, 3, 3)).astype(np.float32) for _ in range(weights)]
    shape = [1, 16, 8, 8]
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(value, f"w{index}") for index, value in enumerate(values)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def seconds(proto: ModelProto) -> dict[str, float]:
    """Load, plan and insert, one after the other."""
    statistic = Accumulator()
    statistic.add(np.linspace(-1, 1, 1000, dtype=np.float32))
    start = time.perf_counter()
    model = qdq_surgeon.load(proto)
    digest = model.graph and model.digest
    loaded = time.perf_counter()
    plan = qdq_surgeon.plan(model)
    planned = time.perf_counter()
    tensors = dict.fromkeys(tensors_to_calibrate(plan), statistic.result())
    statistics = qdq_surgeon.Statistics(tensors, digest, Origin(("none",), "", 0))
    scales = qdq_surgeon.choose(model, plan, statistics, "max")
    chosen = time.perf_counter()
    qdq_surgeon.insert(model, plan, scales)
    inserted = time.perf_counter()
    return {
        "load": loaded - start,
        "plan": planned - loaded,
        "choose": chosen - planned,
        "insert": inserted - chosen,
        "plan+insert": planned - loaded + inserted - chosen,
    }


def main() -> None:
    rows = []
    for name, build in (
        ("residual chain", residual_chain),
        (f"{READERS} readers", one_activation_many_readers),
        ("two towers", two_towers),
    ):
        small, large = _best(build, SMALL), _best(build, LARGE)
        rows.append((name, *(f"{large[stage] / small[stage]:.2f} ({large[stage]:.2f} s)" for stage in small)))
        stages = tuple(small)
    print(
        f"time at {LARGE:,} nodes over time at {SMALL:,} nodes; linear is {LARGE / SMALL:.0f}; in brackets the larger"
    )
    print(table(("graph", *stages), rows))


def _best(build: Callable[[int], ModelProto], nodes: int) -> dict[str, float]:
    runs = [seconds(build(nodes)) for _ in range(REPEATS)]
    return {stage: min(run[stage] for run in runs) for stage in runs[0]}


if __name__ == "__main__":
    main()
