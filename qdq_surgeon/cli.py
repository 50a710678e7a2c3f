"""The command line: `qdq-insert`, and `qdq-surgeon` with one subcommand per stage.

Exit codes: 0 done, 1 a gate failed, 2 bad input (one line on stderr, nothing half-written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .edges import Plan, count
from .errors import PlanError, QdqError

if TYPE_CHECKING:
    from .calibration.taps import Progress
    from .comparison import Comparison
    from .model import Model
    from .scales import Scales
    from .tensorrt.runs import EngineReport

OK, GATE_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

SYNTHETIC_WARNING = (
    "No calibration data was given, so the scales come from MADE-UP INPUTS. This model is good for trying out the "
    "tool and TensorRT, not for use: its accuracy means nothing. Give real samples with --data."
)

SYNTHETIC_COMPARISON = (
    "No data was given, so the models were compared on MADE-UP INPUTS. These figures say nothing about accuracy. Give "
    "real samples with --data."
)

log = logging.getLogger("qdq_surgeon")


def insert_main(arguments: Sequence[str] | None = None) -> int:
    """The console script `qdq-insert`."""
    parser = _Parser(
        prog="qdq-insert",
        description="Insert INT8 Q/DQ pairs into a float ONNX model for TensorRT, and compare it with the float model.",
        examples="qdq-insert model.onnx --data calibration.npz\nqdq-insert model.onnx --plan --explain conv1",
        usage="%(prog)s MODEL [options]",
    )
    _insert_options(parser)
    return _run(parser, parser.parse_args(arguments), _insert)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script `qdq-surgeon`."""
    parser = _Parser(
        prog="qdq-surgeon",
        description="The stages of qdq-insert, one subcommand each.",
        examples="qdq-surgeon plan model.onnx\nqdq-surgeon compare model.onnx model.qdq.onnx --data eval.npz",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, options, run, text, examples in (
        ("insert", _insert_options, _insert, "insert Q/DQ pairs: the same as qdq-insert", _INSERT_EXAMPLES),
        ("plan", _plan_options, _plan, "say where pairs would go, and why; needs no data", _PLAN_EXAMPLES),
        ("calibrate", _calibrate_options, _calibrate, "run the float model once, print ranges", _CALIBRATE_EXAMPLES),
        ("compare", _compare_options, _compare, "measure a Q/DQ model against its float model", _COMPARE_EXAMPLES),
        ("lint", _lint_options, _lint, "find what TensorRT refuses or runs in float in any Q/DQ model", _LINT_EXAMPLES),
        ("build", _build_options, _build, "build a TensorRT engine, strongly typed", _BUILD_EXAMPLES),
        ("audit", _audit_options, _audit, "build the engine and show what it did with every pair", _AUDIT_EXAMPLES),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            examples=examples,
            usage="%(prog)s MODEL [options]" if name != "compare" else "%(prog)s MODEL QUANTIZED [options]",
        )
        options(command)
        command.set_defaults(run=run, parser=command)
    chosen = parser.parse_args(arguments)
    return _run(chosen.parser, chosen, chosen.run)


_INSERT_EXAMPLES = "qdq-surgeon insert model.onnx --data calibration.npz\nqdq-surgeon insert model.onnx --plan"
_PLAN_EXAMPLES = "qdq-surgeon plan model.onnx --explain conv1\nqdq-surgeon plan model.onnx --json plan.json"
_CALIBRATE_EXAMPLES = (
    "qdq-surgeon calibrate model.onnx --data calibration.npz\n"
    "qdq-surgeon calibrate model.onnx --data images/ --samples 64 --json ranges.json"
)
_COMPARE_EXAMPLES = (
    "qdq-surgeon compare model.onnx model.qdq.onnx --data eval.npz\n"
    "qdq-surgeon compare model.onnx model.qdq.onnx --data eval.npz --min-agreement 0.98"
)


_LINT_EXAMPLES = "qdq-surgeon lint model.qdq.onnx\nqdq-surgeon lint other.onnx --fix mended.onnx --target trt10"
_BUILD_EXAMPLES = (
    "qdq-surgeon build model.qdq.onnx -o model.engine\n"
    "qdq-surgeon build model.qdq.onnx --shapes image:1x3x224x224,8x3x224x224,32x3x224x224"
)
_AUDIT_EXAMPLES = "qdq-surgeon audit model.qdq.onnx\nqdq-surgeon audit model.qdq.onnx --html audit.html"


class _Parser(argparse.ArgumentParser):
    """A parser whose help fits a screen and whose errors are one line."""

    def __init__(self, *, prog: str, description: str, examples: str, usage: str | None = None) -> None:
        super().__init__(
            prog,
            usage,
            description=description,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"qdq-surgeon {_version()}", help="print the version")

    def error(self, message: str) -> NoReturn:
        if "required: model" in message:
            message = f"{message}; the model comes first, before the options"
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _insert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the float ONNX model")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="where to write (default: MODEL.qdq.onnx)")
    _data_options(parser)
    _placement_options(parser)
    parser.add_argument("--method", default="mse", help="range method: mse (default), max, entropy, percentile:P")
    parser.add_argument("--calibration-cache", type=Path, metavar="FILE", help="take scales from a TensorRT .cache")
    parser.add_argument("--write-cache", type=Path, metavar="FILE", help="write the scales as a TensorRT .cache too")
    parser.add_argument("--float16", action="store_true", help="put the un-quantized rest and the scales into FP16")
    parser.add_argument("--float16-io", action="store_true", help="with --float16: inputs and outputs too")
    parser.add_argument("--engine", action="store_true", help="build engines too, audit and (with a GPU) time them")
    parser.add_argument("--backend", metavar="NAME", help="tensorrt or tensorrt-rtx (default: what is installed)")
    parser.add_argument("--trtexec", metavar="TARGET", nargs="?", const="", help="print the trtexec command line")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop; needs no data")
    parser.add_argument("--explain", metavar="NODE", help="with --plan: the full story of one node")
    parser.add_argument("--plan-file", type=Path, metavar="FILE", help="apply a plan saved with --plan --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan (and the comparison) as JSON")
    parser.add_argument("--no-compare", action="store_true", help="leave the comparison with the float model out")
    _gate_options(parser)
    _manner_options(parser)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the float ONNX model")
    _placement_options(parser)
    parser.add_argument("--explain", metavar="NODE", help="the full story of one node")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    _manner_options(parser)


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the float ONNX model")
    _data_options(parser)
    _placement_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ranges as JSON")
    _manner_options(parser)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the float ONNX model")
    parser.add_argument("quantized", type=Path, help="the Q/DQ model")
    _data_options(parser, samples=False)
    parser.add_argument("--engine", action="store_true", help="build engines too, audit and (with a GPU) time them")
    parser.add_argument("--backend", metavar="NAME", help="tensorrt or tensorrt-rtx (default: what is installed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    _gate_options(parser)
    _manner_options(parser)


def _lint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Q/DQ model from any producer")
    parser.add_argument("--target", default="trt11", help="what it must run on: trt10, trt11 (default) or rtx")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a mended copy, and say what could not be mended")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings as JSON")
    _manner_options(parser)


def _build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="an ONNX model, float or with Q/DQ pairs")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="where to write (default: MODEL.engine)")
    _engine_options(parser)
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and write TensorRT's timing cache")
    _manner_options(parser)


def _audit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Q/DQ model from any producer")
    _engine_options(parser)
    parser.add_argument("--no-float", action="store_true", help="do not build the float engine beside it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the audit as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the audit as a page")
    _manner_options(parser)


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="tensorrt or tensorrt-rtx (default: what is installed)")
    parser.add_argument(
        "--shapes",
        type=_shapes,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME:MIN,OPT,MAX",
        help="shapes of open inputs: one, or the smallest, usual, largest",
    )
    parser.add_argument("--tf32", action="store_true", help="let FP32 matrix products use TF32")


def _data_options(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    parser.add_argument("--data", type=Path, metavar="PATH", help="an .npz, an .npy, or a folder of them")
    if samples:
        parser.add_argument("--samples", type=_positive, metavar="N", help="calibrate with at most N samples")
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME:1x3x8x8",
        help="sizes for synthetic inputs",
    )


def _placement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--placement", default="tensorrt", metavar="NAME|FILE", help="rules: a preset, a .toml file, or a comma list"
    )
    parser.add_argument(
        "--include",
        nargs="+",
        action="extend",
        default=[],
        metavar="NODE",
        help="quantize only these nodes (names or globs)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="NODE",
        help="keep these nodes float (names or globs)",
    )
    parser.add_argument(
        "--op-types", nargs="+", action="extend", default=[], metavar="OP", help="quantize only these op types"
    )


def _gate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-sqnr", type=float, metavar="DB", help="exit 1 if an output's SQNR is lower")
    parser.add_argument("--min-speedup", type=float, metavar="X", help="with --engine: exit 1 if INT8 is slower")
    parser.add_argument("--min-agreement", type=float, metavar="SHARE", help="exit 1 if top-1 agreement is lower")


def _manner_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    parser.add_argument("--verbose", action="store_true", help="say what happens on the way")


def _insert(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    from . import pipeline
    from .model import save
    from .tensorrt.cache import write_cache
    from .tensorrt.runs import compare_engines, shapes_of
    from .tensorrt.trtexec import trtexec_command

    if options.plan:
        return _plan(options, say)
    _check_insert(options)
    model = _load(options)
    output = options.output or options.model.with_name(f"{options.model.stem}.qdq.onnx")
    _check_files(options, output)
    _say_notes(model, say)
    plan = _read_plan(options.plan_file) if options.plan_file else _make_plan(model, options)
    say(f"{options.model}: {next(plan.lines())}")
    if not plan.sites:
        say("nothing to quantize: the float model is written as it is (--plan says why)")
    with _progress_bar(options) as progress:
        result = pipeline.apply(
            model,
            plan,
            options.data,
            method=options.method,
            samples=options.samples,
            shapes=dict(options.shapes),
            calibration_cache=options.calibration_cache,
            float16=options.float16,
            float16_io=options.float16_io,
            compare=not options.no_compare,
            progress=progress,
        )
    origin = result.scales.origin
    if origin.synthetic and any(not site.weight for site in plan.sites):
        _shout(SYNTHETIC_WARNING)
    if origin.samples:
        say(f"calibrated by {result.scales.method} on {count(origin.samples, 'sample')} of {origin.data}")
    _say_dropped(result.scales, plan, say)
    for note in result.notes:
        say(f"note: {note}")
    if result.comparison:
        say(result.comparison)
        _check_judged(result.comparison, options)
    save(result.model, output)
    say(f"wrote {output}")
    if options.json:
        _write_json(options.json, plan, result.comparison)
        say(f"wrote {options.json}")
    if options.write_cache:
        write_cache(result.scales, plan, options.write_cache)
        say(f"wrote {options.write_cache}")
    if options.trtexec is not None:
        profile = shapes_of(model, result.evaluation) if result.evaluation else {}
        say(trtexec_command(model, output, options.trtexec, profile))
    report = None
    if options.engine and result.comparison:
        data, held_out = result.comparison.data, result.comparison.held_out
        report = compare_engines(model, result.model, result.evaluation, data, held_out, backend=options.backend)
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
    if options.no_compare and (options.engine or any(gate is not None for gate in gates)):
        raise QdqError("--engine, --min-sqnr and --min-agreement need the comparison: leave --no-compare out")
    if options.float16_io and not options.float16:
        raise QdqError("--float16-io goes with --float16")
    check_target(options.trtexec or "")
    _check_gates(options)


def _plan(options: argparse.Namespace, say: Callable[[object], None]) -> int:
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


def _calibrate(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    from . import pipeline
    from .calibration.ranges import range_method
    from .report.tables import table

    model = _load(options)
    _check_files(options)
    _say_notes(model, say)
    plan = _make_plan(model, options)
    with _progress_bar(options) as progress:
        statistics = pipeline.calibrate(
            model, plan, options.data, samples=options.samples, shapes=dict(options.shapes), progress=progress
        )
    if statistics.origin.synthetic:
        _shout(SYNTHETIC_WARNING)
    methods = ("mse", "entropy", "percentile:99.99")
    ranges = {
        name: {"min": s.minimum, "max": s.maximum, **{method: range_method(method)(s) for method in methods}}
        for name, s in statistics.tensors.items()
    }
    rows = [(name, *(f"{value:.5g}" for value in row.values())) for name, row in ranges.items()]
    say(f"{len(ranges)} tensors over {count(statistics.origin.samples, 'sample')} of {statistics.origin.data}")
    say(table(("tensor", "min", "max", *methods), rows))
    if options.json:
        _write_json_value(options.json, {"samples": statistics.origin.samples, "ranges": ranges})
        say(f"wrote {options.json}")
    return OK


def _compare(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    from . import pipeline
    from .calibration.feeds import SYNTHETIC
    from .model import load
    from .tensorrt.runs import compare_engines

    _check_gates(options)
    _check_files(options)
    model, quantized = load(options.model), load(options.quantized)
    with _progress_bar(options) as progress:
        comparison = pipeline.compare(model, quantized, options.data, shapes=dict(options.shapes), progress=progress)
    if options.data is None and comparison.data == SYNTHETIC:
        _shout(SYNTHETIC_COMPARISON)
    say(comparison)
    _check_judged(comparison, options)
    report = None
    if options.engine:
        batches = pipeline.evaluation_batches(model, options.data, dict(options.shapes))
        report = compare_engines(model, quantized.original, batches, comparison.data, None, backend=options.backend)
        say(report)
    if options.json:
        _write_json(options.json, None, comparison)
        say(f"wrote {options.json}")
    return _gate(comparison, options, report)


def _lint(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    from dataclasses import asdict

    from .model import save
    from .tensorrt.lint import lint
    from .tensorrt.mend import mend

    model = _load(options)
    _check_files(options, options.fix)
    report = lint(model, options.target)
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


def _build(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    from .model import write_atomically
    from .tensorrt.engine import TENSORRT_RTX, build

    model = _load(options)
    output = options.output or options.model.with_suffix(".engine")
    _check_files(options, output, options.timing_cache)
    engine = build(
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


def _audit(options: argparse.Namespace, say: Callable[[object], None]) -> int:
    from dataclasses import asdict

    from .report.html import audit_page
    from .tensorrt.audit import audit

    model = _load(options)
    _check_files(options)
    done = audit(
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


def _run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    command: Callable[[argparse.Namespace, Callable[[object], None]], int],
) -> int:
    """Run one command; turn what it raises into one line and an exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if options.verbose else logging.WARNING)
    try:
        return command(options, (lambda _: None) if options.quiet else _say)
    except QdqError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    finally:
        log.removeHandler(handler)


def _say(text: object) -> None:
    """Print; where nobody reads on, the work goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load(options: argparse.Namespace) -> Model:
    from .model import load

    return load(options.model)


def _make_plan(model: Model, options: argparse.Namespace) -> Plan:
    from . import pipeline

    return pipeline.plan(
        model,
        placement=options.placement,
        include=options.include,
        exclude=options.exclude,
        op_types=options.op_types,
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
    named = ("model", "quantized", "data", "plan_file", "calibration_cache", "placement")
    inputs = [Path(value) for name in named if (value := getattr(options, name, None)) is not None]
    reports = [getattr(options, name, None) for name in ("json", "html", "write_cache")]
    seen: list[Path] = []
    for output in (path for path in (*outputs, *reports) if path is not None):
        if output.is_dir():
            raise QdqError(f"{output} is a folder: name a file")
        if not output.parent.is_dir():
            raise QdqError(f"the folder {output.parent} does not exist: create it, or name another output")
        if any(_is_same(output, other) for other in inputs):
            raise QdqError(f"{output} is the input itself, which is never overwritten: name another output")
        if any(_is_same(output, other) for other in seen):
            raise QdqError(f"{output} is named for two outputs: give each its own file")
        seen.append(output)


def _is_same(left: Path, right: Path) -> bool:
    return os.path.realpath(left) == os.path.realpath(right)


def _check_gates(options: argparse.Namespace) -> None:
    """Refuse, before any work, gates that cannot be judged here."""
    from .tensorrt.engine import has_gpu

    if options.data is not None and options.shapes:
        raise QdqError("--shapes is for made-up inputs: leave it out with --data")
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


def _write_json(path: Path, plan: Plan | None, comparison: Comparison | None) -> None:
    import json
    from dataclasses import asdict

    content: dict[str, Any] = json.loads(plan.to_json()) if plan else {}
    if comparison:
        content["comparison"] = asdict(comparison)
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
    from .model import write_atomically

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


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    """'name:1x3x224x224' -> ('name', (1, 3, 224, 224)). The name may hold colons."""
    name, _, sizes = text.rpartition(":")
    parts = sizes.split("x")
    if not name or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write name:1x3x224x224")
    return name, tuple(map(int, parts))


def _shapes(text: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """'name:1x3,4x3,8x3' -> ('name', ((1, 3), (4, 3), (8, 3))); one shape is enough."""
    name, _, shapes = text.rpartition(":")
    return name, tuple(_shape(f"{name}:{shape}")[1] for shape in shapes.split(","))


def _version() -> str:
    from importlib.metadata import version

    return version("qdq-surgeon")
