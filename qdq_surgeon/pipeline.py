"""The straight line: load, plan, calibrate, choose, insert, compare. Read this first."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict, Unpack

from onnx import ModelProto

from .calibration import feeds
from .calibration.collection import Checkpoint, collect
from .calibration.feeds import Batch, Data, Feeds, Shapes
from .calibration.images import Preprocessing
from .calibration.quality import findings
from .calibration.ranges import DEFAULT_METHOD, range_method
from .calibration.sessions import DEFAULT_PROVIDER, Progress, trial
from .calibration.split import Shard, Split
from .calibration.statistics import Origin, Statistics
from .comparison import SIMULATED, SIMULATED_HALF, Comparison, compare_models
from .edges import Plan, count
from .errors import DataError, ModelError, PlanError, QdqError
from .float16 import to_float16
from .graph import all_nodes, is_integer_op
from .insertion import insert_pairs
from .model import Model, Source, load
from .refinement.bias import BiasCorrection, correct_biases
from .refinement.lockstep import evenly, fitting_samples
from .refinement.mixed import keep_float
from .refinement.scoring import Score, scored
from .refinement.search import Ops
from .refinement.sensitivity import Sensitivity, measure
from .refinement.target import MixedPrecision, Target
from .refinement.trace import TensorError, trace
from .rules.filters import Selection, entries, vetoed
from .rules.placement import DEFAULT, load_placement
from .rules.planner import check_plan, make_plan
from .rules.predicates import PairPredicate, Predicate
from .scales import Scales, choose_scales, every_activation, tensors_to_calibrate
from .tensorrt.cache import read_cache, scales_from_cache

log = logging.getLogger("qdq_surgeon")

VERSION = version("qdq-surgeon")
RANGE_SAMPLES = 16
"""How many samples tell which activations exceed FP16's range."""
MEASURED = 8
"""How many samples tell which ops add most to the error."""
AS_GIVEN = "the model as given (with its own pairs)"
"""What the result is compared with where the model came with pairs."""
NO_SCALES = Scales("none", Origin(("no data",), "", 0), "", {})


@dataclass(frozen=True)
class Result:
    """What `quantize` returns. `comparison` is None where it was left out, or where nothing was quantized.

    `notes` says what a user should know about the model: what stayed FP32 in FP16, for example.
    """

    model: ModelProto
    plan: Plan
    scales: Scales
    correction: BiasCorrection | None = None
    mixed: MixedPrecision | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()
    evaluation: tuple[Batch, ...] = field(default=(), repr=False, compare=False)
    """The batches that the comparison ran on."""

    def __str__(self) -> str:
        lines = [next(self.plan.lines()), *self.notes]
        lines += [f"{edge} stays float: {reason}" for edge, reason in self.scales.dropped.items()]
        lines += [str(done) for done in (self.mixed, self.correction) if done]
        return "\n".join(lines) + (f"\n\n{self.comparison}" if self.comparison else "")


def quantize(
    model: Source,
    data: Data | None = None,
    *,
    placement: str | Path = DEFAULT,
    predicates: Mapping[str, Predicate | PairPredicate] | None = None,
    include: Selection = (),
    exclude: Selection = (),
    op_types: Iterable[str] = (),
    requantize: bool = False,
    **options: Unpack[Options],
) -> Result:
    """The whole line: a float model in, the same model with Q/DQ pairs out, and the reasons and figures.

    `model`: a path, a ModelProto, or anything with `.model_proto`; never changed. `data`: a path, a mapping of
    arrays, or an iterable of mappings; without it the test_data_set_* folders beside the model, else synthetic
    inputs (`result.scales.origin.synthetic`). Q/DQ pairs that the model comes with stay, with their scales, unless
    `requantize` takes them out first. `placement`, `predicates`, `include`, `exclude` and `op_types` are
    those of `plan`, the other options those of `apply`.
    Raises QdqError, or one of its kinds, for whatever does not fit.
    """
    source = load(model, requantize=requantize)

    def planned(floats: Ops) -> Plan:
        return plan(
            source,
            placement=placement,
            predicates=predicates,
            include=include,
            exclude=(*entries(exclude), *sorted(floats)),
            op_types=op_types,
        )

    return apply(source, planned(frozenset()), data, replan=planned, **options)


class Options(TypedDict, total=False):
    """The options of `apply`, which `quantize` hands on."""

    method: str
    samples: int | None
    shapes: Shapes | None
    preprocessing: Preprocessing | None
    statistics: Statistics | None
    calibration_cache: str | Path | None
    provider: str
    memory: int | None
    float16: bool
    float16_io: bool
    bias_correction: bool
    float_worst: int
    target_sqnr: float | None
    target_agreement: float | None
    target_score: float | None
    score: Score | None
    compare: bool
    progress: Progress | None


def apply(
    model: Source,
    the_plan: Plan,
    data: Data | None = None,
    *,
    method: str = DEFAULT_METHOD,
    samples: int | None = None,
    shapes: Shapes | None = None,
    preprocessing: Preprocessing | None = None,
    statistics: Statistics | None = None,
    calibration_cache: str | Path | None = None,
    provider: str = DEFAULT_PROVIDER,
    memory: int | None = None,
    float16: bool = False,
    float16_io: bool = False,
    bias_correction: bool = True,
    float_worst: int = 0,
    target_sqnr: float | None = None,
    target_agreement: float | None = None,
    target_score: float | None = None,
    score: Score | None = None,
    replan: Callable[[Ops], Plan] | None = None,
    compare: bool = True,
    progress: Progress | None = None,
) -> Result:
    """The line from a plan on: calibrate, choose, insert, compare.

    `method` chooses ranges: mse, max, entropy or percentile[:P]. At most `samples` samples calibrate. `shapes` gives
    the sizes of synthetic inputs, `preprocessing` says how images become inputs. `statistics` of an earlier run, or a
    TensorRT `calibration_cache` with scales, take the place of a calibration. `provider` is where onnxruntime runs
    the float model (cpu, cuda, tensorrt), `memory` how many bytes the process should take at most while it
    calibrates. `float16` puts the un-quantized rest and the scales into FP16 (`float16_io`: inputs and outputs too).
    `bias_correction` takes back what quantized layers err on average, where it helps on samples kept for judging.
    `float_worst` ops that add most to the error stay float; or as few multiply-accumulates as reach `target_sqnr` (dB),
    `target_agreement` (0 to 1) and `target_score` on the calibration samples. `score(run)` is a measure of your own,
    higher is better; `run(feed)` gives a model's outputs by name. `replan` makes the plan again with more ops (by their
    first outputs) in float, which a target needs; `quantize` brings its own.
    `progress(stage, done, total)` may raise to stop the run. What the statistics say of poor data is logged as
    warnings. See `quantize`.
    """
    range_method(method)  # a wrong name should not cost a calibration
    target = Target(float_worst, target_sqnr, target_agreement, target_score)
    source = load(model)
    check_plan(source, the_plan)
    if not the_plan.adds_pairs:
        return Result(insert(source, the_plan, NO_SCALES), the_plan, NO_SCALES)
    given = statistics is not None or calibration_cache is not None
    _check_sources(target, float16, statistics, calibration_cache, given and data is None)
    split = Split(_feeds(source, data, shapes, preprocessing), samples)
    if given and data is not None:
        split.deal()
    if calibration_cache is not None:
        cache = read_cache(calibration_cache)
        make = _Maker(source, the_plan, replan, lambda plan: scales_from_cache(source, plan, cache))
    else:
        if statistics is None:
            tensors = every_activation(the_plan) if target else tensors_to_calibrate(the_plan)
            only = "max" if method == "max" else None
            statistics = _collect(source, the_plan, tensors, split, only, provider, memory, None, progress, compare)
        _warn(source, statistics, method)
        make = _Maker(source, the_plan, replan, partial(_choice, source, statistics, method))
    some = () if source.quantized else fitting_samples(source, split.seen, memory)
    if bias_correction and not split.feeds.synthetic:
        make = replace(make, samples=some, progress=progress)
    result = _to_target(make, target, some, split.seen, score, progress) if target else make()
    errors = _errors(make, result, some) if compare else ()
    if float16:
        result = _in_float16(result, source, split, float16_io)
    if compare:
        known = given and statistics is not None and split.feeds.source in statistics.origin.sources
        unseen = split.held_out if not given else False if known else None
        where = SIMULATED_HALF if float16 else SIMULATED
        result = _compared(result, source, split, unseen, where, errors, score, progress)
    return result


def _check_sources(
    target: Target,
    float16: bool,
    statistics: Statistics | None,
    calibration_cache: str | Path | None,
    without_data: bool,
) -> None:
    """Refuse ranges from two sources, and the lack of samples for what needs some."""
    if statistics is not None and calibration_cache is not None:
        raise QdqError("statistics and a calibration cache both give ranges: leave one out")
    if float16 and without_data:
        raise DataError("float16 needs samples, to see which values exceed FP16: give data too")
    if target and without_data:
        raise DataError("a target needs samples, to see what keeping ops in float gains: give data too")


def _choice(source: Model, statistics: Statistics, method: str, the_plan: Plan) -> Scales:
    return choose(source, the_plan, statistics, method)


@dataclass(frozen=True)
class _Maker:
    """From a plan to a result: choose, insert, correct. Called again for each set of ops that is to stay float."""

    source: Model
    plan: Plan
    replan: Callable[[Ops], Plan] | None
    choose: Callable[[Plan], Scales]
    samples: Sequence[Batch] = ()
    """To correct biases with; none where they stay."""
    progress: Progress | None = None

    def __call__(self, floats: Ops = frozenset()) -> Result:
        the_plan = self.replan(floats) if self.replan and floats else self.plan
        if not the_plan.adds_pairs:
            return Result(insert(self.source, the_plan, NO_SCALES), the_plan, NO_SCALES)
        scales = self.choose(the_plan)
        result = Result(insert(self.source, the_plan, scales), the_plan, scales)
        if not self.samples:
            return result
        done = correct_biases(self.source, the_plan, result.model, self.samples, self.progress)
        if not done.shifts:
            return replace(result, correction=done)
        model = insert_pairs(self.source, the_plan, scales, VERSION, done.shifts)
        return replace(result, model=model, correction=done)


def _to_target(
    make: _Maker,
    target: Target,
    some: Sequence[Batch],
    seen: Sequence[Batch],
    score: Score | None,
    progress: Progress | None,
) -> Result:
    """The result with as many ops in float as the target takes, judged on the calibration samples."""
    if make.replan is None:
        raise QdqError("a target needs to plan again: give `replan`, or call quantize")
    source = make.source
    bare = replace(make, samples=())()
    noises = measure(source, make.plan, bare.model, evenly(some, MEASURED), progress).ops

    def reaches(floats: Ops) -> bool:
        model = make(floats).model
        found = compare_models(source.original, model, seen, "", None, custom_ops=source.custom_ops)
        value = scored(score, model, source.custom_ops) if score else None
        return target.is_reached(found.sqnr, found.agreement, value)

    floats, mixed = keep_float(target, noises, reaches, sum(batch.samples for batch in seen))
    return replace(make(floats), mixed=mixed)


def _errors(make: _Maker, result: Result, some: Sequence[Batch]) -> tuple[TensorError, ...]:
    """The errors of the ops: noted while biases were corrected, else along a walk."""
    if result.correction and result.correction.kept:
        return result.correction.errors
    if not some or not result.plan.adds_pairs:
        return ()
    return trace(make.source, result.plan, result.model, evenly(some, MEASURED))


def _in_float16(result: Result, source: Model, split: Split, io: bool) -> Result:
    batches = split.for_comparison()
    halved = to_float16(result.model, float16_io=io, ranges=_largest(source, batches))
    notes = [f"stays FP32: {line}" for line in halved.kept]
    if halved.raised:
        names = ", ".join(halved.raised[:3]) + (" ..." if len(halved.raised) > 3 else "")
        notes.append(f"{count(len(halved.raised), 'tensor')} too small for FP16 scales, which loses accuracy: {names}")
    return replace(result, model=halved.model, notes=tuple(notes))


def _largest(source: Model, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest finite |x| of every float activation over a few samples."""
    graph = source.graph
    made = [output for node in graph.nodes if not node.scope for output in node.outputs if graph.is_float(output)]
    samples = Split(Feeds(iter(batches), ""), RANGE_SAMPLES, hold_out=False, keep=False)
    found = collect(source, [name for name in made if not graph.is_constant(name)], samples, ranges_only=True)
    return {name: statistic.amax for name, statistic in found.tensors.items()}


def _compared(
    result: Result,
    source: Model,
    split: Split,
    held_out: bool | None,
    where: str,
    errors: tuple[TensorError, ...],
    score: Score | None,
    progress: Progress | None,
) -> Result:
    batches = split.for_comparison()
    data = split.feeds.source
    comparison = compare_models(
        source.original, result.model, batches, data, held_out, progress, where, source.custom_ops
    )
    scores = None
    if score:
        scores = (
            scored(score, source.original, source.custom_ops),
            scored(score, result.model, source.custom_ops),
        )
    reference = AS_GIVEN if source.quantized else comparison.reference
    comparison = replace(comparison, reference=reference, errors=errors, scores=scores)
    return replace(result, comparison=comparison, evaluation=tuple(batches))


def plan(
    model: Source,
    *,
    placement: str | Path = DEFAULT,
    predicates: Mapping[str, Predicate | PairPredicate] | None = None,
    include: Selection = (),
    exclude: Selection = (),
    op_types: Iterable[str] = (),
) -> Plan:
    """Decide where pairs go, and why. Needs no data.

    `placement` is a preset's name, a .toml file, or several separated by commas; `predicates` adds conditions of
    your own by name. `include`, `exclude` and `op_types` are vetoes: names, globs, or (not op_types) a function of
    the node. Pairs that the model comes with are in the plan by the rule `in-model`; load it with `requantize` to
    leave them out. Raises PlacementError, FilterError, or ModelError for a model that is quantized in operator form.
    """
    source = load(model)
    _check_is_float(source)
    rules = load_placement(placement, predicates)
    return make_plan(source, rules, vetoed(source.graph, include, exclude, op_types))


def calibrate(
    model: Source,
    the_plan: Plan,
    data: Data | None = None,
    *,
    samples: int | None = None,
    shapes: Shapes | None = None,
    preprocessing: Preprocessing | None = None,
    method: str | None = None,
    shard: Shard | None = None,
    provider: str = DEFAULT_PROVIDER,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Run the float model once over all data (at most `samples` samples); one statistic per tensor of the plan.

    The statistics serve every range method; `method="max"` keeps ranges only, which is faster. `shard` (i, n) takes
    the i-th of n parts of the data: merge the n statistics with `|`. `checkpoint` names a file that is written now
    and then, from which `resume` goes on; remove it when you have saved the statistics. See `apply` for the other
    options.
    Raises PlanError, DataError or ModelError where plan, data or model do not fit.
    """
    if method is not None:
        range_method(method)
    source = load(model)
    split = Split(_feeds(source, data, shapes, preprocessing), samples, hold_out=False, keep=False, shard=shard)
    kept = Checkpoint(Path(checkpoint), resume) if checkpoint is not None else None
    tensors = tensors_to_calibrate(the_plan)
    statistics = _collect(source, the_plan, tensors, split, method, provider, memory, kept, progress)
    _warn(source, statistics, method)
    return statistics


def sensitivity(
    model: Source,
    the_plan: Plan,
    data: Data | None = None,
    *,
    method: str = DEFAULT_METHOD,
    samples: int | None = None,
    measured: int = MEASURED,
    shapes: Shapes | None = None,
    preprocessing: Preprocessing | None = None,
    statistics: Statistics | None = None,
    provider: str = DEFAULT_PROVIDER,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Rank pairs and ops by what each alone adds to the error of the model's results, over `measured` samples.

    See `apply` for the other options. Raises ModelError for a model that comes with pairs.
    """
    source = load(model)
    if source.quantized:
        raise ModelError("the model comes with Q/DQ pairs: give the float model (strip makes one), or --requantize")
    if not the_plan.sites:
        raise PlanError("the plan has no pairs, so there is no error to attribute")
    range_method(method)
    split = Split(_feeds(source, data, shapes, preprocessing), samples, hold_out=False)
    if statistics is None:
        tensors = tensors_to_calibrate(the_plan)
        statistics = _collect(source, the_plan, tensors, split, method, provider, memory, None, progress)
    else:
        split.deal()
    _warn(source, statistics, method)
    bare = insert(source, the_plan, choose(source, the_plan, statistics, method))
    some = evenly(fitting_samples(source, split.seen, memory), measured)
    return measure(source, the_plan, bare, some, progress)


def choose(model: Source, the_plan: Plan, statistics: Statistics, method: str = DEFAULT_METHOD) -> Scales:
    """Turn statistics into scales, by `max`, `mse`, `entropy` or `percentile[:P]`, without running the model."""
    return choose_scales(load(model), the_plan, statistics, method)


def insert(model: Source, the_plan: Plan, scales: Scales) -> ModelProto:
    """A copy of the model with the planned pairs; the model as it was given where there are none."""
    source = load(model)
    if the_plan.adds_pairs:
        return insert_pairs(source, the_plan, scales, VERSION)
    copy = ModelProto()
    copy.CopyFrom(source.original)
    return copy


def compare(
    float_model: Source,
    qdq_model: Source,
    data: Data | None = None,
    *,
    shapes: Shapes | None = None,
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on all of the data in onnxruntime and measure how far apart their outputs are."""
    left, right = load(float_model), load(qdq_model)
    source = _feeds(left, data, shapes, preprocessing)
    libraries = (*left.custom_ops, *right.custom_ops)
    return compare_models(
        left.original, right.original, source.batches, source.source, None, progress, custom_ops=libraries
    )


def evaluation_batches(
    model: Source,
    data: Data | None = None,
    shapes: Shapes | None = None,
    preprocessing: Preprocessing | None = None,
) -> list[Batch]:
    """The first batches of the data, as many as a comparison keeps."""
    return Split(_feeds(load(model), data, shapes, preprocessing)).for_comparison()


def _feeds(source: Model, data: Data | None, shapes: Shapes | None, preprocessing: Preprocessing | None) -> Feeds:
    if data is not None:
        return feeds.read_data(data, source, preprocessing)
    return feeds.default_data(source, shapes, trial(source.original, source.custom_ops))


def _collect(
    source: Model,
    the_plan: Plan,
    tensors: Sequence[str],
    split: Split,
    method: str | None,
    provider: str,
    memory: int | None,
    checkpoint: Checkpoint | None,
    progress: Progress | None,
    needed: bool = True,
) -> Statistics:
    """One pass over the calibration part of the data; none where no scale and no comparison needs it."""
    check_plan(source, the_plan)
    if not tensors and not needed:
        return Statistics({}, source.digest, NO_SCALES.origin)
    return collect(
        source,
        tensors,
        split,
        ranges_only=method == "max",
        provider=provider,
        memory=memory,
        checkpoint=checkpoint,
        progress=progress,
    )


def _warn(source: Model, statistics: Statistics, method: str | None) -> None:
    for finding in findings(source, statistics, method):
        log.warning("%s", finding)


def _check_is_float(source: Model) -> None:
    found = Counter(node.op_type for node in all_nodes(source.proto.graph) if is_integer_op(node))
    if found:
        ops = ", ".join(f"{number} {op}" for op, number in sorted(found.items()))
        raise ModelError(
            f"the model is already quantized in operator form ({ops}), which TensorRT does not take: "
            "give the float model, or export it with Q/DQ pairs"
        )
