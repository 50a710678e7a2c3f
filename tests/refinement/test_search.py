"""The fewest multiply-accumulates that reach a target: against every subset, where errors add up."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdq_surgeon.errors import QdqError
from qdq_surgeon.refinement.mixed import keep_float
from qdq_surgeon.refinement.search import fewest, noisiest
from qdq_surgeon.refinement.sensitivity import OpNoise
from qdq_surgeon.refinement.target import Target


def ops_of(*shares_and_macs):
    return [
        OpNoise(f"Conv {name}", name, share, macs)
        for name, (share, macs) in zip("abcdefghij", shares_and_macs, strict=False)
    ]


class Threshold:
    """Reached where the ops in float take away at least `needed` of the error."""

    def __init__(self, ops, needed):
        self.shares = {op.output: op.share for op in ops}
        self.needed = needed
        self.asked = []

    def __call__(self, chosen):
        self.asked.append(chosen)
        return sum(self.shares[op] for op in chosen) >= self.needed


def cost(ops, chosen):
    return sum(op.macs for op in ops if op.output in chosen)


def cheapest(ops, reaches):
    """By trying every subset; all ops where none reaches."""
    names = [op.output for op in ops]
    sets = (frozenset(c) for size in range(len(names) + 1) for c in itertools.combinations(names, size))
    return min((cost(ops, chosen) for chosen in sets if reaches(chosen)), default=cost(ops, names))


some_ops = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1000)), min_size=1, max_size=7).map(
    lambda pairs: ops_of(*pairs)
)
equal_ops = st.lists(st.integers(1, 100), min_size=1, max_size=7).map(lambda shares: ops_of(*((s, 10) for s in shares)))


@settings(max_examples=300, deadline=None)
@given(some_ops, st.integers(0, 500))
def test_it_reaches_where_anything_does_and_asks_nothing_twice(ops, needed):
    reaches = Threshold(ops, needed)
    chosen = fewest(ops, reaches)
    assert len(reaches.asked) == len(set(reaches.asked))
    every = frozenset(op.output for op in ops)
    assert reaches(chosen) or chosen == every


@settings(max_examples=300, deadline=None)
@given(some_ops, st.integers(1, 500))
def test_no_op_of_the_answer_can_be_left_out(ops, needed):
    reaches = Threshold(ops, needed)
    chosen = fewest(ops, reaches)
    if reaches(chosen):
        assert not any(reaches(chosen - {op}) for op in chosen)


@settings(max_examples=300, deadline=None)
@given(equal_ops, st.integers(0, 500))
def test_among_equally_large_ops_it_is_minimal(ops, needed):
    reaches = Threshold(ops, needed)
    assert cost(ops, fewest(ops, reaches)) == cheapest(ops, reaches)


@pytest.mark.parametrize(
    ("ops", "needed", "expected"),
    [
        (ops_of((5, 10), (3, 10)), 0, set()),
        (ops_of((90, 10), (5, 10), (5, 10)), 50, {"a"}),
        (ops_of((50, 1000), (30, 10), (20, 10)), 45, {"b", "c"}),
        (ops_of((50, 1000), (30, 10), (20, 10)), 60, {"a", "c"}),
        (ops_of((50, 10), (30, 10), (20, 10)), 1000, {"a", "b", "c"}),
        (ops_of((60, 0), (40, 100)), 50, {"a"}),
        ([], 50, set()),
    ],
)
def test_by_hand(ops, needed, expected):
    reaches = Threshold(ops, needed)
    if expected == {"a", "c"}:  # a and b cost the same
        assert cost(ops, fewest(ops, reaches)) == 1010
    else:
        assert fewest(ops, reaches) == expected


def test_an_easy_target_is_not_paid_with_the_largest_op():
    ops = ops_of((0.09, 41), (0.08, 10), (0.83, 82))
    assert fewest(ops, Threshold(ops, 0.06)) == {"b"}


def random_cases(number, size, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        shares, macs = rng.pareto(1, size) + 0.01, (10 ** (3 * rng.random(size))).astype(int)
        ops = ops_of(*zip((shares / shares.sum()).tolist(), macs.tolist(), strict=True))
        yield ops, Threshold(ops, rng.random())


def test_it_is_nearly_always_minimal():
    found = [(cost(ops, fewest(ops, reaches)), cheapest(ops, reaches)) for ops, reaches in random_cases(300, 8)]
    assert np.mean([ours == least for ours, least in found]) > 0.95
    assert max(ours / max(least, 1) for ours, least in found) < 2


def test_it_asks_seldom():
    """A few times the logarithm, and once for each op of an answer; not once for each op of the model."""
    ops = ops_of(*((1, 1) for _ in range(9)), (100, 1))
    reaches = Threshold(ops, 50)
    assert fewest(ops, reaches) == {"j"}
    assert len(reaches.asked) <= 3


def test_it_asks_seldom_for_hard_targets_too():
    rng = np.random.default_rng(0)
    shares, macs = rng.random(300), rng.integers(1, 1000, 300)
    ops = [OpNoise(f"op {i}", f"op {i}", float(shares[i]), int(macs[i])) for i in range(300)]
    reaches = Threshold(ops, 0.8 * shares.sum())
    chosen = fewest(ops, reaches)
    assert reaches(chosen)
    assert len(reaches.asked) < 50
    by_density = sorted(ops, key=lambda op: -op.share / op.macs)
    sums = np.cumsum([op.share for op in by_density])
    whole = int(np.searchsorted(sums, reaches.needed))
    assert cost(ops, chosen) <= 1.02 * sum(op.macs for op in by_density[: whole + 1])


def test_what_the_shares_overrate_is_left_out_again():
    """a, which the estimate says is needed, is not."""
    ops = ops_of((0.5, 1000), (0.3, 10), (0.2, 10))
    assert fewest(ops, lambda chosen: {"b", "c"} <= chosen) == {"b", "c"}
    ops = ops_of((0.9, 30), (0.06, 20), (0.04, 20))
    assert fewest(ops, lambda chosen: {"b"} <= chosen) == {"b"}


def test_an_op_without_macs_is_not_free():
    """An Add in float costs conversions: it goes for the usual op, not before all others."""
    ops = ops_of((0.2, 0), (0.5, 10), (0.3, 500), (0.0, 900))
    assert fewest(ops, Threshold(ops, 0.2)) == {"b"}


def test_noise_in_what_reaches_does_no_harm():
    """Sets that reach and supersets that do not: the answer is one that was seen to reach."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        ops = ops_of(*((float(rng.random()), int(rng.integers(1, 100))) for _ in range(6)))
        answers = {}

        def reaches(chosen, answers=answers):
            return answers.setdefault(chosen, bool(chosen) and bool(rng.random() < 0.5))

        chosen = fewest(ops, reaches)
        assert answers.get(chosen, True) or len(chosen) == 6


def test_the_noisiest():
    ops = ops_of((5, 10), (30, 10), (20, 10))
    assert noisiest(ops, 2) == {"b", "c"}
    assert noisiest(ops, 9) == {"a", "b", "c"}


# ---- the report -------------------------------------------------------------------------------------------------

OPS = ops_of((0.5, 100), (0.3, 300), (0.2, 600))


def test_the_worst_stay_float_without_a_trial():
    chosen, mixed = keep_float(Target(worst=2), OPS, lambda _: pytest.fail("no trial is needed"), 8)
    assert chosen == {"a", "b"}
    assert (mixed.share_of_macs, mixed.trials, mixed.reached) == (0.4, 0, True)
    assert str(mixed).startswith(
        "2 ops kept float, 40.0% of the MACs, the worst by error:\n  Conv a: 50.0% of the error"
    )


def test_a_target_that_is_reached_says_by_what():
    chosen, mixed = keep_float(Target(sqnr=20), OPS, Threshold(OPS, 0.4), 8)
    assert chosen == {"a"}
    assert mixed.reached
    assert str(mixed).startswith("1 op kept float, 10.0% of the MACs, to reach SQNR 20 dB on 8 calibration samples (")


def test_a_target_that_nothing_reaches_is_told_in_capitals():
    chosen, mixed = keep_float(Target(sqnr=20, agreement=0.9), OPS, lambda _: False, 1)
    assert chosen == {"a", "b", "c"}
    assert not mixed.reached
    assert "WITHOUT reaching SQNR 20 dB, agreement 0.9 on 1 calibration sample (" in str(mixed)


def test_a_target_that_needs_nothing():
    _, mixed = keep_float(Target(sqnr=20), OPS, lambda _: True, 8)
    assert str(mixed) == "SQNR 20 dB reached with every planned op in INT8 (8 calibration samples)"


def test_ops_without_known_macs_have_no_share():
    _, mixed = keep_float(Target(worst=1), ops_of((0.5, 0), (0.4, 0)), lambda _: True, 8)
    assert mixed.share_of_macs is None
    assert "unknown MACs" in str(mixed)


def test_no_set_is_tried_twice():
    reaches = Threshold(OPS, 0.4)
    keep_float(Target(sqnr=20), OPS, reaches, 8)
    assert len(reaches.asked) == len(set(reaches.asked))


@pytest.mark.parametrize(
    ("target", "sqnr", "agreement", "score", "expected"),
    [
        (Target(sqnr=20), 20, None, None, True),
        (Target(sqnr=20), 19.9, 1, 1, False),
        (Target(agreement=0.9), 0, 0.9, None, True),
        (Target(agreement=0.9), 99, 0.89, None, False),
        (Target(score=0.5), 99, 1, 0.4, False),
        (Target(sqnr=20, agreement=0.9, score=0.5), 20, 0.9, 0.5, True),
        (Target(sqnr=20, agreement=0.9, score=0.5), 20, 0.9, 0.4, False),
        (Target(sqnr=20), float("-inf"), None, None, False),
    ],
)
def test_a_target_is_reached_where_no_number_is_below(target, sqnr, agreement, score, expected):
    assert target.is_reached(sqnr, agreement, score) == expected


@pytest.mark.parametrize("target", [Target(agreement=0.9), Target(score=0.9)])
def test_a_number_that_there_is_none_of_is_not_reached(target):
    assert not target.is_reached(99, None, None)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -np.inf])
@pytest.mark.parametrize("name", ["sqnr", "agreement", "score"])
def test_a_target_is_a_finite_number(name, number):
    with pytest.raises(QdqError, match="a target must be a finite number, not"):
        Target(**{name: number})


def test_what_misses_a_target_in_words():
    target = Target(sqnr=20, agreement=0.9)
    assert target.missed_by(20, 0.9, None) == ""
    assert target.missed_by(19.5, 0.85, None) == "SQNR 19.5 instead of 20, agreement 0.85 instead of 0.9"


def test_what_is_a_target():
    assert not Target()
    assert Target(worst=1)
    assert Target(sqnr=0)  # 0 dB is a target too
    assert not Target(worst=1).is_searched
