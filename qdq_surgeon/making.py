"""From a plan to a model: choose, insert, correct; once, or for as many sets of float ops as a target takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from .calibration.feeds import Batch
from .calibration.sessions import Progress, Session
from .calibration.statistics import Origin, Statistics
from .comparison import Comparison, compare_runners
from .edges import Plan
from .errors import QdqError
from .insertion import insert_pairs
from .model import Model
from .refinement.auto import MethodChoice, best_method
from .refinement.bias import BiasCorrection, correct_biases
from .refinement.gptq import WeightRounding, round_weights
from .refinement.judging import number_of
from .refinement.lockstep import evenly
from .refinement.mixed import keep_float
from .refinement.scoring import Score, scored
from .refinement.search import Ops
from .refinement.sensitivity import measure
from .refinement.target import MixedPrecision, Target
from .refinement.trace import TensorError, trace
from .scales import Scales, choose_scales

VERSION = version("qdq-surgeon")
NO_SCALES = Scales("none", Origin(("no data",), "", 0), "", {})
MEASURED = 8
"""How many samples tell which ops add most to the error."""
TRIED_ON = 64
"""How many samples tell whether a target is reached; an agreement, which is a count, takes all that there are."""
REMEMBERED = 256 << 20
"""How many bytes of the float model's outputs are kept from one trial to the next."""


@dataclass(frozen=True)
class Result:
    """What `quantize` returns. `comparison` is None where it was left out, or where nothing was quantized.

    `notes` says what a user should know about the model: what stayed FP32 in FP16, for example.
    """

    model: ModelProto
    plan: Plan
    scales: Scales
    choice: MethodChoice | None = None
    rounding: WeightRounding | None = None
    correction: BiasCorrection | None = None
    mixed: MixedPrecision | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()
    evaluation: tuple[Batch, ...] = field(default=(), repr=False, compare=False)
    """The batches that the comparison ran on."""

    @property
    def refinements(self) -> tuple[MethodChoice | MixedPrecision | WeightRounding | BiasCorrection, ...]:
        """What was chosen and corrected on the calibration samples, to be printed."""
        return tuple(done for done in (self.choice, self.mixed, self.rounding, self.correction) if done)

    @property
    def missed(self) -> str:
        """In words that the target is missed on the samples of the comparison; empty where it is not."""
        if self.mixed is None or self.comparison is None:
            return ""
        found = self.comparison
        numbers = self.mixed.target.missed_by(found.sqnr, found.agreement, found.scores[1] if found.scores else None)
        samples = "the samples held out" if found.held_out else "the samples of the comparison"
        return f"the target {self.mixed.target} is missed on {samples}: {numbers}" if numbers else ""

    def __str__(self) -> str:
        lines = [next(self.plan.lines()), *self.notes]
        lines += [f"{edge} stays float: {reason}" for edge, reason in self.scales.dropped.items()]
        lines += map(str, self.refinements)
        compared = [f"\n{self.comparison}"] if self.comparison else []
        return "\n".join((*lines, *compared, *([self.missed] if self.missed else [])))


def inserted(source: Model, plan: Plan, scales: Scales) -> ModelProto:
    """A copy of the model with the planned pairs."""
    return insert_pairs(source, plan, scales, VERSION)


def unchanged(source: Model) -> ModelProto:
    """A copy of the model as it was given."""
    copy = ModelProto()
    copy.CopyFrom(source.original)
    return copy


def bare_result(source: Model, plan: Plan) -> Result:
    """What comes of a plan that adds no pairs."""
    return Result(unchanged(source), plan, NO_SCALES)


@dataclass(frozen=True)
class Maker:
    """Makes results: of the plan, or of a plan with more ops in float.

    `choose` gives the scales for a plan, `replan` a plan with more ops (by their first outputs) in float. `samples`
    are those to correct biases and round weights with.
    """

    source: Model
    plan: Plan
    choose: Callable[[Plan], Scales]
    replan: Callable[[Ops], Plan] | None = None
    choice: MethodChoice | None = None
    samples: tuple[Batch, ...] = ()
    bias_correction: bool = False
    gptq: bool = False
    progress: Progress | None = None

    def make(self, floats: Ops = frozenset()) -> Result:
        """Choose, insert, correct."""
        plan = self.replan(floats) if self.replan and floats else self.plan
        if not plan.adds_pairs:
            return bare_result(self.source, plan)
        scales = self.choose(plan)
        result = Result(inserted(self.source, plan, scales), plan, scales, choice=self.choice)
        if self.gptq and self.samples:
            result = self._rounded(result)
        if self.bias_correction and self.samples:
            result = self._corrected(result)
        return result

    def _rounded(self, result: Result) -> Result:
        plan, scales, model = result.plan, result.scales, result.model
        done = round_weights(self.source, plan, scales, model, self.samples, self.progress)
        if done.weights:
            model = insert_pairs(self.source, plan, scales, VERSION, weights=done.weights)
        return replace(result, model=model, rounding=done)

    def _corrected(self, result: Result) -> Result:
        plan, scales, model = result.plan, result.scales, result.model
        done = correct_biases(self.source, plan, model, self.samples, self.progress)
        if not done.candidates:
            return result
        if done.shifts:
            weights = result.rounding.weights if result.rounding else None
            model = insert_pairs(self.source, plan, scales, VERSION, done.shifts, weights)
        return replace(result, model=model, correction=done)

    def with_best_method(self, statistics: Statistics, samples: Sequence[Batch]) -> Maker:
        """The maker with the range method that is best on the samples."""

        def scales_by(method: str) -> Callable[[Plan], Scales]:
            return lambda plan: choose_scales(self.source, plan, statistics, method)

        def build(method: str) -> ModelProto:
            return inserted(self.source, self.plan, scales_by(method)(self.plan))

        found = best_method(self.source, build, samples, self.progress)
        return replace(self, choose=scales_by(found.method), choice=found)

    def to_target(
        self, target: Target, samples: Sequence[Batch], unfitted: Sequence[Batch], score: Score | None
    ) -> Result:
        """The result with as many ops in float as the target takes.

        The error of the ops is measured on some of the `samples`, the target judged on calibration samples that nothing
        was fitted on, as far as there are any.
        Raises QdqError where the model has no such output as the target is for.
        """
        if self.replan is None:
            raise QdqError("a target needs to plan again: give `replan`, or call quantize")
        source = self.source
        bare = inserted(source, self.plan, self.choose(self.plan))
        noises = measure(source, self.plan, bare, evenly(samples, MEASURED), self.progress).ops
        most = TRIED_ON * len(unfitted) // number_of(unfitted)
        judges = unfitted if target.agreement is not None else evenly(unfitted, max(1, most))
        if target.score is not None and score:
            best = scored(score, source.original, source.custom_ops)
            if best < target.score:
                raise QdqError(f"the target score {target.score:g} cannot be reached: the float model's is {best:g}")
        reference = _Remembering(Session(source.original, custom_ops=source.custom_ops))
        made: dict[Ops, Result] = {}

        def reaches(floats: Ops) -> bool:
            result = self.make(floats)
            session = Session(result.model, simulate=True, custom_ops=source.custom_ops)
            found = compare_runners(reference, session, judges, "the calibration samples", None)
            _check_judged(target, found)
            value = scored(score, result.model, source.custom_ops) if target.score is not None and score else None
            if target.is_reached(found.sqnr, found.agreement, value):
                made.clear()
                made[floats] = result
            return floats in made

        floats, mixed = keep_float(target, noises, reaches, number_of(judges))
        return replace(made.get(floats) or self.make(floats), mixed=mixed)

    def errors_of(self, result: Result, samples: Sequence[Batch]) -> tuple[TensorError, ...]:
        """The errors of the ops: noted while biases were corrected, else along a walk."""
        if result.correction and result.correction.kept:
            return result.correction.errors
        if not samples or not result.plan.adds_pairs:
            return ()
        return trace(self.source, result.plan, result.model, evenly(samples, MEASURED))


class _Remembering:
    """Runs a model once on every batch and, as far as its outputs fit, gives them again without a run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[int, list[list[NDArray[Any]]]] = {}
        self._room = REMEMBERED

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._session.outputs

    def run(self, batch: Batch, names: Sequence[str]) -> list[list[NDArray[Any]]]:
        if id(batch) in self._known:
            return self._known[id(batch)]
        found = self._session.run(batch, names)
        size = sum(getattr(array, "nbytes", 0) for arrays in found for array in arrays)
        if size <= self._room:
            self._room -= size
            self._known[id(batch)] = found
        return found


def _check_judged(target: Target, found: Comparison) -> None:
    """Refuse a target that the model's outputs give no number for."""
    if target.agreement is not None and found.agreement is None:
        raise QdqError("a target agreement needs class scores, which no output looks like: use a target SQNR")
    if target.sqnr is not None and not found.outputs:
        raise QdqError("a target SQNR needs an output that is a tensor of numbers, which the model has not")
