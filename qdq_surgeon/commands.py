"""What each command does: it checks the options, calls the rooms, says what happened, returns the exit code.

The rooms are imported where they are used, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .edges import Plan, count
from .errors import PlanError, QdqError

if TYPE_CHECKING:
    from .calibration.feeds import Data
    from .calibration.images import Preprocessing
    from .calibration.sessions import Progress
    from .comparison import Comparison
    from .making import Result
    from .model import Model
    from .scales import Scales
    from .tensorrt.runs import EngineReport

OK, GATE_FAILED = 0, 1

SYNTHETIC_WARNING = (
    "No calibration data was given, so the scales come from MADE-UP INPUTS. This model is good for trying out the "
    "tool and TensorRT, not for use: its accuracy means nothing. Give real samples with --data."
)

SYNTHETIC_COMPARISON = (
    "No data was given, so the models were compared on MADE-UP INPUTS. These figures say nothing about accuracy. Give "
    "real samples with --data."
)

SYNTHETIC_RANKING = (
    "No data was given, so the error was measured on MADE-UP INPUTS. Real samples may rank ops and pairs otherwise. "
    "Give some with --data."
)


def insert(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Insert pairs: the whole line, with everything that the user asked for around it."""
    from . import pipeline
    from .calibration.feeds import SYNTHETIC
    from .calibration.scripts import script_score
    from .calibration.statistics import Statistics
    from .storage import data_file, save
    from .tensorrt.cache import write_cache
    from .tensorrt.runs import compare_engines, shapes_of
    from .tensorrt.trtexec import trtexec_command

    if options.plan:
        _check_plan(options)
        return plan(options, say)
    _check_insert(options)
    model = _load(options)
    output = options.output or options.model.with_name(f"{options.model.stem}.qdq.onnx")
    external = options.external_data or None
    _check_files(options, output, data_file(model.proto, output, external))
    _say_notes(model, say)
    the_plan = _read_plan(options.plan_file) if options.plan_file else _make_plan(model, options)
    say(f"{options.model}: {next(the_plan.lines())}")
    if not the_plan.adds_pairs:
        what = "add: the model" if model.existing else "quantize: the float model"
        say(f"nothing to {what} is written as it is (--plan says why)")
    statistics = Statistics.load(options.stats) if options.stats else None
    compares = not options.no_compare and (statistics is None or _is_data_given(options))
    with _progress_bar(options) as progress:
        result = pipeline.apply(
            model,
            the_plan,
            _data(options),
            method=options.method,
            samples=options.samples,
            shapes=dict(options.shapes),
            preprocessing=_preprocessing(options),
            statistics=statistics,
            calibration_cache=options.calibration_cache,
            provider=options.provider,
            memory=options.memory,
            gptq=options.gptq,
            weights=options.weights,
            bias_correction=not options.no_bias_correction,
            float_worst=options.float_worst,
            target_sqnr=options.target_sqnr,
            target_agreement=options.target_agreement,
            target_score=options.target_score,
            score=script_score(options.score_script) if options.score_script else None,
            replan=lambda floats: _make_plan(model, options, floats),
            float16=options.float16,
            float16_io=options.float16_io,
            compare=compares,
            progress=progress,
        )
    if not compares and not options.no_compare:
        say("no comparison: --stats does not run the model (give --data to compare)")
    origin = result.scales.origin
    if origin.synthetic and any(not site.weight and not site.is_in_model for site in the_plan.sites):
        _shout(SYNTHETIC_WARNING)
    elif result.comparison and result.comparison.data == SYNTHETIC:
        _shout(SYNTHETIC_COMPARISON)
    if origin.samples:
        say(f"calibrated by {result.scales.method} on {count(origin.samples, 'sample')} of {origin.data}")
    the_plan = result.plan
    _say_dropped(result.scales, the_plan, say)
    for refinement in result.refinements:
        say(refinement)
    for note in result.notes:
        say(f"note: {note}")
    if result.comparison:
        _say_comparison(result.comparison, say)
        _check_judged(result.comparison, options)
    if result.missed:
        say(result.missed)
    save(result.model, output, external)
    say(f"wrote {output}")
    if options.json:
        _write_json(options.json, the_plan, result.comparison, _refinements(result))
        say(f"wrote {options.json}")
    if options.write_cache:
        write_cache(result.scales, the_plan, options.write_cache)
        say(f"wrote {options.write_cache}")
    if options.trtexec is not None:
        profile = shapes_of(model, result.evaluation) if result.evaluation else {}
        say(trtexec_command(model, output, options.trtexec, profile))
    report = None
    if options.engine and result.comparison:
        data, held_out = result.comparison.data, result.comparison.held_out
        engines = model.without_pairs(), result.model
        report = compare_engines(*engines, result.evaluation, data, held_out, backend=options.backend)
        say(report)
    return _gate(result.comparison, options, report)


def _check_insert(options: argparse.Namespace) -> None:
    """Refuse, before any work, options that do not go together."""
    from .tensorrt.trtexec import check_target

    filters = options.include or options.exclude or options.op_types
    gates = (options.min_sqnr, options.min_agreement)
    if options.explain:
        raise QdqError("--explain goes with --plan")
    if options.plan_file and (filters or options.placement != "tensorrt"):
        raise QdqError("--plan-file holds the decisions: give placement and filters to the --plan that made it")
    if options.stats and options.calibration_cache:
        raise QdqError("--stats and --calibration-cache both give ranges: leave one out")
    given = options.stats or options.calibration_cache
    if options.stats and (options.memory is not None or options.provider != "cpu" or options.samples is not None):
        raise QdqError(
            "--samples, --memory and --provider are for a calibration, which --stats replaces: leave them out"
        )
    if given and options.float16 and not _is_data_given(options):
        raise QdqError("--float16 needs samples, to see which values exceed FP16: give --data too")
    wants_comparison = options.engine or any(gate is not None for gate in gates)
    if options.no_compare and wants_comparison:
        raise QdqError("--engine, --min-sqnr and --min-agreement need the comparison: leave --no-compare out")
    if options.stats and wants_comparison and not _is_data_given(options):
        raise QdqError("--engine, --min-sqnr and --min-agreement need data to compare on: give --data beside --stats")
    if options.stats and options.score_script and not _is_data_given(options):
        raise QdqError("--score-script scores what is compared, and --stats compares nothing: give --data too")
    searches = _searches(options)
    if searches and options.float_worst:
        raise QdqError("--float-worst says how many ops stay float, a target finds out: leave one out")
    if options.plan_file and (searches or options.float_worst):
        raise QdqError("--plan-file holds the decisions, and a target or --float-worst makes others: leave one out")
    if options.target_agreement is not None and not 0 < options.target_agreement <= 1:
        raise QdqError(f"--target-agreement is a share between 0 and 1, not {options.target_agreement:g}")
    if options.target_score is not None and not options.score_script:
        raise QdqError("--target-score goes with --score-script")
    if (searches or options.float_worst) and given and not _is_data_given(options):
        raise QdqError("a target and --float-worst need samples to try on: give --data too")
    if options.score_script and options.no_compare and options.target_score is None:
        raise QdqError("--score-script is for the comparison, or for --target-score: leave --no-compare out")
    if options.float16_io and not options.float16:
        raise QdqError("--float16-io goes with --float16")
    check_target(options.trtexec or "")
    _check_gates(options)


def _check_plan(options: argparse.Namespace) -> None:
    """Refuse what a plan alone would ignore."""
    if _searches(options) or options.float_worst or options.score_script:
        raise QdqError("a target, --float-worst and --score-script need data, which --plan does without: leave one out")


def _searches(options: argparse.Namespace) -> bool:
    targets = (options.target_sqnr, options.target_agreement, options.target_score)
    return any(target is not None for target in targets)


def plan(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Print the plan, or the story of one node."""
    from .report.explain import explain

    model = _load(options)
    _check_files(options)
    _say_notes(model, say)
    plan = _make_plan(model, options)
    say(explain(plan, model.graph, options.explain) if options.explain else plan)
    if options.json:
        _write_text(options.json, plan.to_json())
        say(f"wrote {options.json}")
    return OK


def calibrate(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Run the float model once; print the ranges, and write the statistics."""
    from . import pipeline
    from .calibration.ranges import range_method
    from .report.tables import table

    if options.resume and not options.output:
        raise QdqError("--resume goes with -o: the interrupted run left its checkpoint beside that file")
    _check_data(options)
    model = _load(options)
    _check_files(options, options.output)
    _say_notes(model, say)
    plan = _make_plan(model, options)
    partial = options.output.with_name(f"{options.output.name}.partial") if options.output else None
    with _progress_bar(options) as progress, _resumable(partial):
        statistics = pipeline.calibrate(
            model,
            plan,
            _data(options),
            samples=options.samples,
            shapes=dict(options.shapes),
            preprocessing=_preprocessing(options),
            method="max" if options.ranges_only else None,
            shard=options.shard,
            provider=options.provider,
            memory=options.memory,
            checkpoint=partial,
            resume=options.resume,
            progress=progress,
        )
    if statistics.origin.synthetic:
        _shout(SYNTHETIC_WARNING)
    methods = ("mse", "entropy", "percentile:99.99") if not options.ranges_only else ()
    ranges = {
        name: {"min": s.minimum, "max": s.maximum, **{method: range_method(method)(s) for method in methods}}
        for name, s in statistics.tensors.items()
    }
    rows = [(name, *(f"{value:.5g}" for value in row.values())) for name, row in ranges.items()]
    say(f"{len(ranges)} tensors over {count(statistics.origin.samples, 'sample')} of {statistics.origin.data}")
    say(table(("tensor", "min", "max", *methods), rows))
    if options.output:
        statistics.save(options.output)
        say(f"wrote {options.output}")
    if partial:
        partial.unlink(missing_ok=True)
    if options.json:
        _write_json_value(options.json, {"samples": statistics.origin.samples, "ranges": ranges})
        say(f"wrote {options.json}")
    return OK


@contextlib.contextmanager
def _resumable(partial: Path | None) -> Iterator[None]:
    """Say with an interruption that the run can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on with --resume" if partial and partial.exists() else "") from None


def merge(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Put the statistics of several runs together."""
    from .calibration.statistics import Statistics, merged

    _check_files(options, options.output)
    together = merged([Statistics.load(path) for path in options.stats])
    together.save(options.output)
    say(f"{len(together.tensors)} tensors over {count(together.origin.samples, 'sample')} of {together.origin.data}")
    say(f"wrote {options.output}")
    return OK


def compare(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Measure a Q/DQ model against its float model."""
    from . import pipeline
    from .calibration.feeds import SYNTHETIC
    from .model import load
    from .tensorrt.runs import compare_engines

    _check_gates(options)
    model, quantized = _load(options), load(options.quantized)
    _check_files(options)
    with _progress_bar(options) as progress:
        comparison = pipeline.compare(
            model,
            quantized,
            _data(options),
            shapes=dict(options.shapes),
            preprocessing=_preprocessing(options),
            progress=progress,
        )
    if not _is_data_given(options) and comparison.data == SYNTHETIC:
        _shout(SYNTHETIC_COMPARISON)
    _say_comparison(comparison, say)
    _check_judged(comparison, options)
    report = None
    if options.engine:
        batches = pipeline.evaluation_batches(model, _data(options), dict(options.shapes), _preprocessing(options))
        report = compare_engines(model, quantized.original, batches, comparison.data, None, backend=options.backend)
        say(report)
    if options.json:
        _write_json(options.json, None, comparison)
        say(f"wrote {options.json}")
    return _gate(comparison, options, report)


def sensitivity(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Rank pairs and ops by what they add to the error."""
    from dataclasses import asdict

    from . import pipeline
    from .calibration.feeds import SYNTHETIC
    from .report.html import sensitivity_chart, sensitivity_page

    _check_data(options)
    model = _load(options)
    _check_files(options, None)
    _say_notes(model, say)
    the_plan = _make_plan(model, options)
    with _progress_bar(options) as progress:
        found = pipeline.sensitivity(
            model,
            the_plan,
            _data(options),
            method=options.method,
            samples=options.samples,
            measured=options.measure,
            shapes=dict(options.shapes),
            preprocessing=_preprocessing(options),
            provider=options.provider,
            memory=options.memory,
            progress=progress,
        )
    if found.data == SYNTHETIC:
        _shout(SYNTHETIC_RANKING)
    say(found)
    for path, draw in ((options.svg, sensitivity_chart), (options.html, sensitivity_page)):
        if path:
            _write_text(path, draw(options.model.name, found))
            say(f"wrote {path}")
    if options.json:
        _write_json_value(options.json, asdict(found))
        say(f"wrote {options.json}")
    return OK


def strip(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Take pairs out of a Q/DQ model."""
    from .existing import count_pairs, notes_on_left, pairs_left, strip_pairs
    from .rules.filters import vetoed
    from .storage import data_file, save

    model = _load(options)
    output = options.output or options.model.with_name(f"{options.model.stem}.float.onnx")
    _check_files(options, output, data_file(model.proto, output))
    filters = (options.include, options.exclude, options.op_types)
    chosen = {node.first_output for node in model.graph.nodes} - vetoed(model.graph, *filters)
    stripped = strip_pairs(model.original, chosen if any(filters) else None)
    for note in notes_on_left(pairs_left(stripped)) if not any(filters) else ():
        say(f"note: {note}")
    before, after = count_pairs(model.original), count_pairs(stripped)
    say(f"{options.model}: {count(before - after, 'pair')} of {before} taken out")
    save(stripped, output)
    say(f"wrote {output}")
    return OK


def lint(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Find what TensorRT refuses or runs in float, and mend what can be."""
    from dataclasses import asdict

    from .storage import save
    from .tensorrt.lint import lint as find
    from .tensorrt.mend import mend

    model = _load(options)
    _check_files(options, options.fix)
    report = find(model, options.target)
    say(report)
    if options.json:
        findings = [asdict(finding) for finding in report.findings]
        _write_json_value(options.json, {"target": report.target, "findings": findings})
        say(f"wrote {options.json}")
    if not options.fix:
        return GATE_FAILED if report.errors else OK
    output = options.fix
    mended = mend(model, options.target)
    for text in mended.done:
        say(f"mended: {text}")
    for finding in mended.left:
        say(f"left: {finding.severity} {finding.code}: {finding}")
    save(mended.model, output)
    say(f"wrote {output}")
    return GATE_FAILED if any(finding.severity == "error" for finding in mended.left) else OK


def build(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Build an engine."""
    from .storage import write_atomically
    from .tensorrt.engine import TENSORRT_RTX
    from .tensorrt.engine import build as build_engine

    model = _load(options)
    output = options.output or options.model.with_suffix(".engine")
    _check_files(options, output, options.timing_cache)
    engine = build_engine(
        model,
        backend=options.backend,
        shapes=dict(options.shapes),
        timing_cache=options.timing_cache,
        tf32=options.tf32,
    )
    write_atomically(output, engine.data)
    if options.timing_cache and engine.backend.name == TENSORRT_RTX:
        say("note: TensorRT-RTX has no timing cache: --timing-cache was left alone")
    say(f"{engine.backend}; strongly typed, TF32 {'on' if engine.tf32 else 'off'}")
    for name, (low, usual, high) in engine.shapes.items():
        say(f"  {name}: {' / '.join('x'.join(map(str, shape)) for shape in (low, usual, high))}")
    say(f"{count(len(engine.layers), 'layer')}, {len(engine.data):,} bytes, built in {engine.seconds:.1f} s")
    say(f"wrote {output}")
    return OK


def audit(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    """Build an engine and say what it did with every pair."""
    from dataclasses import asdict

    from .report.html import audit_page
    from .tensorrt.audit import audit as audit_engine

    model = _load(options)
    _check_files(options)
    done = audit_engine(
        model,
        backend=options.backend,
        shapes=dict(options.shapes),
        tf32=options.tf32,
        beside_float=not options.no_float,
    )
    say(done)
    if options.json:
        _write_json_value(options.json, {"engine": str(done.backend), **asdict(done)})
        say(f"wrote {options.json}")
    if options.html:
        _write_text(options.html, audit_page(options.model.name, done))
        say(f"wrote {options.html}")
    return OK


def _is_data_given(options: argparse.Namespace) -> bool:
    return options.data is not None or options.data_loader_script is not None


def _data(options: argparse.Namespace) -> Data | None:
    """What --data or --data-loader-script names."""
    data: Path | str | None = options.data if options.data is not None else options.data_loader_script
    return data


def _preprocessing(options: argparse.Namespace) -> Preprocessing | None:
    from .calibration.images import Preprocessing

    return Preprocessing.from_toml(options.preprocess) if options.preprocess else None


def _check_data(options: argparse.Namespace) -> None:
    """Refuse, before any work, data options that do not go together."""
    if options.data is not None and options.data_loader_script is not None:
        raise QdqError("--data and --data-loader-script both give data: leave one out")
    if _is_data_given(options) and options.shapes:
        raise QdqError("--shapes is for made-up inputs: leave it out with --data")
    if options.preprocess is not None and options.data is None:
        raise QdqError("--preprocess goes with --data and a folder of images")


def _load(options: argparse.Namespace) -> Model:
    from .model import load

    return load(
        options.model,
        requantize=getattr(options, "requantize", False),
        simplify=getattr(options, "simplify", False),
        custom_ops=getattr(options, "custom_ops", ()),
    )


def _make_plan(model: Model, options: argparse.Namespace, floats: Iterable[str] = ()) -> Plan:
    """The plan; `floats` are ops, by their first outputs, that are to stay float too."""
    from . import pipeline

    return pipeline.plan(
        model,
        placement=options.placement,
        include=options.include,
        exclude=options.exclude,
        op_types=options.op_types,
        floats=frozenset(floats),
    )


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _check_files(options: argparse.Namespace, *outputs: Path | None) -> None:
    """Refuse, before any work, outputs that cannot be written, that overwrite an input, or each other."""
    from .storage import is_same, spare_weights

    named = ("model", "quantized", "data", "plan_file", "calibration_cache", "placement", "preprocess")
    inputs = [Path(value) for name in named if (value := getattr(options, name, None)) is not None]
    inputs += _scripts(options)
    stats = getattr(options, "stats", None)
    inputs += stats if isinstance(stats, list) else [stats] if stats else []
    reports = [getattr(options, name, None) for name in ("json", "html", "svg", "write_cache")]
    seen: list[Path] = []
    for output in (path for path in (*outputs, *reports) if path is not None):
        if output.is_dir():
            raise QdqError(f"{output} is a folder: name a file")
        if not output.parent.is_dir():
            raise QdqError(f"the folder {output.parent} does not exist: create it, or name another output")
        if not output.exists() and not os.access(output.parent, os.W_OK):
            raise QdqError(f"{output} cannot be written: the folder {output.parent} takes no files from you")
        if _is_in_data(output, options):
            raise QdqError(f"{output} would lie among the data, and be read as one of them: name another folder")
        if any(is_same(output, other) for other in inputs):
            raise QdqError(f"{output} is the input itself, which is never overwritten: name another output")
        if any(is_same(output, other) for other in seen):
            raise QdqError(f"{output} is named for two outputs: give each its own file")
        spare_weights(output)
        seen.append(output)


def _scripts(options: argparse.Namespace) -> list[Path]:
    """The files of the scripts named, with or without a function behind them."""
    from .calibration.scripts import script_file

    named = (getattr(options, name, None) for name in ("data", "data_loader_script", "score_script"))
    return [file for value in named if value is not None and (file := script_file(value))]


def _is_in_data(output: Path, options: argparse.Namespace) -> bool:
    data = getattr(options, "data", None)
    return data is not None and data.is_dir() and data.resolve() in output.resolve().parents


def _check_gates(options: argparse.Namespace) -> None:
    """Refuse, before any work, gates that cannot be judged here."""
    from .tensorrt.engine import has_gpu

    _check_data(options)
    if options.min_agreement is not None and not 0 <= options.min_agreement <= 1:
        raise QdqError(f"--min-agreement is a share between 0 and 1, not {options.min_agreement:g}")
    if options.min_speedup is not None and not options.engine:
        raise QdqError("--min-speedup goes with --engine")
    if options.min_speedup is not None and not has_gpu():
        raise QdqError("--min-speedup: there is no GPU to measure on")


def _check_judged(comparison: Comparison, options: argparse.Namespace) -> None:
    """Refuse, before anything is written, gates that this model's outputs give no figure for."""
    if options.min_agreement is not None and comparison.agreement is None:
        raise QdqError("--min-agreement: no output looks like class scores; use --min-sqnr")
    if options.min_sqnr is not None and not comparison.outputs:
        raise QdqError("--min-sqnr: the model has no output that is a tensor of numbers")


def _gate(comparison: Comparison | None, options: argparse.Namespace, report: EngineReport | None) -> int:
    if comparison is None:
        return OK
    failed = []
    if options.min_sqnr is not None and not comparison.sqnr >= options.min_sqnr:
        failed.append(f"SQNR {comparison.sqnr:.1f} dB is below {options.min_sqnr:g} dB")
    if options.min_agreement is not None and not (comparison.agreement or 0) >= options.min_agreement:
        failed.append(f"top-1 agreement {comparison.agreement or 0:.3f} is below {options.min_agreement:g}")
    if options.min_speedup is not None and not ((report and report.speedup) or 0) >= options.min_speedup:
        failed.append(f"INT8 is {(report and report.speedup) or 0:.2f}x as fast, below {options.min_speedup:g}x")
    for text in failed:
        print(f"gate failed: {text}", file=sys.stderr)
    return GATE_FAILED if failed else OK


def _say_notes(model: Model, say: Callable[[object], None]) -> None:
    for note in (*model.notes, *model.graph.notes):
        say(f"note: {note}")


def _say_dropped(scales: Scales, plan: Plan, say: Callable[[object], None]) -> None:
    if not scales.dropped:
        return
    say(f"{count(len(list(scales.sites(plan))), 'pair')} of {len(plan.sites)} placed:")
    for edge, reason in scales.dropped.items():
        say(f"  {edge} stays float: {reason}")


def _say_comparison(comparison: Comparison, say: Callable[[object], None]) -> None:
    say(comparison.figures)
    if comparison.verdict:
        _shout(comparison.verdict)


def _refinements(result: Result) -> dict[str, Any]:
    """What was chosen and corrected, without the weights and biases themselves."""
    from dataclasses import asdict, replace

    rounding = replace(result.rounding, values={}) if result.rounding else None
    correction = replace(result.correction, values={}, errors=()) if result.correction else None
    done = {"choice": result.choice, "mixed": result.mixed, "rounding": rounding, "correction": correction}
    found = {name: asdict(each) for name, each in done.items() if each}
    for facts in found.values():
        facts.pop("values", None)
        facts.pop("errors", None)
    return found


def _write_json(
    path: Path, plan: Plan | None, comparison: Comparison | None, refinements: dict[str, Any] | None = None
) -> None:
    import json
    from dataclasses import asdict

    content: dict[str, Any] = json.loads(plan.to_json()) if plan else {}
    if comparison:
        content["comparison"] = {**asdict(comparison), "verdict": comparison.verdict}
    if refinements is not None:
        content["refinements"] = refinements
    _write_json_value(path, content)


def _write_json_value(path: Path, content: Any) -> None:
    import json

    _write_text(path, json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: an SQNR without noise becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_text(path: Path, text: str) -> None:
    from .storage import write_atomically

    write_atomically(path, text.encode())


def _shout(text: str) -> None:
    from rich.console import Console
    from rich.panel import Panel

    Console(stderr=True).print(Panel(text, title="WARNING", border_style="bold red"))


@contextlib.contextmanager
def _progress_bar(options: argparse.Namespace) -> Iterator[Progress | None]:
    """A bar per stage on stderr; none where stderr is not a terminal or --quiet is given."""
    if options.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
