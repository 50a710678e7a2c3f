"""One pass over the data: whatever the batches, threads, interruptions and shards, the statistics are the same."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest

import qdq_surgeon
from qdq_surgeon import pipeline
from qdq_surgeon.calibration import collection, taps
from qdq_surgeon.calibration.collection import Checkpoint, collect, fingerprint
from qdq_surgeon.calibration.feeds import Batch, read_data
from qdq_surgeon.calibration.ranges import range_method
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.calibration.statistics import Statistics, merged
from qdq_surgeon.errors import DataError, QdqError
from qdq_surgeon.model import load
from tests.graphs import model

CONV_RELU = """g (float[N,3,8,8] x) => (y) <float[16,3,3,3] w, float[16] b, float[16,16,3,3] v> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    y = Conv(r, v)
}"""
ATTENTION = """g (float[N,L,32] x) => (y) <float[32,32] q, float[32,32] k, float[32,32] v> {
    a = MatMul(x, q)
    b = MatMul(x, k)
    bt = Transpose<perm=[0,2,1]>(b)
    s = MatMul(a, bt)
    p = Softmax<axis=-1>(s)
    c = MatMul(x, v)
    y = MatMul(p, c)
}"""
TABLE = "g (int64[N] ids) => (y) <float[4,8] table> { y = Gather(table, ids) }"


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def cut(array, size):
    return [array[start : start + size] for start in range(0, len(array), size)]


# ---- Batches ---------------------------------------------------------------------------------------------------------


def test_batches_of_any_size_give_the_same_thresholds():
    """The last batch is ragged for 3 and 8."""
    x = images(100)
    assert_same_thresholds(CONV_RELU, {size: cut(x, size) for size in (1, 3, 8, 100)}, ["x", "c", "r", "y"])


def test_so_do_batches_of_sequences_of_any_length():
    random = np.random.default_rng(0)
    lengths = sorted(random.integers(1, 40, 30))
    sentences = [random.standard_normal((3, length, 32)).astype(np.float32) for length in lengths]
    data = {size: [part for three in sentences for part in cut(three, size)] for size in (1, 2, 3)}
    data["shuffled"] = [data[2][index] for index in random.permutation(len(data[2]))]
    assert_same_thresholds(ATTENTION, data, ["x", "a", "b", "bt", "s", "p", "c", "y"])


@pytest.mark.parametrize("at_once", [0, 1 << 12, 1 << 18])
def test_how_many_samples_are_fed_together_does_not_matter(at_once, monkeypatch):
    expected = statistics(CONV_RELU, {"x": images(20)})
    monkeypatch.setattr(taps, "RUN_ELEMENTS", at_once)
    assert_same(statistics(CONV_RELU, {"x": images(20)}), expected)


@pytest.mark.parametrize("at_once", [0, 1 << 18])
def test_epochs_count_batches_however_few_samples_are_fed_together(at_once, monkeypatch):
    """Batch 0, batches 1 and 2, 3 to 6, and so on: the largest value of each."""
    monkeypatch.setattr(taps, "RUN_ELEMENTS", at_once)
    data = [{"x": np.full((2, 3, 8, 8), index, np.float32)} for index in range(9)]
    found = statistics(CONV_RELU, data).tensors
    assert found["x"].growth[:5].tolist() == [0, 2, 6, 8, 0]
    assert found["r"].growth[3] == found["r"].amax > found["r"].growth[0]


def assert_same_thresholds(text, data, names):
    """Counts and ranges are equal, but for the rounding of kernels that compute other shapes in another order."""
    every = [statistics(text, [{"x": part} for part in parts], names).tensors for parts in data.values()]
    for name, others in itertools.product(names, every[1:]):
        one, other = every[0][name], others[name]
        assert (one.count, one.non_finite) == (other.count, other.non_finite)
        assert (one.minimum, one.maximum) == pytest.approx((other.minimum, other.maximum), rel=1e-5, abs=1e-6)
        for method in ("max", "mse", "percentile:99.9", "entropy"):
            assert range_method(method)(one) == pytest.approx(range_method(method)(other), rel=2 ** (1 / 128) - 1)


# ---- Progress and threads --------------------------------------------------------------------------------------------


def test_progress_is_told_after_every_batch():
    told = []
    statistics(CONV_RELU, {"x": images(12)}, progress=lambda *step: told.append(step))
    assert told == [("calibrate", 8, 12), ("calibrate", 12, 12)]


def test_progress_knows_no_total_where_the_data_have_none():
    told = []
    statistics(CONV_RELU, ({"x": part} for part in cut(images(5), 2)), progress=lambda *step: told.append(step))
    assert told == [("calibrate", 2, None), ("calibrate", 4, None), ("calibrate", 5, None)]


def test_a_buffer_that_is_filled_anew_for_every_batch_gives_every_batch_its_values():
    x, buffer = images(64), np.zeros((2, 3, 8, 8), np.float32)

    def refilled():
        for part in cut(x, 2):
            buffer[:] = part
            yield {"x": buffer}

    assert_same(statistics(CONV_RELU, refilled()), statistics(CONV_RELU, ({"x": part} for part in cut(x, 2))))


class MineError(Exception):
    pass


def endless(part):
    return ({"x": part} for _ in itertools.count())


def fails_in_the_fourth(parts, error):
    yield from itertools.islice(parts, 3)
    raise error


@pytest.mark.parametrize("error", [MineError, KeyboardInterrupt])
def test_what_the_data_raise_comes_through_and_no_thread_survives(error):
    before = threading.active_count()
    with pytest.raises(error):
        statistics(CONV_RELU, fails_in_the_fourth(endless(images(1)), error))
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [MineError, KeyboardInterrupt])
def test_what_progress_raises_stops_the_run_and_no_thread_survives(error):
    before = threading.active_count()
    with pytest.raises(error):
        statistics(CONV_RELU, endless(images(1)), progress=interrupted_at(3, error))
    assert threading.active_count() == before


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_what_onnxruntime_refuses_comes_through_before_many_more_batches_are_read(bad):
    """Indices beyond the table, in a stream without an end."""
    taken, before = itertools.count(), threading.active_count()
    data = ({"ids": np.full(4, 9 if next(taken) == bad else 1)} for _ in itertools.count())
    with pytest.raises(DataError, match=r"onnxruntime cannot run the model on the data: .*indices"):
        statistics(TABLE, data, ["y"])
    assert next(taken) <= bad + 2 * (os.cpu_count() or 1) + 2
    assert threading.active_count() == before


def test_the_data_are_read_little_ahead():
    """However many they are, only what is being counted is held."""
    taken, ahead = [], []
    data = ({"x": taken.append(1) or images(1)} for _ in range(40))
    statistics(CONV_RELU, data, progress=lambda stage, done, total: ahead.append(len(taken) - done))
    assert max(ahead) <= 2 * (os.cpu_count() or 1) + 2


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_a_limit_that_cannot_be_kept_is_said_once_and_changes_no_result(caplog, monkeypatch):
    expected = statistics(CONV_RELU, {"x": images(20)})
    monkeypatch.setattr(taps, "LEAST_BYTES", 1)
    monkeypatch.setattr(taps, "RUN_ELEMENTS", 0)
    found = statistics(CONV_RELU, {"x": images(20)}, memory=1)
    (record,) = caplog.records
    assert "more than the 0 MB allowed" in record.getMessage()
    for name, statistic in found.tensors.items():
        assert statistic.count == expected.tensors[name].count
        assert range_method("mse")(statistic) == pytest.approx(range_method("mse")(expected.tensors[name]), rel=0.006)


def test_a_limit_that_is_kept_is_not_spoken_of(caplog):
    assert_same(statistics(CONV_RELU, {"x": images(8)}, memory=64 << 30), statistics(CONV_RELU, {"x": images(8)}))
    assert not caplog.records


def test_limit_and_provider_reach_the_session(folder, caplog):
    calibrated(memory=1)
    assert "MB allowed" in caplog.text
    with pytest.raises(QdqError, match="unknown provider 'cdua'"):
        calibrated(provider="cdua")


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def prints(*parts, **others):
    """The sum of what these batches leave, as a run adds it up."""
    along = frozenset({"x"})
    return sum(fingerprint(Batch({"x": part} | others, len(part), along)) for part in parts) % (1 << 256)


def test_a_fingerprint_depends_neither_on_the_cut_nor_on_the_order():
    x = images(7)
    assert prints(x) == prints(x[:3], x[3:]) == prints(x[6:], x[:6]) == prints(*(x[i : i + 1] for i in range(7)))
    assert prints(x, mask=np.ones((1, 8))) == prints(x[:3], x[3:], mask=np.ones((1, 8)))


def test_a_fingerprint_speaks_of_values_types_shapes_and_names():
    x = images(3)
    changed = x.copy()
    changed[0, 0, 0, 0] += 1
    different = [x, changed, x[:2], np.concatenate([x, x[:1]]), x.astype(np.float16), x.reshape(3, 8, 3, 8), -x]
    assert len({prints(one) for one in different}) == len(different)
    assert prints(x, a=x[0]) != prints(x, b=x[0])


def test_a_fingerprint_does_not_speak_of_how_arrays_are_stored():
    x = images(3)
    assert prints(x) == prints(np.asfortranarray(x)) == prints(np.repeat(x, 2, axis=3)[..., ::2])


def test_a_batch_that_cannot_be_cut_is_marked_as_a_whole():
    x = images(4)
    assert fingerprint(Batch({"x": x}, 4)) != prints(x)


# ---- Interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model and data in the working folder, and checkpoints after every piece."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collection, "CHECKPOINT_SECONDS", 0)
    onnx.save(model(CONV_RELU), "model.onnx")
    np.savez("data.npz", x=images(70))
    return tmp_path


def calibrated(data="data.npz", source="model.onnx", **options):
    return qdq_surgeon.calibrate(source, qdq_surgeon.plan(source), data, **options)


def interrupted_at(samples, error=KeyboardInterrupt):
    def progress(stage, done, total):
        if done >= samples:
            raise error

    return progress


def interrupt(after, error=KeyboardInterrupt, **options):
    with pytest.raises(error):
        calibrated(checkpoint="run.npz", progress=interrupted_at(after, error), **options)


KILLED = """
    import os, signal, sys
    import qdq_surgeon
    from qdq_surgeon.calibration import collection, taps

    collection.CHECKPOINT_SECONDS, taps.RUN_ELEMENTS = 0, int(sys.argv[2])

    def progress(stage, done, total):
        if done >= int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    plan = qdq_surgeon.plan("model.onnx")
    qdq_surgeon.calibrate("model.onnx", plan, "data.npz", checkpoint="run.npz", progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing kills like SIGKILL here")
@pytest.mark.parametrize(("samples", "at_once"), [(30, 1 << 18), (21, 0)])
def test_a_killed_run_that_is_resumed_gives_the_bytes_of_an_uninterrupted_one(samples, at_once, folder, monkeypatch):
    """In the middle of a batch too, where samples are fed one by one."""
    monkeypatch.setattr(taps, "RUN_ELEMENTS", at_once)
    expected = calibrated().to_bytes()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(samples), str(at_once)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    counted = Statistics.load("run.npz").origin.samples
    assert 0 < counted < 70
    told = []
    resumed = calibrated(checkpoint="run.npz", resume=True, progress=lambda stage, done, total: told.append(done))
    assert resumed.to_bytes() == expected
    assert min(told) > counted
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "model.onnx", "run.npz"]


@pytest.mark.parametrize("at_once", [1 << 18, 0])
@pytest.mark.parametrize("method", [None, "max"])
def test_so_does_an_interrupted_run_however_often(method, at_once, folder, monkeypatch):
    monkeypatch.setattr(taps, "RUN_ELEMENTS", at_once)
    monkeypatch.setattr(collection, "CHECKPOINT_SECONDS", 3600)
    options = {"data": {"x": images(200)}, "method": method}
    expected = calibrated(**options).to_bytes()
    for samples in (1, 20, 61):
        interrupt(samples, resume=True, **options)
    assert calibrated(checkpoint="run.npz", resume=True, **options).to_bytes() == expected


def test_an_interrupt_from_the_data_keeps_what_was_counted(folder):
    def parts():
        yield from ({"x": part} for part in cut(images(70), 8)[:4])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(parts(), checkpoint="run.npz")
    assert Statistics.load("run.npz").origin.samples == 32
    again = ({"x": part} for part in cut(images(70), 8))
    resumed, expected = calibrated(again, checkpoint="run.npz", resume=True), calibrated()
    assert_same(resumed, replace(expected, origin=replace(expected.origin, sources=resumed.origin.sources)))


def test_an_error_leaves_the_last_checkpoint_as_it_was(folder):
    interrupt(30, MineError)
    assert 0 < Statistics.load("run.npz").origin.samples < 30
    assert calibrated(checkpoint="run.npz", resume=True).to_bytes() == calibrated().to_bytes()


def test_a_run_that_was_killed_at_its_very_end_counts_nothing_again(folder, monkeypatch):
    expected = calibrated()
    expected.save("run.npz")
    monkeypatch.setattr(collection._Run, "count", None)
    assert calibrated(checkpoint="run.npz", resume=True).to_bytes() == expected.to_bytes()


def test_more_samples_than_were_asked_for_first_are_added(folder):
    interrupt(8, samples=20)
    assert calibrated(checkpoint="run.npz", resume=True, samples=60).to_bytes() == calibrated(samples=60).to_bytes()


def test_without_resume_a_run_starts_anew(folder):
    interrupt(30)
    told = []
    calibrated(checkpoint="run.npz", progress=lambda stage, done, total: told.append(done))
    assert told[0] == 8


def test_resume_without_a_checkpoint_starts_anew(folder):
    assert calibrated(checkpoint="run.npz", resume=True).to_bytes() == calibrated().to_bytes()


def test_no_checkpoint_is_written_before_it_is_due(folder, monkeypatch):
    monkeypatch.setattr(collection, "CHECKPOINT_SECONDS", 3600)
    monkeypatch.setattr(Checkpoint, "write", None)
    calibrated(checkpoint="run.npz")


OTHER_DATA = "the data differ from those of the interrupted run: leave --resume out to start anew"
OTHER_RUN = "the checkpoint is of another model or other options: leave --resume out to start anew"
OTHERWISE = {
    "other values": ({"data": {"x": images(70) + 1}}, OTHER_DATA),
    "fewer samples": ({"samples": 10}, OTHER_DATA),
    "another order": ({"data": {"x": images(70)[::-1]}}, OTHER_DATA),
    "another shard": ({"shard": (2, 2)}, OTHER_DATA),
    "another model": ({"source": model(CONV_RELU.replace("Relu(c)", "Sigmoid(c)"))}, OTHER_RUN),
    "ranges only": ({"method": "max"}, OTHER_RUN),
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_a_run_is_not_resumed_with_other_data_or_options(change, folder):
    interrupt(30)
    kept = (folder / "run.npz").read_bytes()
    options, message = OTHERWISE[change]
    with pytest.raises(DataError) as error:
        calibrated(checkpoint="run.npz", resume=True, **options)
    assert str(error.value) == message
    assert (folder / "run.npz").read_bytes() == kept


def test_a_run_is_not_resumed_with_another_placement(folder):
    interrupt(30)
    plan = qdq_surgeon.plan("model.onnx", exclude="y")
    with pytest.raises(DataError, match="of another model or other options"):
        qdq_surgeon.calibrate("model.onnx", plan, "data.npz", checkpoint="run.npz", resume=True)


def test_a_run_of_ranges_is_not_resumed_for_histograms(folder):
    interrupt(30, method="max")
    with pytest.raises(DataError, match="of another model or other options"):
        calibrated(checkpoint="run.npz", resume=True)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[:-50]])
def test_a_corrupt_checkpoint_is_one_clear_error(damage, folder):
    interrupt(30)
    path = folder / "run.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"run.npz holds no statistics") as error:
        calibrated(checkpoint=path, resume=True)
    assert "\n" not in str(error.value)


# ---- Shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_shards_merged_are_the_whole(number, folder):
    """But for the epochs, which are those of each run."""
    parts = [calibrated(shard=(index + 1, number)) for index in range(number)]
    assert_same(merged(parts[::-1]), calibrated())


def test_the_same_shard_twice_is_refused(folder):
    parts = [calibrated(shard=(index, 3)) for index in (1, 2, 1)]
    with pytest.raises(DataError, match=r"data.npz are there twice"):
        merged(parts)


def test_a_shard_of_nothing_says_so(folder):
    with pytest.raises(DataError, match=r"data.npz \(shard 20/20\) holds no samples"):
        calibrated(shard=(20, 20))


# ---- What else the pass serves ---------------------------------------------------------------------------------------


def test_the_largest_value_of_every_activation_leaves_infinity_out():
    """A mask of -inf is exact in FP16."""
    loaded = load(model("g (float[N,4] x) => (y) { a = Log(x)\n b = Abs(x)\n y = Add(a, b) }"))
    x = np.array([[0, 1, 2, 3], [4, 5, 6, 100]], np.float32)
    found = pipeline._largest(loaded, read_data({"x": x}, loaded).batches)
    assert found == pytest.approx({"a": np.log(100), "b": 100, "y": 100 + np.log(100)})


# ---- Helpers ---------------------------------------------------------------------------------------------------------


def statistics(text, data, names=("x", "c", "r", "y"), **options):
    loaded = load(model(text))
    return collect(loaded, names, Split(read_data(data, loaded), hold_out=False), **options)


def assert_same(one, other):
    """Equal in everything but the epochs of their runs, bit for bit."""
    assert (one.model_digest, one.origin) == (other.model_digest, other.origin)
    assert one.tensors.keys() == other.tensors.keys()
    for name, statistic in one.tensors.items():
        bare, like = (replace(found, growth=np.zeros(1)) for found in (statistic, other.tensors[name]))
        assert repr(bare) == repr(like)
        np.testing.assert_array_equal(bare.histogram, like.histogram)
