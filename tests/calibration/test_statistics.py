"""Statistics merge exactly, in any order and grouping, and files keep them; and what thresholds lose by buckets."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import operator
import pickle

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qdq_surgeon.calibration.collection import collect
from qdq_surgeon.calibration.counting import Accumulator
from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.calibration.ranges import range_method
from qdq_surgeon.calibration.split import Split
from qdq_surgeon.calibration.statistics import EPOCHS, FORMAT, Origin, Statistic, Statistics, merged
from qdq_surgeon.errors import DataError, ModelError, PlanError
from qdq_surgeon.model import load

# ---- Merging ---------------------------------------------------------------------------------------------------------

floats = arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@settings(deadline=None, max_examples=60)
@given(floats, floats, floats)
def test_merging_is_associative_commutative_and_equal_to_one_pass(a, b, c):
    x, y, z = counted(a), counted(b), counted(c)
    whole = exactly(counted(a, b, c))
    for together in (x | y | z, x | (y | z), z | y | x, (z | x) | y):
        assert exactly(together) == whole


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_shards_merge_to_equal_bytes_in_any_order_and_grouping(shards, random):
    parts = [shard(index, t=values, u=others) for index, (values, others) in enumerate(shards)]
    whole = merged(parts).to_bytes()
    random.shuffle(parts)
    middle = random.randrange(1, len(parts))
    grouped = functools.reduce(operator.or_, parts[:middle]) | functools.reduce(operator.or_, parts[middle:])
    assert merged(parts).to_bytes() == grouped.to_bytes() == whole


def test_merged_shards_are_those_of_one_pass():
    values = [random(seed).standard_normal(1000).astype(np.float32) for seed in range(4)]
    whole = counted(*values)
    together = merged([shard(index, t=array) for index, array in enumerate(values)])
    assert exactly(together.tensors["t"]) == exactly(whole)


def test_the_epochs_of_runs_are_merged_by_their_largest_values():
    early, late = (Statistic(0, 1, 1, 0, None, np.eye(EPOCHS)[epoch]) for epoch in (1, 2))
    assert (early | late).growth[:4].tolist() == [0, 1, 1, 0]


def test_where_one_holds_ranges_only_so_does_the_whole():
    bare, full = counted(np.float32([1]), ranges_only=True), counted(np.float32([-2, 3]))
    for together in (bare | full, full | bare):
        assert (together.minimum, together.maximum, together.count, together.histogram) == (-2, 3, 3, None)


def test_merging_leaves_both_parts_as_they_were():
    x, y = counted(np.float32([1])), counted(np.float32([2]))
    before = exactly(x), exactly(y)
    x | y
    assert (exactly(x), exactly(y)) == before


def test_origins_are_merged_in_any_order():
    a = Origin(("b.npz",), "ff" * 32, 3)
    b = Origin(("a.npz", "c.npz"), "00" * 31 + "02", 4, synthetic=True)
    assert a | b == b | a == Origin(("a.npz", "b.npz", "c.npz"), "00" * 31 + "01", 7, synthetic=True)
    assert (a | b).data == "a.npz + b.npz + c.npz"


def test_statistics_of_another_model_are_refused():
    with pytest.raises(PlanError, match="belong to different models"):
        shard(0, t=[1]) | shard(1, "another model", t=[1])


def test_statistics_of_another_plan_are_refused():
    for other in (shard(1, t=[1], u=[1]), shard(1, u=[1])):
        for together in (lambda a, b: a | b, lambda a, b: b | a):
            with pytest.raises(PlanError, match=r"lack '[tu]': calibrate all with one placement"):
                together(shard(0, t=[1]), other)


def test_the_same_shard_twice_is_refused():
    one, two, three = (shard(index, t=[index]) for index in range(3))
    for parts in itertools.permutations([one, two, one, three]):
        with pytest.raises(DataError, match=r"the same samples of shard 0 are there twice: merge each part once"):
            merged(list(parts))
    with pytest.raises(DataError, match="twice"):
        one | one


# ---- Files -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(floats, floats, st.booleans())
def test_what_was_saved_is_read_again(tmp_path_factory, a, b, ranges_only):
    tensors = {"t/1:0": counted(a, ranges_only=ranges_only), "ä": counted(b), "": counted()}
    statistics = Statistics(tensors, "m", Origin(("x.npz", "y"), "ab", 9, True))
    path = tmp_path_factory.mktemp("kept") / "stats"
    statistics.save(path)
    read = Statistics.load(path)
    assert {name: exactly(statistic) for name, statistic in read.tensors.items()} == {
        name: exactly(statistic) for name, statistic in tensors.items()
    }
    assert (read.model_digest, read.origin) == (statistics.model_digest, statistics.origin)
    assert read.to_bytes() == statistics.to_bytes() == path.read_bytes()


def test_equal_statistics_give_equal_bytes_whatever_the_order_of_their_tensors():
    x, y = counted(np.float32([1])), counted(np.float32([2]))
    origin = Origin(("d",), "0", 1)
    assert Statistics({"a": x, "b": y}, "m", origin).to_bytes() == Statistics({"b": y, "a": x}, "m", origin).to_bytes()


def test_no_tensors_at_all_are_kept_too(tmp_path):
    Statistics({}, "m", Origin((), "", 0)).save(tmp_path / "none.npz")
    assert Statistics.load(tmp_path / "none.npz").tensors == {}


def test_a_file_of_a_hundred_tensors_is_small():
    values = random().standard_normal(100_000).astype(np.float32)
    statistics = Statistics({f"t{i}": counted(values * (i + 1)) for i in range(100)}, "m", Origin(("d",), "0", 1))
    assert len(statistics.to_bytes()) < 100 * 6_000


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be written"):
        shard(0, t=[1]).save(tmp_path / "no folder" / "stats.npz")


def an_npz(**arrays):
    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write


def of_another_version(path):
    with np.load(shard_file(path)) as archive:
        held = {name: archive[name] for name in archive.files}
    held["about"] = np.array(json.dumps(json.loads(str(held["about"])) | {"format": FORMAT + 1}))
    an_npz(**held)(path)


def cut_short(path):
    path.write_bytes(shard_file(path).read_bytes()[:-100])


def shard_file(path):
    shard(0, t=random().standard_normal(1000)).save(path)
    return path


NOT_STATISTICS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("minimum, maximum"),
    "calibration data": an_npz(x=np.zeros((2, 3))),
    "an array": lambda path: path.write_bytes(np.lib.format.magic(1, 0)),
    "code": lambda path: path.write_bytes(pickle.dumps(print)),
    "cut short": cut_short,
}


@pytest.mark.parametrize("kind", NOT_STATISTICS)
def test_any_other_file_is_one_clear_error(kind, tmp_path):
    path = tmp_path / "stats.npz"
    NOT_STATISTICS[kind](path)
    with pytest.raises(DataError, match=r"stats.npz holds no statistics: make them with `qdq-surgeon calibrate -o`"):
        Statistics.load(path)


def test_no_changed_byte_goes_unnoticed(tmp_path):
    """Where it lies in what no reader of archives needs, the statistics are the same."""
    path = tmp_path / "stats.npz"
    statistics = shard(0, t=random().standard_normal(30))
    data = statistics.to_bytes()
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        with contextlib.suppress(DataError):
            assert Statistics.load(path).to_bytes() == data


def test_a_missing_file_is_one_clear_error(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(DataError, match="no such file of statistics"):
            Statistics.load(path)


def test_statistics_of_another_version_say_so(tmp_path):
    of_another_version(tmp_path / "stats.npz")
    with pytest.raises(DataError, match=r"stats.npz: another version of qdq-surgeon .*: calibrate again"):
        Statistics.load(tmp_path / "stats.npz")


def test_printed_statistics_name_the_data_and_all_ranges():
    together = shard(0, t=[-1.5, 2], u=[0]) | shard(1, t=[3], u=[1])
    assert str(together) == "2 tensors over 2 samples of shard 0 + shard 1\n  t: -1.5 .. 3\n  u: 0 .. 1"


# ---- Thresholds: the histogram against all values --------------------------------------------------------------------

BUCKETS_PER_OCTAVE = 128
SPREAD = 100_000


def values_of(name):
    normal = random(1).standard_normal(SPREAD)
    return {
        "normal": normal,
        "laplace": random(2).laplace(size=SPREAD),
        "half-normal": np.abs(normal),
        "relu": np.maximum(normal, 0),
        "lognormal": random(3).lognormal(size=SPREAD),
        "uniform": random(4).uniform(-1, 1, SPREAD),
        "exponential": random(5).exponential(size=SPREAD),
        "student": random(6).standard_t(3, SPREAD),
        "one outlier": np.append(normal, 30),
        "a thousandth outliers": np.append(normal, random(7).uniform(-20, 20, SPREAD // 1000)),
        "two humps": np.append(normal, 10 + random(8).standard_normal(SPREAD // 100)),
        "gelu": normal / (1 + np.exp(-1.702 * normal)),
        "sigmoid": 1 / (1 + np.exp(-3 * normal)),
        "relu6": np.clip(3 * normal, 0, 6),
    }[name].astype(np.float32)


DISTRIBUTIONS = (
    "normal",
    "laplace",
    "half-normal",
    "relu",
    "lognormal",
    "uniform",
    "exponential",
    "student",
    "one outlier",
    "a thousandth outliers",
    "two humps",
    "gelu",
    "sigmoid",
    "relu6",
)


@pytest.fixture(scope="session")
def recorded():
    """The activations of a few real models over a few samples: name -> the statistic and all values."""
    from tools import zoo

    if not (zoo.DEFAULT_ZOO / "index.json").exists():
        pytest.skip(f"the model zoo is not at {zoo.DEFAULT_ZOO}")
    models = [labelled for labelled in zoo.labelled() if labelled.name != "squeezenet10"]  # large, and slow to sort
    return {f"{one.name} {name}": pair for one in models for name, pair in activations(one).items()}


def activations(labelled, samples=4):
    """Every float tensor that a node makes: its statistic, and its values from a session of onnxruntime's own."""
    import onnxruntime as ort

    loaded = load(labelled.model)
    graph, x = loaded.graph, labelled.calibration[:samples]
    made = [name for node in graph.nodes for name in node.outputs if graph.is_float(name)]
    names = [name for name in made if not graph.is_constant(name)]
    found = collect(loaded, names, Split(read_data({graph.inputs[0]: x}, loaded), hold_out=False))
    tapped = onnx.ModelProto()
    tapped.CopyFrom(loaded.proto)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(tapped.SerializeToString(), options, ["CPUExecutionProvider"])
    runs = [session.run(names, {graph.inputs[0]: x[i : i + 1]}) for i in range(samples)]
    values = [np.concatenate([array.reshape(-1) for array in arrays]) for arrays in zip(*runs, strict=True)]
    return {name: (found.tensors[name], array) for name, array in zip(names, values, strict=True) if array.any()}


def exact_percentile(values, percent):
    """The smallest value that so many percent of all do not exceed; and the next, where exactly so many do not."""
    rank = percent / 100 * values.size
    ranks = [math.ceil(rank - 1e-6), math.floor(rank + 1e-6) + 1]
    return np.sort(np.abs(values.astype(np.float64)))[np.minimum(ranks, values.size) - 1]


def exact_mse(values, candidates):
    """What each threshold costs on the values themselves: the sum of all squared errors."""
    values = np.abs(values[values != 0]).astype(np.float64)
    scales = np.asarray(candidates)[:, None] / 127
    return np.array([np.sum((values - scale * np.minimum(np.rint(values / scale), 127)) ** 2) for scale in scales])


def exact_entropy(values, amax):
    """Every candidate of S. Migacz's algorithm in 2048 bins of |x|, and its divergence."""
    bins = np.histogram(np.abs(values[values != 0]).astype(np.float64), 2048, (0, amax))[0].astype(float)
    total, filled = (np.concatenate([[0], np.cumsum(array)]) for array in (bins, bins > 0))
    widths = np.arange(128, 2049, 8)
    return widths / 2048 * amax, np.array([_divergence(bins, total, filled, width) for width in widths])


def _divergence(bins, total, filled, width):
    edges = np.arange(129) * width // 128
    level = np.diff(total[edges]) / np.maximum(np.diff(filled[edges]), 1)
    p, q = bins[:width].copy(), np.repeat(level, np.diff(edges)) * (bins[:width] > 0)
    p[-1] += total[-1] - total[width]
    if not q.any():
        return np.inf
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
    return np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))


def buckets_between(one, other):
    return abs(math.log2(one / other)) * BUCKETS_PER_OCTAVE


def check_max(statistic, values):
    assert range_method("max")(statistic) == pytest.approx(np.abs(values).max(), rel=1e-5)


def check_percentile(statistic, values, percent):
    """Both lie in one bucket, so less than a bucket apart; among zeros the method keeps the full range."""
    low, high = exact_percentile(values, percent)
    if low:
        bucket = 2.0 ** (math.floor(math.log2(low)) - 7)
        assert low - bucket <= range_method(f"percentile:{percent}")(statistic) <= high + bucket


def check_mse(statistic, values):
    """The same candidate or its neighbour, a bucket off; or, where the minimum is flat, one that costs hardly more."""
    ours = range_method("mse")(statistic)
    coarse = statistic.amax * 2.0 ** (-np.arange(0, 8, 1 / 16))
    fine = ours * 2.0 ** (np.arange(-64, 65) / BUCKETS_PER_OCTAVE)
    candidates = np.concatenate([coarse, fine[fine <= statistic.amax * 1.000_001]])
    errors = exact_mse(values, candidates)
    is_near = buckets_between(ours, candidates[errors.argmin()]) < 1.01
    assert is_near or exact_mse(values, [ours])[0] < 1.02 * errors.min()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_max_is_exact(name):
    assert range_method("max")(counted(values_of(name))) == np.abs(values_of(name)).max()


@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99, 99.999, 100])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_percentile_lies_less_than_one_bucket_from_the_exact_one(name, percent):
    check_percentile(counted(values_of(name)), values_of(name), percent)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_chooses_the_best_candidate_or_the_next(name):
    values = values_of(name)
    check_mse(counted(values), values)


def test_thresholds_of_recorded_activations_lie_within_a_bucket_of_the_exact_ones(recorded):
    """But for the MSE of pixels: a bucket holds one integer there, and cannot tell it from a half."""
    for statistic, values in recorded.values():
        check_max(statistic, values)
        if not np.array_equal(values, np.rint(values)):
            check_mse(statistic, values)
        for percent in (99, 99.9, 99.99):
            check_percentile(statistic, values, percent)


def entropies(statistic, values):
    """How many buckets the histogram moves the threshold, and how many leaving out half of the values does."""
    candidates, divergences = exact_entropy(values, statistic.amax)
    exact = candidates[divergences.argmin()]
    halves = [exact_entropy(half, statistic.amax) for half in (values[::2], values[1::2])]
    moved = [buckets_between(exact, thresholds[found.argmin()]) for thresholds, found in halves]
    return buckets_between(range_method("entropy")(statistic), exact), max(moved)


def test_the_histogram_moves_the_entropy_threshold_less_than_half_of_the_values_do():
    """One bucket would be too much to ask: the divergence jumps with every bin of the tail that happens to be empty."""
    moved = np.array([entropies(counted(values_of(name)), values_of(name)) for name in DISTRIBUTIONS])
    assert moved[:, 0].mean() < moved[:, 1].mean()
    assert np.median(moved[:, 0]) < np.median(moved[:, 1])


def test_so_it_does_for_recorded_activations(recorded):
    moved = np.array([entropies(statistic, values) for statistic, values in list(recorded.values())[::3]])
    assert moved[:, 0].mean() < moved[:, 1].mean()
    assert np.median(moved[:, 0]) < np.median(moved[:, 1])


# ---- Helpers ---------------------------------------------------------------------------------------------------------


def random(seed=0):
    return np.random.default_rng(seed)


def counted(*pieces, ranges_only=False):
    accumulator = Accumulator(ranges_only)
    for batch, piece in enumerate(pieces):
        accumulator.add(piece, batch)
    return accumulator.result()


def shard(index, model="a model", **tensors):
    """The statistics of one of several runs: of other data each."""
    statistics = {name: counted(np.asarray(values, np.float32)) for name, values in tensors.items()}
    return Statistics(statistics, model, Origin((f"shard {index}",), hashlib.sha256(bytes([index])).hexdigest(), 1))


def exactly(statistic):
    """All figures of a statistic but for the epochs, which belong to a run, bit for bit."""
    histogram = None if statistic.histogram is None else statistic.histogram.tobytes()
    return repr((statistic.minimum, statistic.maximum)), statistic.count, statistic.non_finite, histogram
