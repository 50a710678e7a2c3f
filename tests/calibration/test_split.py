"""Shards deal the batches of one stream out to several runs; the rest of the split is in test_feeds.py."""

import itertools

import numpy as np
import pytest

from qdq_surgeon.calibration.split import Split
from qdq_surgeon.errors import DataError
from tests.calibration.feeding import BATCH_OF_1, OPEN, opened, rows


def shards(data, number, text=OPEN, **options):
    """The samples of each shard."""
    splits = [Split(opened(text, data), hold_out=False, shard=(i + 1, number), **options) for i in range(number)]
    return [np.concatenate([batch.feed["x"] for batch in split]) for split in splits]


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_every_sample_is_in_one_shard(number):
    x = rows(60)
    together = np.concatenate(shards({"x": x}, number))
    assert sorted(map(tuple, together)) == sorted(map(tuple, x))


def test_a_shard_takes_every_nth_batch():
    x = rows(8)
    for index, taken in enumerate(shards({"x": x}, 3, BATCH_OF_1)):
        np.testing.assert_array_equal(taken, x[index::3])


def test_a_limit_holds_for_each_shard():
    assert [len(taken) for taken in shards({"x": rows(60)}, 2, limit=10)] == [10, 10]


def test_a_shard_of_a_stream_is_read_no_further_than_needed():
    taken = itertools.count()
    endless = ({"x": np.full((1, 3), next(taken), np.float32)} for _ in itertools.count())
    split = Split(opened(OPEN, endless), limit=3, hold_out=False, shard=(2, 4))
    assert [batch.feed["x"][0, 0] for batch in split] == [1, 5, 9]
    assert next(taken) <= 14


@pytest.mark.parametrize("shard", [(0, 3), (4, 3), (-1, 3), (1, 0)])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(DataError, match=f"there is no shard {shard[0]} of {shard[1]}: shards count from 1"):
        Split(opened(OPEN, {"x": rows(8)}), shard=shard)


def test_nothing_is_kept_where_nobody_compares():
    split = Split(opened(OPEN, {"x": rows(40)}), hold_out=False, keep=False)
    assert (sum(batch.samples for batch in split), split.seen) == (40, [])


# ---- what is kept for corrections and comparisons ---------------------------------------------------------------


def taken(batches):
    return [value for batch in batches for value in batch.feed["x"][:, 0].tolist()]


def test_what_calibrated_is_seen_and_what_compares_is_not():
    x = np.arange(40, dtype=np.float32)[:, None].repeat(3, 1)
    split = Split(opened(OPEN, {"x": x}), limit=24)
    calibrated = taken(list(split))
    assert taken(split.seen) == calibrated == list(range(24))
    assert split.held_out
    assert not set(taken(split.for_comparison())) & set(calibrated)


def test_dealing_gives_the_same_parts_as_a_calibration():
    """Where statistics are given, corrections still see what would have calibrated, and comparisons the rest."""
    x = np.arange(60, dtype=np.float32)[:, None].repeat(3, 1)
    run, dealt = (Split(opened(OPEN, {"x": x})) for _ in range(2))
    list(run)
    dealt.deal()
    assert taken(dealt.seen) == taken(run.seen)
    assert taken(dealt.for_comparison()) == taken(run.for_comparison())


def test_without_calibration_all_is_compared_on():
    split = Split(opened(OPEN, {"x": rows(40)}))
    assert sum(batch.samples for batch in split.for_comparison()) == 40
    assert not split.held_out
