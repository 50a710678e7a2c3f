"""The command line: `qdq-insert`, and `qdq-surgeon` with one subcommand per stage.

Exit codes: 0 done, 1 a gate failed, 2 bad input (one line on stderr, nothing half-written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import commands
from .errors import QdqError

BAD_INPUT, INTERRUPTED = 2, 130

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
    return _run(parser, parser.parse_args(arguments), commands.insert)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script `qdq-surgeon`."""
    parser = _Parser(
        prog="qdq-surgeon",
        description="The stages of qdq-insert, one subcommand each.",
        examples="qdq-surgeon plan model.onnx\nqdq-surgeon compare model.onnx model.qdq.onnx --data eval.npz",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, options, text, examples in (
        ("insert", _insert_options, "insert Q/DQ pairs: the same as qdq-insert", _INSERT_EXAMPLES),
        ("plan", _plan_options, "say where pairs would go, and why; needs no data", _PLAN_EXAMPLES),
        ("calibrate", _calibrate_options, "run the float model once, keep its statistics", _CALIBRATE_EXAMPLES),
        (
            "sensitivity",
            _sensitivity_options,
            "rank pairs and ops by what they add to the error",
            _SENSITIVITY_EXAMPLES,
        ),
        ("merge", _merge_options, "put the statistics of several runs together", _MERGE_EXAMPLES),
        ("compare", _compare_options, "measure a Q/DQ model against its float model", _COMPARE_EXAMPLES),
        ("strip", _strip_options, "take Q/DQ pairs, from any producer, out of a model", _STRIP_EXAMPLES),
        ("lint", _lint_options, "find what TensorRT refuses or runs in float in any Q/DQ model", _LINT_EXAMPLES),
        ("build", _build_options, "build a TensorRT engine, strongly typed", _BUILD_EXAMPLES),
        ("audit", _audit_options, "build the engine and show what it did with every pair", _AUDIT_EXAMPLES),
    ):
        command = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            examples=examples,
            usage=f"%(prog)s {_POSITIONALS.get(name, 'MODEL')} [options]",
        )
        options(command)
        command.set_defaults(run=getattr(commands, name), parser=command)
    chosen = parser.parse_args(arguments)
    return _run(chosen.parser, chosen, chosen.run)


_POSITIONALS = {"compare": "MODEL QUANTIZED", "merge": "STATS [STATS ...]"}

_INSERT_EXAMPLES = "qdq-surgeon insert model.onnx --data calibration.npz\nqdq-surgeon insert model.onnx --plan"
_PLAN_EXAMPLES = "qdq-surgeon plan model.onnx --explain conv1\nqdq-surgeon plan model.onnx --json plan.json"
_CALIBRATE_EXAMPLES = (
    "qdq-surgeon calibrate model.onnx --data calibration.npz\n"
    "qdq-surgeon calibrate model.onnx --data images/ --preprocess images.toml -o stats.npz --resume\n"
    "qdq-surgeon calibrate model.onnx --data arrays/ --shard 2/8 -o part2.npz"
)
_MERGE_EXAMPLES = "qdq-surgeon merge part1.npz part2.npz -o stats.npz\nqdq-insert model.onnx --stats stats.npz"
_COMPARE_EXAMPLES = (
    "qdq-surgeon compare model.onnx model.qdq.onnx --data eval.npz\n"
    "qdq-surgeon compare model.onnx model.qdq.onnx --data eval.npz --min-agreement 0.98"
)


_SENSITIVITY_EXAMPLES = (
    "qdq-surgeon sensitivity model.onnx --data calibration.npz\n"
    "qdq-surgeon sensitivity model.onnx --data calibration.npz --html noise.html"
)
_STRIP_EXAMPLES = "qdq-surgeon strip model.qdq.onnx\nqdq-surgeon strip model.qdq.onnx --op-types Add -o mended.onnx"
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
    parser.add_argument("model", type=Path, help="an ONNX model, float or with Q/DQ pairs")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="where to write (default: MODEL.qdq.onnx)")
    parser.add_argument(
        "--external-data", action="store_true", help="put the weights into OUT.data (above 2 GB always)"
    )
    _data_options(parser)
    _placement_options(parser)
    _run_options(parser)
    parser.add_argument("--method", default="mse", help="range method: mse (default), max, entropy, percentile:P, auto")
    parser.add_argument("--stats", type=Path, metavar="FILE", help="take the statistics of `qdq-surgeon calibrate -o`")
    parser.add_argument("--calibration-cache", type=Path, metavar="FILE", help="take scales from a TensorRT .cache")
    parser.add_argument("--write-cache", type=Path, metavar="FILE", help="write the scales as a TensorRT .cache too")
    _accuracy_options(parser)
    parser.add_argument("--float16", action="store_true", help="put the un-quantized rest and the scales into FP16")
    parser.add_argument("--float16-io", action="store_true", help="with --float16: inputs and outputs too")
    parser.add_argument("--engine", action="store_true", help="build engines too, audit and (with a GPU) time them")
    parser.add_argument("--backend", metavar="NAME", help="tensorrt or tensorrt-rtx (default: what is installed)")
    parser.add_argument("--trtexec", metavar="TARGET", nargs="?", const="", help="print the trtexec command line")
    parser.add_argument("--simplify", action="store_true", help="let onnxslim rewrite the graph first")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop; needs no data")
    parser.add_argument("--explain", metavar="NODE", help="with --plan: the full story of one node")
    parser.add_argument("--plan-file", type=Path, metavar="FILE", help="apply a plan saved with --plan --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan (and the comparison) as JSON")
    parser.add_argument("--no-compare", action="store_true", help="leave the comparison with the float model out")
    _gate_options(parser)
    _manner_options(parser)


def _accuracy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gptq", action="store_true", help="round weights for what their layers compute (slower)")
    parser.add_argument(
        "--weights", choices=("pairs", "int8"), default="pairs", help="int8: store integers, a quarter of the file"
    )
    parser.add_argument("--no-bias-correction", action="store_true", help="leave the biases as they are")
    parser.add_argument(
        "--float-worst",
        type=_positive,
        default=0,
        metavar="N",
        help="keep the N ops that add most to the error in float",
    )
    parser.add_argument("--target-sqnr", type=float, metavar="DB", help="keep as little in float as reaches this SQNR")
    parser.add_argument("--target-agreement", type=float, metavar="SHARE", help="... this top-1 agreement (0 to 1)")
    parser.add_argument("--target-score", type=float, metavar="X", help="... this number by --score-script")
    parser.add_argument(
        "--score-script", metavar="FILE", help="a Python FILE[:NAME] with score(run), your own measure of a model"
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="an ONNX model, float or with Q/DQ pairs")
    _placement_options(parser)
    parser.add_argument("--explain", metavar="NODE", help="the full story of one node")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    _manner_options(parser)


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="an ONNX model, float or with Q/DQ pairs")
    parser.add_argument("-o", "--output", type=Path, metavar="STATS", help="write the statistics (.npz)")
    _data_options(parser)
    _run_options(parser)
    parser.add_argument("--shard", type=_part, metavar="I/N", help="take the I-th of N parts of the data")
    parser.add_argument("--resume", action="store_true", help="with -o: go on from where a run was interrupted")
    parser.add_argument("--ranges-only", action="store_true", help="no histograms: faster, for --method max alone")
    _placement_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ranges as JSON")
    _manner_options(parser)


def _merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stats", type=Path, nargs="+", metavar="STATS", help="files of `qdq-surgeon calibrate -o`")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", required=True, help="where to write all of them")
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


def _strip_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Q/DQ model from any producer")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="where to write (default: MODEL.float.onnx)")
    _filter_options(
        parser, "make only these nodes float", "leave the pairs of these nodes", "make only these op types float"
    )
    _manner_options(parser)


def _sensitivity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a float ONNX model")
    _data_options(parser)
    _placement_options(parser)
    _run_options(parser)
    parser.add_argument("--method", default="mse", help="range method: mse (default), max, entropy, percentile:P")
    parser.add_argument("--measure", type=_positive, default=8, metavar="N", help="samples to measure on (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the ranking of ops as a chart")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write charts and tables as a page")
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
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="an .npz, .npy, Polygraphy .json or .py, or a folder (see the README)",
    )
    parser.add_argument(
        "--data-loader-script", metavar="FILE", help="a Python FILE[:NAME] with load_data(), as Polygraphy has it"
    )
    parser.add_argument("--preprocess", type=Path, metavar="TOML", help="how images become inputs (see the README)")
    parser.add_argument(
        "--custom-ops", type=Path, action="append", default=[], metavar="LIB", help="a library of ops for onnxruntime"
    )
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


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--provider", default="cpu", help="where onnxruntime calibrates: cpu (default), cuda, tensorrt")
    parser.add_argument(
        "--memory", type=_bytes, metavar="SIZE", help="how much memory a calibration may take, such as 2G"
    )


def _placement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--placement", default="tensorrt", metavar="NAME|FILE", help="rules: a preset, a .toml file, or a comma list"
    )
    _filter_options(parser, "quantize only these nodes", "keep these nodes float", "quantize only these op types")
    parser.add_argument("--requantize", action="store_true", help="take out the pairs that the model comes with first")


def _filter_options(parser: argparse.ArgumentParser, include: str, exclude: str, op_types: str) -> None:
    for option, metavar, text in (
        ("--include", "NODE", f"{include} (names or globs)"),
        ("--exclude", "NODE", f"{exclude} (names or globs)"),
        ("--op-types", "OP", op_types),
    ):
        parser.add_argument(option, nargs="+", action="extend", default=[], metavar=metavar, help=text)


def _gate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-sqnr", type=float, metavar="DB", help="exit 1 if an output's SQNR is lower")
    parser.add_argument("--min-speedup", type=float, metavar="X", help="with --engine: exit 1 if INT8 is slower")
    parser.add_argument("--min-agreement", type=float, metavar="SHARE", help="exit 1 if top-1 agreement is lower")


def _manner_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    parser.add_argument("--verbose", action="store_true", help="say what happens on the way")


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
    restore = _end_like_an_interrupt()
    try:
        return command(options, (lambda _: None) if options.quiet else _say)
    except QdqError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as interrupt:
        print(f"{parser.prog}: interrupted, {str(interrupt) or 'no file was left half-written'}", file=sys.stderr)
        return INTERRUPTED
    finally:
        log.removeHandler(handler)
        restore()


def _end_like_an_interrupt() -> Callable[[], object]:
    """Let SIGTERM, which job schedulers send, end the command as Ctrl-C does; returns what undoes that."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    return lambda: signal.signal(signal.SIGTERM, before)


def _say(text: object) -> None:
    """Print; where nobody reads on, the work goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _bytes(text: str) -> int:
    """'512M' -> 536870912."""
    number, unit = text[:-1], text[-1:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: write a number with M or G, such as 512M")
    return int(float(number) * _UNITS[unit])


_UNITS = {"M": 1 << 20, "G": 1 << 30}


def _part(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N with I from 1 to N, such as 2/8")
    return int(part), int(parts)


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
