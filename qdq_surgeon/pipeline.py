"""The straight line: load, plan, calibrate, choose, insert, compare. Read this first."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
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
from .calibration.statistics import Statistics
from .comparison import SIMULATED, SIMULATED_HALF, Comparison, compare_models
from .edges import Plan, count
from .errors import DataError, ModelError, PlanError, QdqError
from .float16 import to_float16
from .graph import every_node, is_integer_op
from .making import MEASURED, NO_SCALES, Maker, Result, bare_result, inserted, unchanged
from .model import Model, Source, load
from .refinement.auto import AUTO
from .refinement.lockstep import apart, evenly, fitting_samples, others
from .refinement.scoring import Score, scored
from .refinement.search import Ops
from .refinement.sensitivity import Sensitivity, measure
from .refinement.target import Target
from .refinement.trace import TensorError
from .rules.filters import Selection, entries, vetoed
from .rules.placement import DEFAULT, load_placement
from .rules.planner import check_plan, make_plan
from .rules.predicates import PairPredicate, Predicate
from .scales import Scales, choose_scales, every_activation, tensors_to_calibrate
from .stored import store_weights
from .tensorrt.cache import read_cache, scales_from_cache

log = logging.getLogger("qdq_surgeon")

RANGE_SAMPLES = 16
"""How many samples tell which activations exceed FP16's range."""
WEIGHTS = ("pairs", "int8")
"""How weights are stored: in float with a Q and a DQ, or as integers with a DQ alone."""
AS_GIVEN = "the model as given (with its own pairs)"
"""What the result is compared with where the model came with pairs."""


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
    include, exclude = entries(include), entries(exclude)
    op_types = op_types if isinstance(op_types, str) else list(op_types)

    def planned(floats: Ops) -> Plan:
        return plan(
            source,
            placement=placement,
            predicates=predicates,
            include=include,
            exclude=exclude,
            op_types=op_types,
            floats=floats,
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
    gptq: bool
    weights: str
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
    gptq: bool = False,
    weights: str = "pairs",
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

    `method` chooses ranges: mse, max, entropy or percentile[:P]; `auto` tries them all. At most `samples` samples
    calibrate. `shapes` gives the sizes of synthetic inputs, `preprocessing` says how images become inputs.
    `statistics` of an earlier run, or a TensorRT `calibration_cache` with scales, take the place of a calibration.
    `provider` is where onnxruntime runs the float model (cpu, cuda, tensorrt), `memory` how many bytes the process
    should take at most while it calibrates. `float16` puts the un-quantized rest and the scales into FP16
    (`float16_io`: inputs and outputs too). `bias_correction` takes back what quantized layers err on average, where
    it helps on samples kept for judging. `gptq` rounds weights for what their layers compute; `weights="int8"` stores
    them as integers, a quarter of the file. `float_worst` ops that add most to the error stay float; or as few
    multiply-accumulates as reach `target_sqnr` (dB), `target_agreement` (0 to 1) and `target_score` on the
    calibration samples. `score(run)` is a measure of your own, higher is better; `run(feed)` gives a model's outputs
    by name. `replan` makes the plan again with more ops (by their first outputs) in float, which a target needs;
    `quantize` brings its own. `progress(stage, done, total)` may raise to stop the run. What the statistics say of
    poor data is logged as warnings. See `quantize`.
    """
    target = Target(float_worst, target_sqnr, target_agreement, target_score)
    if target_score is not None and score is None:
        raise QdqError("a target score needs a score: give `score`, a function that measures a model")
    source = load(model)
    check_plan(source, the_plan)
    if not the_plan.adds_pairs:
        return bare_result(source, the_plan)
    given = statistics is not None or calibration_cache is not None
    needs = {"float16": float16, "gptq": gptq, "the method auto": method == AUTO, "a target": bool(target)}
    _check_options(method, weights, statistics, calibration_cache)
    _check_samples([name for name, wanted in needs.items() if wanted], source, given and data is None)
    split = Split(_feeds(source, data, shapes, preprocessing), samples)
    if given and data is not None:
        split.deal()
    if calibration_cache is None and statistics is None:
        tensors = every_activation(the_plan) if target else tensors_to_calibrate(the_plan)
        only = "max" if method == "max" else None
        statistics = _collect(source, the_plan, tensors, split, only, provider, memory, None, progress, compare)
    if statistics is not None:
        _warn(source, statistics, DEFAULT_METHOD if method == AUTO else method)
    looks = bias_correction or compare or gptq or method == AUTO or bool(target)
    every = apart(source, split.seen) if looks and not source.quantized else []
    some = fitting_samples(source, every, memory)
    maker = Maker(source, the_plan, _ranges(source, statistics, method, calibration_cache), replan, progress=progress)
    if method == AUTO and statistics is not None:
        maker = maker.with_best_method(statistics, some)
    if split.feeds.synthetic and gptq:
        log.warning("gptq needs real samples: on made-up inputs every weight is rounded to the nearest")
    if not split.feeds.synthetic:
        maker = replace(maker, samples=tuple(some), bias_correction=bias_correction, gptq=gptq)
    result = maker.to_target(target, some, others(every, some), score) if target else maker.make()
    errors = maker.errors_of(result, some) if compare else ()
    if float16:
        result = _in_float16(result, source, split, float16_io)
    if weights == "int8":
        result = replace(result, model=store_weights(result.model))
    if compare:
        known = given and statistics is not None and split.feeds.source in statistics.origin.sources
        unseen = split.held_out if not given else False if known or (split.samples and not split.held_out) else None
        where = SIMULATED_HALF if float16 else SIMULATED
        result = _compared(result, source, split, unseen, where, errors, score, progress)
    return result


def _check_options(
    method: str, weights: str, statistics: Statistics | None, calibration_cache: str | Path | None
) -> None:
    """Refuse, before any work, what cannot be."""
    if method != AUTO:
        range_method(method)
    if weights not in WEIGHTS:
        raise QdqError(f"weights are stored as {' or '.join(map(repr, WEIGHTS))}, not {weights!r}")
    if statistics is not None and calibration_cache is not None:
        raise QdqError("statistics and a calibration cache both give ranges: leave one out")
    if calibration_cache is not None and method == AUTO:
        raise QdqError("a calibration cache gives ranges, which leaves the method auto nothing to choose")


def _check_samples(needed_by: Sequence[str], source: Model, without_data: bool) -> None:
    """Refuse what needs samples where there are none, or what needs a float model where it has pairs."""
    for name in needed_by:
        if without_data:
            raise DataError(f"{name} needs samples to look at: give data too")
        if source.quantized and name != "float16":
            raise ModelError(f"{name} is for float models, and this one comes with pairs: requantize or strip it")


def _ranges(
    source: Model, statistics: Statistics | None, method: str, calibration_cache: str | Path | None
) -> Callable[[Plan], Scales]:
    """How scales are chosen for a plan."""
    if calibration_cache is not None:
        cache = read_cache(calibration_cache)
        return lambda some_plan: scales_from_cache(source, some_plan, cache)
    assert statistics is not None
    known = statistics
    return lambda some_plan: choose_scales(source, some_plan, known, DEFAULT_METHOD if method == AUTO else method)


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
    floats: Ops = frozenset(),
) -> Plan:
    """Decide where pairs go, and why. Needs no data.

    `placement` is a preset's name, a .toml file, or several separated by commas; `predicates` adds conditions of
    your own by name. `include`, `exclude` and `op_types` are vetoes: names, globs, or (not op_types) a function of
    the node. `floats` are nodes, by their first outputs, that stay float for a target: as `apply` gives them to
    `replan`. Pairs that the model comes with are in the plan by the rule `in-model`; load it with `requantize` to
    leave them out. Raises PlacementError, FilterError, or ModelError for a model that is quantized in operator form.
    """
    source = load(model)
    _check_is_float(source)
    rules = load_placement(placement, predicates)
    return make_plan(source, rules, vetoed(source.graph, include, exclude, op_types), floats)


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
    return replace(measure(source, the_plan, bare, some, progress), data=split.feeds.source)


def choose(model: Source, the_plan: Plan, statistics: Statistics, method: str = DEFAULT_METHOD) -> Scales:
    """Turn statistics into scales, by `max`, `mse`, `entropy` or `percentile[:P]`, without running the model."""
    return choose_scales(load(model), the_plan, statistics, method)


def insert(model: Source, the_plan: Plan, scales: Scales) -> ModelProto:
    """A copy of the model with the planned pairs; the model as it was given where there are none."""
    source = load(model)
    return inserted(source, the_plan, scales) if the_plan.adds_pairs else unchanged(source)


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
        split.deal()
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
    found = Counter(node.op_type for node in every_node(source.proto) if is_integer_op(node))
    if found:
        ops = ", ".join(f"{number} {op}" for op, number in sorted(found.items()))
        raise ModelError(
            f"the model is already quantized in operator form ({ops}), which TensorRT does not take: "
            "give the float model, or export it with Q/DQ pairs"
        )
