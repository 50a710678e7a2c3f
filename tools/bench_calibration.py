"""What calibration costs, as a ratio to the float model's forward pass, beside onnxruntime's calibrators and ModelOpt.

    python tools/bench_calibration.py FOLDER      (FOLDER: made by make_networks.py --dynamic-batch)

The floor is onnxruntime running the float model in batches of 8 and throwing the outputs away. A whole job starts with
the model's file and ends with ranges (ours: load, plan, calibrate, choose). What one further sample costs is the
difference between two whole jobs of different sizes, so whatever happens once cancels out. Peak memory is that of the
whole process. Every measurement has a process of its own; imports and the making of data are not timed. Every side is
measured between two runs of the floor and divided by these; the sides' order is shuffled in every round. Shown are the
median and the extremes of all rounds, and the ratio of the fastest runs, which suffers least on a busy machine. The
extremes of the floor, against its own median, tell how busy it was.

onnxruntime's calibrators are held to the tensors that our plan observes; else they keep their defaults, except for
99.99 as percentile. ModelOpt chooses its tensors itself, and its whole job includes writing the quantized model.
The kernel is asked to end a measurement, and no other program, where memory runs out; the table then says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import qdq_surgeon

Feed: TypeAlias = dict[str, NDArray[np.float32]]

INPUT, BATCH, POOL = "x", 8, 4
"""The name that make_networks.py gives the input; samples in a batch; batches made, which take turns."""
FLOOR = "floor"
METHODS = ("max", "mse", "entropy", "percentile:99.99")
WHOLE_LINE = "default line"
"""A side of ours beside the methods: mse, insertion and bias correction, which is what quantize does by default."""
PEERS = {"onnxruntime": ("MinMax", "Entropy", "Percentile"), "modelopt": ("max", "entropy")}
MEMORY_SAMPLES = 512
MEMORY_TARGET = 384
CHILD = "measure-one-job"
HEADS = ("side", "whole job", "fastest", "a further sample", "fastest", "from samples", "peak MB", "over the floor")


class Network(NamedTuple):
    """One sample's shape, and what a further sample should cost at most: by max, and by a method that counts."""

    shape: tuple[int, ...]
    max_target: float
    histogram_target: float


NETWORKS = {
    "resnet50": Network((3, 224, 224), 1.6, 2.2),
    "mobilenet_v2": Network((3, 224, 224), 2.2, 3.0),
    "encoder": Network((128, 512), 1.6, 2.2),
}


class JobError(Exception):
    """A measurement came to nothing, and why."""


@dataclass(frozen=True)
class Job:
    """What one process does. `tensors`: those that the plan observes."""

    model: str
    side: str
    samples: int = 0
    tensors: tuple[str, ...] = ()

    @property
    def feeds(self) -> Iterator[Feed]:
        """Standard normal numbers; all are made before the first batch is asked for."""
        generator = np.random.default_rng(0)
        shape = (BATCH, *NETWORKS[Path(self.model).stem].shape)
        pool = [{INPUT: generator.standard_normal(shape, dtype=np.float32)} for _ in range(POOL)]
        return (pool[index % POOL] for index in range(self.samples // BATCH))


@dataclass(frozen=True)
class Cost:
    """Seconds of the whole job, and the largest resident size of its process in bytes."""

    seconds: float
    peak: int


Bout: TypeAlias = dict[tuple[str, int], Cost]
"""A side and the floor, measured one right behind the other: their costs by side and samples."""


@dataclass
class Runs:
    """Everything measured of one network: the bouts of each side, one a round; large jobs; why a side was given up."""

    bouts: dict[str, list[Bout]]
    large: Bout = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The figures of one side, one for each bout: ratios to the floor, and bytes. `counts` gave a further sample."""

    side: str
    counts: tuple[int, int]
    whole: list[float]
    whole_fastest: list[float]
    further: list[float]
    further_fastest: list[float]
    peak: list[int]
    over: list[int]
    memory_peak: list[int]
    memory_over: list[int]


# In the process of one measurement. Each side imports what it needs, then returns the job to be timed.


def floor(job: Job, method: str) -> Callable[[], object]:
    feeds = job.feeds

    def run() -> None:
        session = ort.InferenceSession(job.model, providers=["CPUExecutionProvider"])
        for feed in feeds:
            session.run(None, feed)

    return run


def ours(job: Job, method: str) -> Callable[[], object]:
    import qdq_surgeon.pipeline

    feeds = job.feeds
    if method == WHOLE_LINE:
        return lambda: qdq_surgeon.quantize(job.model, feeds, samples=job.samples, compare=False)

    def run() -> object:
        model = qdq_surgeon.load(job.model)
        plan = qdq_surgeon.plan(model)
        found = qdq_surgeon.calibrate(model, plan, feeds, method=method)
        return qdq_surgeon.choose(model, plan, found, method)

    return run


def by_onnxruntime(job: Job, method: str) -> Callable[[], object]:
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization.calibrate import CalibraterBase, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feeds: Iterator[Feed]) -> None:
            self._feeds = feeds

        def get_next(self) -> Any:
            return next(self._feeds, None)

    all_tensors = CalibraterBase.select_tensors_to_calibrate

    def same_tensors(self: Any, model: Any) -> Any:
        found, types = all_tensors(self, model)
        return found & set(job.tensors), types

    CalibraterBase.select_tensors_to_calibrate = same_tensors
    model, reader = _copy(job.model), Reader(job.feeds)

    def run() -> object:
        kind, options = CalibrationMethod[method], {"percentile": 99.99}
        calibrator = create_calibrator(model, calibrate_method=kind, extra_options=options)
        calibrator.collect_data(reader)
        return calibrator.compute_data()

    return run


def by_modelopt(job: Job, method: str) -> Callable[[], object]:
    from modelopt.onnx.quantization import quantize

    model, data = _copy(job.model), np.concatenate([feed[INPUT] for feed in job.feeds])
    shape = "x".join(map(str, (BATCH, *data.shape[1:])))

    def run() -> object:
        return quantize(
            str(model),
            quantize_mode="int8",
            calibration_data={INPUT: data},
            calibration_method=method,
            calibration_shapes=f"{INPUT}:{shape}",
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path="quantized.onnx",
            log_level="ERROR",
        )

    return run


SIDES = {FLOOR: floor, "ours": ours, "onnxruntime": by_onnxruntime, "modelopt": by_modelopt}


def child() -> None:
    """Do the job that stands on standard input; the last line of standard output is its result as JSON."""
    job = Job(**json.load(sys.stdin))
    print(json.dumps(observed(job) if job.side == "plan" else asdict(measure(job))))


def measure(job: Job) -> Cost:
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    side, _, method = job.side.partition(" ")
    run = SIDES[side](job, method)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def observed(job: Job) -> dict[str, Any]:
    """The tensors that the plan observes, how many of them onnxruntime knows, and how many it would take by itself."""
    from onnxruntime.quantization.calibrate import CalibraterBase

    from qdq_surgeon.scales import tensors_to_calibrate

    dims = ort.InferenceSession(job.model, providers=["CPUExecutionProvider"]).get_inputs()[0].shape
    if isinstance(dims[0], int):
        sys.exit(f"{job.model} takes batches of {dims[0]} only: export it with make_networks.py --dynamic-batch")
    tensors = tensors_to_calibrate(qdq_surgeon.plan(job.model))
    peer = CalibraterBase(_copy(job.model))
    alone, _ = peer.select_tensors_to_calibrate(peer.model)
    return {"tensors": tensors, "known": len(alone & set(tensors)), "alone": len(alone)}


def _copy(model: str) -> Path:
    """A copy in the working folder, for those who write beside the model."""
    return Path(shutil.copy(model, "."))


# In the process that asks for the measurements.


def main() -> int:
    options = _options()
    wrong = _wrong(options)
    if wrong:
        return _refuse(wrong)
    try:
        plans = {name: ask(Job(str(_model(options, name)), "plan")) for name in options.networks}
    except JobError as error:
        return _refuse(str(error))
    facts = _facts()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: dict[str, Any] = {}
    for name, plan in plans.items():
        runs = bench(str(_model(options, name)), tuple(plan["tensors"]), options)
        rows = [_floor_row(runs, options), *(_row(side, runs, options) for side in _sides(options))]
        print("\n".join(_lines(name, plan, rows, runs, options)), flush=True)
        results[name] = {"rows": [asdict(row) for row in rows], **_as_json(runs)}
        if options.json:
            options.json.write_text(json.dumps({"facts": facts, "networks": results}, indent=1) + "\n")
    return 0


def bench(model: str, tensors: tuple[str, ...], options: argparse.Namespace) -> Runs:
    """One bout for each side in each round; a side that failed once is left alone."""
    sides = _sides(options)
    runs = Runs({side: [] for side in sides})
    schedule = [(i + 1, side) for i in range(options.repeats) for side in random.Random(i).sample(sides, len(sides))]
    for number, side in schedule:
        if side in runs.failures:
            continue
        print(f"{Path(model).stem}: round {number} of {options.repeats}: {side}", file=sys.stderr, flush=True)
        few, many = (Job(model, side, count, tensors) for count in _counts(side, options))
        first, last = Job(model, FLOOR, options.samples), Job(model, FLOOR, options.more_samples)
        runs.bouts[side].append({})
        _fill(runs, runs.bouts[side][-1], side, (first, few, many, last))
    if options.memory_runs:
        print(f"{Path(model).stem}: {MEMORY_SAMPLES} samples", file=sys.stderr, flush=True)
    for side in (FLOOR, *sides) if options.memory_runs else ():
        jobs = () if _is_peer(side) or side in runs.failures else (Job(model, side, MEMORY_SAMPLES),)
        _fill(runs, runs.large, side, jobs)
    return runs


def _fill(runs: Runs, bout: Bout, side: str, jobs: Iterable[Job]) -> None:
    for job in jobs:
        try:
            bout[job.side, job.samples] = Cost(**ask(job))
        except JobError as error:
            runs.failures[side] = f"failed at {job.samples} samples: {error}"
            return


def ask(job: Job) -> dict[str, Any]:
    """Have a job done by a fresh process, in a folder that goes away with it."""
    command = [sys.executable, str(Path(__file__).resolve()), CHILD]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, cwd=folder)
    if done.returncode < 0:
        raise JobError(f"ended by signal {-done.returncode} (9 is the kernel's where memory runs out)")
    if done.returncode:
        raise JobError((done.stderr.strip().splitlines() or ["no reason given"])[-1][:300])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _row(side: str, runs: Runs, options: argparse.Namespace) -> Row:
    bouts, (few, many) = runs.bouts[side], _counts(side, options)
    one, base = (side, options.samples), (FLOOR, options.samples)
    whole = _seconds(bouts, one, base)
    further = _seconds(bouts, (side, few), (side, many), base, (FLOOR, options.more_samples))
    samples = many - few, options.more_samples - options.samples
    large = (side, MEMORY_SAMPLES), (FLOOR, MEMORY_SAMPLES)
    return Row(
        side,
        (few, many),
        [mine / floors for mine, floors in whole],
        [mine / floors for mine, floors in _fastest(whole)],
        [_slopes(times, samples) for times in further],
        [_slopes(times, samples) for times in _fastest(further)],
        [cost.peak for (cost,) in _together(bouts, one)],
        [mine.peak - floors.peak for mine, floors in _together(bouts, one, base)],
        [cost.peak for (cost,) in _together([runs.large], large[0])],
        [mine.peak - floors.peak for mine, floors in _together([runs.large], *large)],
    )


def _floor_row(runs: Runs, options: argparse.Namespace) -> Row:
    """The floor beside its own median."""
    few, many = options.samples, options.more_samples
    bouts = [bout for bouts in runs.bouts.values() for bout in bouts]
    whole = [seconds for (seconds,) in _seconds(bouts, (FLOOR, few))]
    further = [after - before for before, after in _seconds(bouts, (FLOOR, few), (FLOOR, many))]
    peak = [cost.peak for (cost,) in _together(bouts, (FLOOR, few))]
    large = [cost.peak for (cost,) in _together([runs.large], (FLOOR, MEMORY_SAMPLES))]
    return Row(FLOOR, (few, many), _by_median(whole), [], _by_median(further), [], peak, [], large, [])


def _together(bouts: Iterable[Bout], *wanted: tuple[str, int]) -> Iterator[tuple[Cost, ...]]:
    """These costs of each bout that has them all."""
    return (tuple(bout[key] for key in wanted) for bout in bouts if all(key in bout for key in wanted))


def _seconds(bouts: Iterable[Bout], *wanted: tuple[str, int]) -> list[tuple[float, ...]]:
    return [tuple(cost.seconds for cost in costs) for costs in _together(bouts, *wanted)]


def _fastest(times: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """One bout made of the fastest run of each kind; none where there were none."""
    return [tuple(min(column) for column in zip(*times, strict=True))] if times else []


def _slopes(times: tuple[float, ...], samples: tuple[int, int]) -> float:
    """A further sample of one side, over one of the floor: two times of each, and the samples between them."""
    before, after, floor_before, floor_after = times
    return (after - before) / samples[0] / ((floor_after - floor_before) / samples[1])


def _by_median(times: Sequence[float]) -> list[float]:
    return [one / statistics.median(times) for one in times]


def _lines(
    name: str, plan: dict[str, Any], rows: Sequence[Row], runs: Runs, options: argparse.Namespace
) -> Iterator[str]:
    """The table of one network, and what a reader has to know about it."""
    goals = NETWORKS[name]
    heads = (*HEADS, f"peak MB, {MEMORY_SAMPLES} samples", "over the floor") if options.memory_runs else HEADS
    yield f"\n## {name}\n"
    yield f"Whole job and peak: {options.samples} samples. Rounds: {options.repeats}.\n"
    yield _markdown(heads)
    yield _markdown(["---"] * len(heads))
    yield from (_markdown(_cells(row, runs)[: len(heads)]) for row in rows)
    yield ""
    yield from (f"- {side} {why}" for side, why in runs.failures.items())
    yield f"- We observe {len(plan['tensors'])} tensors."
    if not options.no_peers:
        yield f"- onnxruntime is held to {plan['known']} of these; it would observe {plan['alone']} by itself."
    yield (
        f"- Targets for ours: a further sample {goals.max_target} by max and {goals.histogram_target} by the other "
        f"methods, peak {MEMORY_TARGET} MB over the floor."
    )


def _cells(row: Row, runs: Runs) -> list[str]:
    failed = "failed" if row.side in runs.failures else "-"
    return [
        row.side,
        *(_spread(found) or failed for found in (row.whole, row.whole_fastest, row.further, row.further_fastest)),
        f"{row.counts[0]}, {row.counts[1]}",
        *(_megabytes(found) or failed for found in (row.peak, row.over, row.memory_peak, row.memory_over)),
    ]


def _markdown(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(ratios: Sequence[float]) -> str:
    """The median, and the extremes where there are several that differ."""
    if not ratios:
        return ""
    low, middle, high = (f"{number:.2f}" for number in (min(ratios), statistics.median(ratios), max(ratios)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _megabytes(sizes: Sequence[int]) -> str:
    return f"{statistics.median(sizes) / 1e6:.0f}" if sizes else ""


def _sides(options: argparse.Namespace) -> list[str]:
    sides = [f"ours {method}" for method in options.methods]
    if options.no_peers:
        return sides
    return [*sides, *(f"{peer} {method}" for peer, methods in PEERS.items() if find_spec(peer) for method in methods)]


def _is_peer(side: str) -> bool:
    return side.partition(" ")[0] in PEERS


def _counts(side: str, options: argparse.Namespace) -> tuple[int, int]:
    """The two sizes whose difference is the cost of further samples. Peers are slow, or keep all activations."""
    few, middle, many = options.peers_samples, options.samples, options.more_samples
    return (few, middle) if _is_peer(side) else (middle, many)


def _facts() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    return {**found, "numba": _version("numba"), "nvidia-modelopt": _version("nvidia-modelopt"), "cores": str(cores)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _as_json(runs: Runs) -> dict[str, Any]:
    bouts = {side: [_costs(bout) for bout in found] for side, found in runs.bouts.items()}
    return {"bouts": bouts, "large": _costs(runs.large), "failures": runs.failures}


def _costs(bout: Bout) -> list[dict[str, Any]]:
    return [{"side": side, "samples": samples, **asdict(cost)} for (side, samples), cost in bout.items()]


def _model(options: argparse.Namespace, network: str) -> Path:
    path: Path = options.folder.resolve() / f"{network}.onnx"
    return path


def _wrong(options: argparse.Namespace) -> str | None:
    """What stands against a run, if anything."""
    counts = (options.peers_samples, options.samples, options.more_samples)
    missing = [path for path in (_model(options, name) for name in options.networks) if not path.is_file()]
    if not options.folder.is_dir():
        return f"{options.folder} is no folder: make it with make_networks.py {options.folder} --dynamic-batch"
    if missing:
        return f"{missing[0]} is missing: make it with make_networks.py {options.folder} --dynamic-batch"
    if any(count % BATCH for count in counts) or not 0 < counts[0] < counts[1] < counts[2]:
        return f"give multiples of {BATCH}, with --peers-samples below --samples below --more-samples"
    if options.repeats < 1:
        return "--repeats: give at least 1"
    if options.json and not options.json.resolve().parent.is_dir():
        return f"--json: {options.json.parent} is no folder"
    return None


def _refuse(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where make_networks.py --dynamic-batch put the models")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all three")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, WHOLE_LINE], help="our sides (default: all)")
    parser.add_argument("--no-peers", action="store_true", help="leave onnxruntime's calibrators and ModelOpt out")
    parser.add_argument("--repeats", type=int, default=5, help="how many rounds are run (default: 5)")
    parser.add_argument("--samples", type=int, default=64, help="samples in a whole job (default: 64)")
    parser.add_argument(
        "--more-samples", type=int, default=256, help="samples in our larger job: the rest are further ones (256)"
    )
    parser.add_argument("--peers-samples", type=int, default=16, help="samples in the peers' smaller job (default: 16)")
    parser.add_argument(
        "--memory-runs", action="store_true", help=f"also measure our peak memory with {MEMORY_SAMPLES} samples"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:] == [CHILD]:
        child()
    else:
        sys.exit(main())
