"""A planted culprit is found first and its cost is the least that reaches a target; passes are those really run."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch
from qdq_surgeon.errors import DataError, ModelError, PlanError
from qdq_surgeon.pipeline import sensitivity
from qdq_surgeon.refinement import sensitivity as room
from qdq_surgeon.refinement import switches
from qdq_surgeon.refinement.sensitivity import measure
from qdq_surgeon.refinement.trace import TensorError, first_jump, trace, worst
from tests.graphs import model
from tests.refinement.nets import NETS, OUTPUTS, prepared, rows, run, singles, weight, with_weights

FOUR = """g (float[N,16,8,8] x) => (float[N,16] y)
<float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,16,1,1] w3, float[16,1024] fw> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    r2 = Relu(c2)
    c3 = Conv(r2, w3)
    r3 = Relu(c3)
    f = Flatten(r3)
    y = Gemm<transB=1>(f, fw)
}"""
OPS = ("c1", "c2", "c3", "y")

TRANSPOSED = """g (float[N,16,8,8] x) => (float[N,16,8,8] y)
<float[16,16,3,3] w1, float[16,16,1,1] wt, float[16,16,1,1] w3> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1)
    t = ConvTranspose(c1, wt)
    r = Relu(t)
    y = Conv(r, w3)
}"""

X = rows(32, 16, 8, 8)


def outlier_channel():
    """r1's channel 0 is 100 times as large, and w2 divides it again: the same function, with r1 hard to round."""
    proto = model(FOUR)
    w1, w2 = weight(proto, "w1"), weight(proto, "w2")
    w1[0] *= 100
    w2[:, 0] /= 100
    return with_weights(proto, w1=w1, w2=w2)


def outlier_weight():
    """One input channel of a ConvTranspose, whose weight has one scale, 100 times as large; w1 divides it before."""
    proto = model(TRANSPOSED)
    w1, wt = weight(proto, "w1"), weight(proto, "wt")
    w1[0] /= 100
    wt[0] *= 100
    return with_weights(proto, w1=w1, wt=wt)


def found_in(proto, x=X, **options):
    return sensitivity(proto, qdq_surgeon.plan(proto), {"x": x}, **options)


# ---- what is ranked first ---------------------------------------------------------------------------------------


def test_without_a_culprit_no_op_has_most_of_the_error():
    assert found_in(model(FOUR), method="max").ops[0].share < 0.5


def test_an_activation_with_an_outlier_channel_comes_first():
    found = found_in(outlier_channel(), method="max")
    assert (found.sites[0].tensor, found.sites[0].weight) == ("r1", False)
    assert found.sites[0].share > 0.9
    assert found.ops[0].output == "c2"
    assert found.ops[0].share > 0.9


def test_a_weight_with_an_outlier_channel_and_one_scale_comes_first():
    found = found_in(outlier_weight(), method="max")
    assert (found.sites[0].tensor, found.sites[0].weight, found.sites[0].axis) == ("wt", True, None)
    assert found.ops[0].output == "t"


def test_a_weight_with_an_outlier_channel_and_a_scale_for_each_is_harmless():
    proto = model(FOUR)
    w2, w3 = weight(proto, "w2"), weight(proto, "w3")
    w2[0] *= 100
    w3[:, 0] /= 100
    shares = {site.tensor: site.share for site in found_in(with_weights(proto, w2=w2, w3=w3), method="max").sites}
    assert shares["w2"] < 0.1
    assert shares["r2"] > 0.8  # what it makes of the next activation is not


# ---- the figures ------------------------------------------------------------------------------------------------


def alone(source, plan, scales, site):
    from qdq_surgeon.insertion import insert_pairs

    return insert_pairs(source, dataclasses.replace(plan, sites=(site,)), scales, "1")


def centred_error(expected, actual):
    expected, actual = (side - side.mean(1, keepdims=True) for side in (expected, actual))
    return float(np.square(expected - actual).sum() / np.square(expected).sum())


def test_a_pairs_sqnr_is_that_of_the_model_with_it_alone():
    from qdq_surgeon.pipeline import calibrate, choose, insert

    source, plan, _ = prepared(FOUR, X)
    scales = choose(source, plan, calibrate(source, plan, {"x": X}))
    found = measure(source, plan, insert(source, plan, scales), singles(X[:8]))
    expected = run(source.proto, {"x": X[:8]})["y"].astype(np.float64)
    errors = {}
    for site in plan.sites:
        actual = run(alone(source, plan, scales, site), {"x": X[:8]}, simulate=True)["y"].astype(np.float64)
        errors[site.tensor] = centred_error(expected, actual)
    for site in found.sites:
        assert site.sqnr == pytest.approx(-10 * math.log10(errors[site.tensor]), abs=0.1)
        assert site.share == pytest.approx(errors[site.tensor] / sum(errors.values()), rel=0.05)
    assert [site.tensor for site in found.sites] == sorted(errors, key=lambda name: -errors[name])


def test_an_ops_part_is_the_sum_of_the_pairs_it_reads():
    found = found_in(model(FOUR))
    shares = {site.tensor: site.share for site in found.sites}
    read = {"c1": ("x", "w1"), "c2": ("r1", "w2"), "c3": ("r2", "w3"), "y": ("f", "fw")}
    for op in found.ops:
        assert op.share == pytest.approx(sum(shares[name] for name in read[op.output]))
    assert sum(site.share for site in found.sites) == pytest.approx(1)
    assert [op.share for op in found.ops] == sorted((op.share for op in found.ops), reverse=True)


def test_macs_are_those_of_one_sample():
    macs = {op.output: op.macs for op in found_in(model(FOUR)).ops}
    assert macs == {"c1": 64 * 16 * 16 * 9, "c2": 64 * 16 * 16 * 9, "c3": 64 * 16 * 16, "y": 1024 * 16}


def test_macs_are_those_of_one_sample_where_batches_stay_whole():
    source, plan, quantized = prepared(FOUR, X)
    found = measure(source, plan, quantized, [Batch({"x": X[:4]}, 4), Batch({"x": X[4:8]}, 4)])
    assert {op.output: op.macs for op in found.ops}["c1"] == 64 * 16 * 16 * 9
    assert found.samples == 8


def test_the_sqnr_with_all_pairs():
    source, plan, quantized = prepared(FOUR, X)
    found = measure(source, plan, quantized, singles(X[:8]))
    expected = run(source.proto, {"x": X[:8]})["y"].astype(np.float64)
    actual = run(quantized, {"x": X[:8]}, simulate=True)["y"].astype(np.float64)
    assert found.sqnr == pytest.approx(-10 * math.log10(centred_error(expected, actual)), abs=0.05)


@pytest.mark.parametrize("net", NETS)
def test_every_pair_and_every_op_is_named(net):
    text, shape = NETS[net]
    source, plan, quantized = prepared(text, rows(8, *shape))
    found = measure(source, plan, quantized, singles(rows(4, *shape)))
    assert {(site.tensor, site.axis) for site in found.sites} == {(site.tensor, site.axis) for site in plan.sites}
    assert {op.output for op in found.ops} == {edge.key for site in plan.sites for edge in site.edges}
    for op in found.ops:  # by which --exclude takes it
        assert qdq_surgeon.plan(source, exclude=op.output).sites != plan.sites


# ---- how many passes --------------------------------------------------------------------------------------------


def test_the_passes_said_are_those_that_were_run(monkeypatch):
    """Whole runs of the model with switches, and one walk, which runs both models once."""
    source, plan, quantized = prepared(FOUR, X)
    runs, walks = [], []
    session_run = switches.Session.run
    monkeypatch.setattr(
        switches,
        "Session",
        type("Counted", (switches.Session,), {"run": lambda *args: runs.append(1) or session_run(*args)}),
    )
    monkeypatch.setattr(room, "trace", lambda *args: walks.append(1) or trace(*args))
    found = measure(source, plan, quantized, singles(X[:5]))
    assert found.passes == len(runs) / 5 + 2 * len(walks) == len(plan.sites) + 4
    assert found.samples == 5
    assert str(found).startswith(f"{found.passes} forward passes of 5 samples; SQNR with all 8 pairs ")


def test_progress_reaches_its_total():
    source, plan, quantized = prepared(FOUR, X)
    told = []
    measure(source, plan, quantized, singles(X[:2]), lambda *what: told.append(what))
    assert [done for _, done, _ in told] == list(range(1, len(plan.sites) + 2))
    assert {(stage, total) for stage, _, total in told} == {("sensitivity", len(plan.sites) + 1)}


# ---- what it refuses --------------------------------------------------------------------------------------------


def test_a_model_with_pairs_is_refused():
    _, _, quantized = prepared(FOUR, X)
    with pytest.raises(ModelError, match="comes with Q/DQ pairs: give the float model"):
        found_in(quantized)


def test_a_plan_without_pairs_is_refused():
    proto = model(FOUR)
    with pytest.raises(PlanError, match="no pairs, so there is no error"):
        sensitivity(proto, qdq_surgeon.plan(proto, exclude=list(OPS)), {"x": X})


def test_a_wrong_method_costs_no_calibration():
    with pytest.raises(qdq_surgeon.QdqError, match="maxx"):
        sensitivity(model(FOUR), qdq_surgeon.plan(model(FOUR)), iter(()), method="maxx")


def test_a_model_that_gives_class_indices():
    text = "g (float[N,16] x) => (y) <float[16,32] w, float[32] b> { c = Gemm(x, w, b)\n y = ArgMax<axis=1>(c) }"
    assert found_in(model(text), rows(16, 16)).ops


# ---- the error along the graph ----------------------------------------------------------------------------------


def test_the_trace_gives_every_ops_own_sqnr():
    source, plan, quantized = prepared(FOUR, X)
    errors = {error.output: error for error in trace(source, plan, quantized, singles(X[:6]))}
    assert list(errors) == list(OPS)
    middle = [model(FOUR.replace("=> (float[N,16] y)", "=> (c1, c2, c3, y)")), type(quantized)()]
    middle[1].CopyFrom(quantized)
    del middle[1].graph.output[:]
    middle[1].graph.output.extend(middle[0].graph.output)
    expected, actual = run(middle[0], {"x": X[:6]}), run(middle[1], {"x": X[:6]}, simulate=True)
    for name, error in errors.items():
        noise = np.square(expected[name] - actual[name]).sum() / np.square(expected[name]).sum()
        assert error.sqnr == pytest.approx(-10 * math.log10(noise), abs=0.1)
    assert errors["c2"].before == errors["c1"].sqnr
    assert errors["c1"].before == 120


HEADS = """g (float[N,16] x) => (float[N,32] y, float[N,32] z) <float[16,32] w, float[16,32] v> {
    y = MatMul(x, w)
    z = MatMul(x, v)
}"""


def test_every_head_is_traced():
    source, plan, quantized = prepared(HEADS, rows(16, 16))
    assert {error.output for error in trace(source, plan, quantized, singles(rows(4, 16)))} == {"y", "z"}


def test_half_precision_is_traced_in_more():
    text = "g (float16[N,16] x) => (float16[N,32] y) <float16[16,32] w> { y = MatMul(x, w) }"
    x = (1000 * rows(16, 16)).astype(np.float16)
    source, plan, quantized = prepared(text, x, opset=19)
    (error,) = trace(source, plan, quantized, singles(x[:4]))
    assert error.sqnr < 60


def error(output, before, after):
    added = max(0.0, 10 ** (-after / 10) - 10 ** (-before / 10))
    return TensorError(f"Conv {output}", output, after, before, added)


def test_the_worst_are_those_that_add_most():
    errors = [error("a", 120, 30), error("b", 30, 12), error("c", 12, 11), error("d", 11, 14)]
    assert [found.output for found in worst(errors)] == ["b", "c", "a"]
    assert [found.output for found in worst(errors, 1)] == ["b"]
    assert worst([]) == ()


def test_the_first_jump_is_large_and_can_be_heard():
    quiet, slow, jump, later = error("a", 120, 30), error("b", 22, 18), error("c", 25, 15), error("d", 15, 2)
    assert first_jump([quiet, slow, jump, later]) == jump
    assert first_jump([quiet, slow]) is None
    assert first_jump([]) is None


def test_a_first_jump_from_nothing():
    culprit = error("a", 120, 10)
    assert first_jump([culprit]) == culprit
    assert str(culprit) == "Conv a (exact -> 10.0 dB)"
    assert str(error("b", 20, 10)) == "Conv b (20.0 -> 10.0 dB)"


def test_what_reads_exact_data_says_so():
    assert str(error("a", 120, 43)) == "Conv a (exact -> 43.0 dB)"


# ---- as few multiply-accumulates as a target takes --------------------------------------------------------------


def options_for(proto):
    return {"method": "max", "samples": 24, "bias_correction": False, "compare": False}


def sqnr_without(proto, kept):
    """The SQNR on the calibration samples with these ops in float."""
    result = qdq_surgeon.quantize(proto, {"x": X}, exclude=list(kept), **options_for(proto))
    return qdq_surgeon.compare(proto, result.model, {"x": X[:24]}).sqnr


@pytest.fixture(scope="module")
def every_subset():
    """Of the planted model: the SQNR for every set of float ops, and their multiply-accumulates."""
    proto = outlier_channel()
    sets = [frozenset(c) for size in range(5) for c in itertools.combinations(OPS, size)]
    return {chosen: sqnr_without(proto, chosen) for chosen in sets}


MACS = {"c1": 147456, "c2": 147456, "c3": 16384, "y": 16384}


def cheapest(every_subset, target):
    return min(sum(MACS[op] for op in chosen) for chosen, sqnr in every_subset.items() if sqnr >= target)


def test_the_search_finds_the_planted_culprit_alone(every_subset):
    none, healed = every_subset[frozenset()], every_subset[frozenset({"c2"})]
    assert healed > none + 6
    target = (none + healed) / 2
    result = qdq_surgeon.quantize(outlier_channel(), {"x": X}, target_sqnr=target, **options_for(None))
    assert [op.output for op in result.mixed.ops] == ["c2"]
    assert result.mixed.reached
    assert cheapest(every_subset, target) == MACS["c2"]
    assert result.mixed.share_of_macs == pytest.approx(MACS["c2"] / sum(MACS.values()))


@pytest.mark.parametrize("above", [-1.0, 1.0, 8.0])
def test_the_answer_is_minimal_at_other_targets_too(every_subset, above):
    target = every_subset[frozenset({"c2"})] + above
    result = qdq_surgeon.quantize(outlier_channel(), {"x": X}, target_sqnr=target, **options_for(None))
    chosen = frozenset(op.output for op in result.mixed.ops)
    assert every_subset[chosen] >= target
    assert sum(MACS[op] for op in chosen) == cheapest(every_subset, target)


def test_the_outputs_net_runs_through():
    """Three outputs, one of them read again."""
    found = found_in(model(OUTPUTS), method="max")
    assert {op.output for op in found.ops} >= {"c", "d", "y"}


def two_culprits():
    """Both r1 and r2 are hard to round; c3, which reads r2, has a ninth of the multiply-accumulates of c2."""
    proto = model(FOUR)
    w1, w2, w3 = (weight(proto, name) for name in ("w1", "w2", "w3"))
    w1[0] *= 36
    w2[:, 0] /= 36
    w2[0] *= 30
    w3[:, 0] /= 30
    return with_weights(proto, w1=w1, w2=w2, w3=w3)


def test_a_target_keeps_fewer_macs_than_the_worst_op_would():
    proto = two_culprits()
    target = 7.2
    worst_one = qdq_surgeon.quantize(proto, {"x": X}, float_worst=1, **options_for(proto))
    found = qdq_surgeon.quantize(proto, {"x": X}, target_sqnr=target, **options_for(proto))
    for result in (worst_one, found):
        assert qdq_surgeon.compare(proto, result.model, {"x": X[:24]}).sqnr >= target
    assert [op.output for op in worst_one.mixed.ops] == ["c2"]
    assert [op.output for op in found.mixed.ops] == ["c3"]
    assert found.mixed.share_of_macs < worst_one.mixed.share_of_macs / 8


def test_after_a_target_the_plan_keeps_whole_ops_float():
    found = qdq_surgeon.quantize(two_culprits(), {"x": X}, target_sqnr=7.2, **options_for(None))
    read = {}
    for site in found.plan.sites:
        for edge in site.edges:
            read.setdefault(edge.reader, set()).add(edge.slot)
    assert read == {"c1": {0, 1}, "c2": {0, 1}, "y": {0, 1}}
    kept = {(kept.edge.reader, kept.edge.slot) for kept in found.plan.kept}
    assert {("c3", 0), ("c3", 1)} <= kept
    assert str(found.mixed) in str(found)


def test_a_target_with_bias_correction_reports_both():
    found = qdq_surgeon.quantize(two_culprits(), {"x": X}, target_sqnr=7.2, method="max")
    assert found.mixed.reached
    assert found.correction is not None
    assert "SQNR 7.2 dB" in str(found)
    assert "biases" in str(found)


def test_a_target_needs_to_plan_again():
    proto = model(FOUR)
    with pytest.raises(qdq_surgeon.QdqError, match="a target needs to plan again: give `replan`, or call quantize"):
        qdq_surgeon.apply(proto, qdq_surgeon.plan(proto), {"x": X}, target_sqnr=20)


def test_a_target_without_samples_is_refused():
    proto = model(FOUR)
    statistics = qdq_surgeon.calibrate(proto, qdq_surgeon.plan(proto), {"x": X})
    with pytest.raises(DataError, match="a target needs samples"):
        qdq_surgeon.quantize(proto, statistics=statistics, float_worst=1)


POOLED = """g (float[N,16,16,16] x) => (float[N,16] y)
<float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,1024] fw> {
    c1 = Conv<pads=[1,1,1,1]>(x, w1)
    r1 = Relu(c1)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
    c2 = Conv<pads=[1,1,1,1]>(p, w2)
    f = Flatten(c2)
    y = Gemm<transB=1>(f, fw)
}"""


def test_an_op_that_only_moves_data_adds_nothing():
    """In float it would not change a digit: what reads its output is still rounded with the same scale."""
    proto = model(POOLED)
    w1, w2 = weight(proto, "w1"), weight(proto, "w2")
    w1[0] *= 100
    w2[:, 0] /= 100
    found = found_in(with_weights(proto, w1=w1, w2=w2), rows(32, 16, 16, 16), method="max")
    shares = {op.output: op.share for op in found.ops}
    assert shares["c2"] > 0.9
    assert shares.get("p", 0.0) < 0.1


def test_pairs_before_and_behind_a_pool_are_measured_as_one():
    source, plan, quantized = prepared(POOLED, rows(8, 16, 16, 16))
    found = measure(source, plan, quantized, singles(rows(2, 16, 16, 16)))
    sites = {site.tensor: site for site in found.sites}
    assert (sites["p"].share, sites["p"].sqnr) == (0, sites["r1"].sqnr)
    assert found.passes == len(plan.sites) - 1 + 4


SHARED = """g (float[N,16] x) => (float[N,32] y, float[N,32] z) <float[16,32] w, float[16,32] v> {
    y = MatMul(x, w)
    z = MatMul(x, v)
}"""


def test_a_pair_that_several_ops_read_is_divided_among_them():
    """So that the parts of all ops together are the whole error."""
    found = found_in(model(SHARED), rows(32, 16))
    shares = {site.tensor: site.share for site in found.sites}
    assert {op.output: op.share for op in found.ops} == pytest.approx(
        {"y": shares["w"] + shares["x"] / 2, "z": shares["v"] + shares["x"] / 2}
    )
    assert sum(op.share for op in found.ops) == pytest.approx(1)


def test_an_agreement_that_no_output_has_is_refused():
    text = "g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,1,1] w> { y = Conv(x, w) }"
    with pytest.raises(qdq_surgeon.QdqError, match="needs class scores, which no output looks like"):
        qdq_surgeon.quantize(model(text), {"x": X}, target_agreement=0.9)


def test_the_float_model_runs_once_for_all_trials(monkeypatch):
    """What it gave is kept, unless it takes too much room."""
    from qdq_surgeon import making

    runs = []
    session_run = making.Session.run

    def counted(session, batch, names):
        runs.append(session)
        return session_run(session, batch, names)

    monkeypatch.setattr(making.Session, "run", counted)
    sessions = {}
    for limit in (making.REMEMBERED, 0):
        monkeypatch.setattr(making, "REMEMBERED", limit)
        runner = making._Remembering(making.Session(model(FOUR)))
        batches = singles(X[:2])
        outputs = [runner.run(batch, ["y"])[0][0] for batch in (*batches, *batches)]
        np.testing.assert_array_equal(outputs[0], outputs[2])
        sessions[limit] = len(runs)
        runs.clear()
    assert list(sessions.values()) == [2, 4]


def test_statistics_take_the_place_of_the_calibration():
    proto = model(FOUR)
    plan = qdq_surgeon.plan(proto)
    statistics = qdq_surgeon.calibrate(proto, plan, {"x": X[:16]})
    found = sensitivity(proto, plan, {"x": X}, statistics=statistics)
    assert {op.output for op in found.ops} == set(OPS)
    assert found.samples == 8


def test_the_plan_says_that_the_target_kept_an_op_float():
    found = qdq_surgeon.quantize(two_culprits(), {"x": X}, target_sqnr=7.2, **options_for(None))
    assert "Your filter" not in str(found.plan)


def test_a_model_that_gives_as_many_values_as_the_data_say():
    text = """g (float[N,16] x) => (float[K] y) <float[16,32] w, float[32] b, float zero = {0}> {
        c = Gemm(x, w, b)
        m = Greater(c, zero)
        i = NonZero(m)
        t = Transpose<perm=[1,0]>(i)
        y = GatherND(c, t)
    }"""
    assert found_in(model(text), rows(32, 16)).ops


# ---- the model does not depend on whether it is compared ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"float_worst": 1}, {"method": "auto"}, {"gptq": True}], ids=str)
def test_weights_alone_give_the_same_model_with_and_without_a_comparison(options):
    made = [
        qdq_surgeon.quantize(two_culprits(), {"x": X}, placement="weights-only", compare=compare, **options).model.graph
        for compare in (True, False)
    ]
    assert made[0] == made[1]


def test_a_score_that_the_float_model_does_not_reach_is_refused_at_once():
    with pytest.raises(qdq_surgeon.QdqError, match="the target score 2 cannot be reached: the float model's is 1"):
        qdq_surgeon.quantize(two_culprits(), {"x": X}, target_score=2, score=lambda run: 1.0)
