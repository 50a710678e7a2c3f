"""Sites inside the bodies of If, Loop and Scan are planned, calibrated and given pairs like any other."""

from textwrap import dedent

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qdq_surgeon
from qdq_surgeon.calibration.collection import collect
from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.calibration.taps import Reader
from qdq_surgeon.existing import strip_pairs
from tests.graphs import decisions, model

NESTED = """g (float[N,16,8,8] x, bool deep) => (float[N,16,8,8] y) <float[16,16,3,3] w, float[16,16,1,1] v> {
    r = Relu(x)
    y = If (deep) <
        then_branch = yes () => (float[N,16,8,8] a) {
            t = Conv<pads=[1,1,1,1]>(r, w)
            u = Relu(t)
            a = If (deep) <
                then_branch = yy () => (float[N,16,8,8] aa) { aa = Conv(u, v) },
                else_branch = nn () => (float[N,16,8,8] bb) { bb = Neg(u) }
            >
        },
        else_branch = no () => (float[N,16,8,8] b) {
            t = Neg(x)
            b = Conv<pads=[1,1,1,1]>(t, w)
        }
    >
}"""

LOOP = """g (float[N,16,8,8] x, int64 trip) => (float[N,16,8,8] y, float[T,N,16,8,8] all)
<float[16,16,1,1] w, bool go = {1}> {
    y, all = Loop (trip, go, x) <
        body = step (int64 i, bool on, float[N,16,8,8] s) => (bool still, float[N,16,8,8] out, float[N,16,8,8] kept) {
            still = Identity(on)
            c = Conv(s, w)
            out = Relu(c)
            kept = Conv(out, w)
        }
    >
}"""

SCAN = """g (float[M,16] start, float[5,M,16] xs) => (float[M,16] end, float[5,M,16] ys) <float[16,16] w> {{
    end, ys = Scan (start, xs) <
        num_scan_inputs = 1{options},
        body = step (float[M,16] s, float[M,16] x) => (float[M,16] next, float[M,16] y) {{
            h = Add(s, x)
            m = MatMul(h, w)
            next = Tanh(m)
            y = MatMul(next, w)
        }}
    >
}}"""


def test_bodies_are_planned_like_any_graph_and_what_they_capture_has_one_pair():
    assert decisions(model(NESTED)) == dedent(
        """\
        quantized
          conv
            r -> Conv y.then_branch/t[0]
            w (axis 0) -> Conv y.then_branch/t[1], Conv y.else_branch/b[1]
            y.then_branch/u -> Conv y.then_branch/a.then_branch/aa[0]
            v (axis 0) -> Conv y.then_branch/a.then_branch/aa[1]
            y.else_branch/t -> Conv y.else_branch/b[0]

        kept float
          graph-output
            y -> graph output y"""
    )


def test_a_carried_tensor_counts_as_float():
    """The Relu's output goes around the Loop, so the Conv before it may not write INT8 for it alone."""
    plan = qdq_surgeon.plan(model(LOOP))
    edges = {str(edge) for site in plan.sites for edge in site.edges}
    assert edges == {"Conv y.body/c[0]", "Conv y.body/c[1]", "Conv y.body/kept[0]", "Conv y.body/kept[1]"}


def test_filters_reach_into_bodies():
    plan = qdq_surgeon.plan(model(NESTED), exclude=["b"])
    assert "Conv y.else_branch/b[0]" not in str(plan).split("kept float")[0]
    with pytest.raises(qdq_surgeon.FilterError, match="no node is called 'zz'"):
        qdq_surgeon.plan(model(NESTED), exclude=["zz"])


def test_a_branch_is_measured_on_the_samples_that_take_it():
    proto = seeded(NESTED)
    batches = [{"x": images(4, seed), "deep": np.array(seed % 3 == 0)} for seed in range(6)]
    statistics = qdq_surgeon.calibrate(proto, qdq_surgeon.plan(proto), batches).tensors
    w = weight(proto, "w")
    into = [batch["x"] for batch in batches if batch["deep"]]
    around = [batch["x"] for batch in batches if not batch["deep"]]
    assert_measured(statistics["y.else_branch/t"], [-x for x in around])
    assert_measured(statistics["y.then_branch/u"], [np.maximum(convolved(np.maximum(x, 0), w), 0) for x in into])


def test_a_loop_is_measured_in_every_round():
    proto = seeded(LOOP)
    x = images(3)
    statistics = qdq_surgeon.calibrate(proto, qdq_surgeon.plan(proto), [{"x": x, "trip": np.array(3)}]).tensors
    w = weight(proto, "w")[:, :, 0, 0]
    rounds = [x]
    for _ in range(3):
        rounds.append(np.maximum(np.einsum("oc,nchw->nohw", w, rounds[-1]), 0))
    assert_measured(statistics["y.body/s"], rounds[:3])
    assert_measured(statistics["y.body/out"], rounds[1:])


SCANS = {
    "forward": "",
    "backward": ", scan_input_directions=[1]",
    "written backward": ", scan_output_directions=[1]",
    "along another axis": ", scan_input_axes=[1]",
    "written along another axis": ", scan_output_axes=[1]",
}


@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_a_scan_run_step_by_step_gives_what_onnxruntime_gives(options):
    text = SCAN.format(options=options)
    if "input_axes" in options:
        text = text.replace("float[5,M,16] xs", "float[M,5,16] xs")
    if "output_axes" in options:
        text = text.replace("float[5,M,16] ys", "float[M,5,16] ys")
    proto = seeded(text)
    xs = np.random.default_rng(1).standard_normal((7, 5, 16) if "input_axes" in options else (5, 7, 16))
    feed = {"start": np.zeros((7, 16), np.float32), "xs": xs.astype(np.float32)}
    assert_same_run(proto, feed, tensors=["end.body/h", "end.body/next"])


@pytest.mark.parametrize("trip", [0, 1, 4])
def test_a_loop_run_round_by_round_gives_what_onnxruntime_gives(trip):
    assert_same_run(seeded(LOOP), {"x": images(2), "trip": np.array(trip)}, tensors=["y.body/c"])


@pytest.mark.parametrize("deep", [True, False])
def test_an_if_run_by_hand_gives_what_onnxruntime_gives(deep):
    feed = {"x": images(2), "deep": np.array(deep)}
    assert_same_run(seeded(NESTED), feed, tensors=["y.then_branch/a.then_branch/aa", "y.else_branch/t"])


@pytest.mark.parametrize("text", [NESTED, LOOP, SCAN.format(options="")], ids=["If", "Loop", "Scan"])
def test_the_pairs_lie_inside_the_bodies_and_taking_them_out_gives_the_model_back(text):
    proto = seeded(text)
    before = proto.SerializeToString()
    result = qdq_surgeon.quantize(proto, feeds(text))
    onnx.checker.check_model(result.model, full_check=True)
    assert any(op == "QuantizeLinear" for op in ops_in_bodies(result.model))
    assert result.comparison.sqnr > 25
    assert strip_pairs(result.model) == proto
    assert proto.SerializeToString() == before


def test_a_branch_that_no_sample_takes_stays_float_as_a_whole(caplog):
    proto = seeded(NESTED)
    result = qdq_surgeon.quantize(proto, [{"x": images(4, seed), "deep": np.array(True)} for seed in range(8)])
    stays = {str(edge): reason for edge, reason in result.scales.dropped.items()}
    assert stays == {
        "Conv y.else_branch/b[0]": "calibration never ran this part of the graph",
        "Conv y.else_branch/b[1]": "calibration never ran this part of the graph",
    }
    assert "no sample ran the bodies that hold 'y.else_branch/t'" in caplog.text
    onnx.checker.check_model(result.model, full_check=True)


CAPTURED = {
    "a sequence that branches take from": """g (float[N,32] x, bool c) => (float[N,16] y)
            <float[16,16] w, int64 one = {1}, int64 none = {0}, int64 half = {16}> {
        s = SplitToSequence<axis=1>(x, half)
        y = If (c) <
            then_branch = yes () => (float[N,16] e) { a = SequenceAt(s, none) e = MatMul(a, w) },
            else_branch = no () => (float[N,16] f) { b = SequenceAt(s, one) f = MatMul(b, w) }
        >
    }""",
    "a sequence that lives on behind an If": """g (float[N,32] x, bool c) => (float[N,16] y)
            <float[16,16] w, int64 one = {1}, int64 none = {0}, int64 half = {16}> {
        s = SplitToSequence<axis=1>(x, half)
        a = SequenceAt(s, none)
        t = If (c) <
            then_branch = yes () => (float[N,16] e) { e = MatMul(a, w) },
            else_branch = no () => (float[N,16] f) { f = Relu(a) }
        >
        b = SequenceAt(s, one)
        y = Add(t, b)
    }""",
    "a sequence of constants": """g (float[N,16] x, bool c) => (float[N,16] y)
            <float[16,16] w, float[32,16] v, int64 none = {0}, int64 half = {16}> {
        s = SplitToSequence<axis=0>(v, half)
        y = If (c) <
            then_branch = yes () => (float[N,16] e) { a = SequenceAt(s, none) k = MatMul(x, a) e = MatMul(k, w) },
            else_branch = no () => (float[N,16] f) { f = Relu(x) }
        >
    }""",
    "a sequence that a Loop carries": """g (float[N,16] x, bool c) => (float[M,16] y)
            <float[16,16] w, int64 trips = {3}> {
        empty = SequenceEmpty<dtype=1>()
        s = Loop (trips, c, empty) <
            body = step (int64 i, bool on, seq(float[N,16]) before) => (bool still, seq(float[N,16]) after) {
                still = Identity(on)
                m = MatMul(x, w)
                after = SequenceInsert(before, m)
            }
        >
        all = SequenceInsert(s, x)
        y = ConcatFromSequence<axis=0>(all)
    }""",
    "an optional tensor": """g (float[N,16] x, bool c) => (float[N,16] y) <float[16,16] w> {
        o = Optional(x)
        y = If (c) <
            then_branch = yes () => (float[N,16] e) { k = OptionalGetElement(o) e = MatMul(k, w) },
            else_branch = no () => (float[N,16] f) { f = Identity(x) }
        >
    }""",
}


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in many stages"])
@pytest.mark.parametrize("text", CAPTURED.values(), ids=CAPTURED)
def test_sequences_and_optional_values_go_into_bodies_and_past_them(text, cut, monkeypatch):
    proto = seeded(text)
    proto.opset_import[0].version = 18
    if cut:
        monkeypatch.setattr("qdq_surgeon.calibration.taps.RUN_BYTES", 1)
    width = 32 if "float[N,32] x" in text else 16
    draw = np.random.default_rng(0).standard_normal
    samples = [{"x": draw((30, width)).astype(np.float32), "c": np.array(bool(index % 2))} for index in range(8)]
    result = qdq_surgeon.quantize(proto, samples)
    assert result.comparison.sqnr > 25
    assert not result.scales.dropped
    assert strip_pairs(result.model) == proto
    for sample in samples[:2]:
        assert_same_run(proto, sample, [site.tensor for site in result.plan.sites if not site.weight])


def test_sequences_and_optional_tensors_as_inputs_are_calibrated():
    text = """g (seq(float[A,16]) s, optional(float[B,16]) o) => (float[C,16] y)
            <float[16,16] w, float[16,16] v, int64 none = {0}> {
        a = SequenceAt(s, none)
        m = MatMul(a, w)
        h = OptionalHasElement(o)
        y = If (h) <
            then_branch = yes () => (float[D,16] e) { k = OptionalGetElement(o) e = MatMul(k, v) },
            else_branch = no () => (float[E,16] f) { r = Relu(m) f = MatMul(r, v) }
        >
    }"""
    proto = seeded(text)
    proto.opset_import[0].version = 18
    draw = lambda rows: np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)  # noqa: E731
    samples = [{"s": [draw(n), draw(9)], "o": draw(2 * n) if n % 2 else None} for n in range(1, 21)]
    statistics = qdq_surgeon.calibrate(proto, qdq_surgeon.plan(proto), samples).tensors
    assert_measured(statistics["a"], [sample["s"][0] for sample in samples])
    assert_measured(statistics["y.then_branch/k"], [sample["o"] for sample in samples if sample["o"] is not None])
    result = qdq_surgeon.quantize(proto, samples)
    assert result.comparison.sqnr > 25
    assert strip_pairs(result.model) == proto


def test_equal_names_in_two_branches_are_two_tensors():
    tensors = {site.tensor for site in qdq_surgeon.plan(model(NESTED)).sites}
    assert "y.else_branch/t" in tensors
    assert "t" not in tensors


def test_a_plan_with_bodies_survives_a_file():
    plan = qdq_surgeon.plan(model(NESTED))
    assert qdq_surgeon.Plan.from_json(plan.to_json()) == plan


def seeded(text):
    """The model with its weights drawn, small enough that values neither grow nor vanish."""
    proto = model(text)
    generator = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim > 1:
            drawn = (generator.standard_normal(value.shape) / np.sqrt(value[0].size)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))
    return proto


def weight(proto, name):
    return next(numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == name)


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 16, 8, 8)).astype(np.float32)


def feeds(text):
    if text is NESTED:
        return [{"x": images(2, seed), "deep": np.array(seed % 2 == 0)} for seed in range(4)]
    if text is LOOP:
        return [{"x": images(2, seed), "trip": np.array(2)} for seed in range(4)]
    drawn = np.random.default_rng(0).standard_normal((4, 5, 3, 16)).astype(np.float32)
    return [{"start": np.zeros((3, 16), np.float32), "xs": xs} for xs in drawn]


def convolved(x, w):
    """A 3x3 convolution with padding 1, by its definition."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w)


def ops_in_bodies(proto):
    return [node.op_type for node in all_nodes(proto.graph)][len(proto.graph.node) :]


def all_nodes(graph):
    nodes = list(graph.node)
    for node in graph.node:
        for item in node.attribute:
            nodes += all_nodes(item.g)
    return nodes


def assert_measured(statistic, arrays):
    values = np.concatenate([np.ravel(array) for array in arrays])
    assert statistic.count == values.size
    assert statistic.minimum == pytest.approx(values.min(), rel=1e-4, abs=1e-5)
    assert statistic.maximum == pytest.approx(values.max(), rel=1e-4, abs=1e-5)


def assert_same_run(proto, feed, tensors):
    """The outputs that the Reader computes on its way are those of onnxruntime."""
    loaded = qdq_surgeon.load(proto)
    outputs = [value.name for value in proto.graph.output]
    (batch,) = read_data([feed], loaded).batches
    found = Reader(loaded, tensors, batch, results=outputs).run(batch, lambda name, values: None)
    (expected,) = Session(proto).run(batch, outputs)
    for name, values in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
        assert found[name].shape == values.shape
    assert collect(loaded, tensors, Split(read_data([feed], loaded), hold_out=False)).tensors.keys() == set(tensors)
