"""The whole zoo through the whole line: plan, calibrate, insert, check, run, compare, build an engine.

    python tools/zoo_sweep.py [NAME ...] [--no-engines] [--tensors] [--json FILE]

Each model runs in a process of its own with a time limit. Data are real where the zoo has any that fit the model;
where they are those of another model ("borrowed") or made up, its row says so. `--tensors` lists, for each trained
model below 15 dB, the nodes behind which the Q/DQ model loses most. The program fails where a model ended in a
traceback.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import traceback
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, helper
from zoo import labelled, zoo_folder

import qdq_surgeon
from qdq_surgeon.calibration.feeds import Batch, Feeds, default_data, read_data
from qdq_surgeon.calibration.images import Preprocessing, read_images
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.model import Model
from qdq_surgeon.report.tables import decibels

Feed = dict[str, NDArray[Any]]
Step = Callable[[], str]

LIMIT_SECONDS = 300
BATCHES = 32
"""At most so many batches of a model's data are used: three in four calibrate, the others measure."""
POOR = 15.0
"""Below so many dB a trained model's loss wants an explanation."""
STEPS = ("plan", "calibrate", "insert", "check", "run", "engine")
UNTRAINED = ("light_models", "optimum_tiny", "mnist_torch/tinybert")
RATE = 16000


# ---- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A folder of images, and how they become a model's input."""

    folder: str
    how: Preprocessing
    kind: str = "real images"


BORROWED = "borrowed images"
FACES, STREETS, PAGES = "ultraface/data", "fastestdet/data", "ppocr/data"
IMAGES: Mapping[str, Images] = {
    "ultraface": Images(FACES, Preprocessing((0, 255), mean=127, std=128)),
    "yunet": Images(FACES, Preprocessing((0, 255), color="BGR", size=320), BORROWED),
    "deeplab": Images(STREETS, Preprocessing((-1, 1)), BORROWED),
    "tbefn": Images(STREETS, Preprocessing((0, 0.2)), BORROWED),
    "fastestdet": Images(STREETS, Preprocessing((0, 1), color="BGR")),
    "fsanet": Images(FACES, Preprocessing((0, 255), mean=127.5, std=128, color="BGR"), BORROWED),
    "v2.0_cls": Images(PAGES, Preprocessing((-1, 1), color="BGR", size=(48, 192))),
    "v2.0_det": Images(
        PAGES, Preprocessing((0, 1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), color="BGR", size=320)
    ),
    "super_resolution": Images(STREETS, Preprocessing((0, 1)), BORROWED),
    "SqueezeNet_fp16": Images(
        "imagenet_sample/dev500", Preprocessing((0, 255), (103.939, 116.779, 123.68), color="BGR", crop=224, size=256)
    ),
}


def model_data(path: Path, model: Model, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Batch], str]:
    """The batches for a model of the zoo, and what they are."""
    zoo, name = zoo_folder(), str(path)
    for part, images in IMAGES.items():
        if part in name:
            return _first(_pictures(zoo / images.folder, model, images.how)), images.kind
    for part, (kind, sounds) in SOUNDS.items():
        if part in name:
            return _first(read_data(sounds(zoo, path), model)), kind
    for entry in labelled():
        if entry.model.samefile(path):
            return _first(read_data(entry.calibration[: 4 * BATCHES], model)), "real, labelled"
    feeds = default_data(model, shapes, Session(model.original).runs)
    return _first(feeds), "made up" if feeds.synthetic else "test_data_set"


def _first(feeds: Feeds) -> list[Batch]:
    return list(islice(feeds.batches, BATCHES))


def _pictures(folder: Path, model: Model, how: Preprocessing) -> Feeds:
    if not (folder / "labels.csv").exists():
        return read_images(folder, model, how)
    import tempfile  # the labels lie among the images

    with tempfile.TemporaryDirectory() as links:
        for image in sorted(folder.rglob("*.jpg"))[:BATCHES]:
            (Path(links) / image.name).symlink_to(image.resolve())
        feeds = read_images(links, model, how)
        return replace(feeds, batches=iter(list(feeds.batches)))


def _sound(path: Path, rate: int) -> NDArray[np.float32]:
    """A mono WAV file in -1..1 at another rate, by linear interpolation."""
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
        times = np.arange(0, len(samples) / file.getframerate(), 1 / rate)
        return np.interp(times, np.arange(len(samples)) / file.getframerate(), samples).astype(np.float32)


def _frames(sound: NDArray[np.float32], size: int, hop: int) -> NDArray[np.float32]:
    return np.lib.stride_tricks.sliding_window_view(sound, size)[::hop]


def _streamed(path: Path, feeds: Iterable[Feed], states: Mapping[str, str]) -> Iterator[Feed]:
    """Every fourth step of a streaming model, with the states (input -> output) that the steps before it left."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shapes = {value.name: [d if isinstance(d, int) else 1 for d in value.shape] for value in session.get_inputs()}
    kept = {name: np.zeros(shapes[name], np.float32) for name in states}
    for index, feed in enumerate(feeds):
        if index % 4 == 0:
            yield {**feed, **kept}
        kept = dict(zip(states, session.run(list(states.values()), {**feed, **kept}), strict=True))


def _dtln(zoo: Path, path: Path) -> Iterator[Feed]:
    frames = _frames(_sound(zoo / "gtcrn/data/mix.wav", RATE), 512, 128)
    magnitudes = np.abs(np.fft.rfft(frames)).astype(np.float32)
    feeds = ({"input_2": frame[None, None]} for frame in magnitudes)
    return _streamed(path, feeds, {"input_3": "tf_op_layer_stack_2"})


def _gtcrn(zoo: Path, path: Path) -> Iterator[Feed]:
    window = np.sqrt(np.hanning(513)[:-1])
    spectra = np.fft.rfft(_frames(_sound(zoo / "gtcrn/data/mix.wav", RATE), 512, 256) * window)
    parts = np.stack([spectra.real, spectra.imag], -1).astype(np.float32)
    feeds = ({"mix": frame[None, :, None]} for frame in parts)
    names = ("conv_cache", "tra_cache", "inter_cache")
    return _streamed(path, feeds, {name: f"{name}_out" for name in names})


def _silero(zoo: Path, path: Path) -> Iterator[Feed]:
    frames = _frames(_sound(zoo / "gtcrn/data/mix.wav", RATE), 576, 512)
    feeds = ({"input": frame[None], "sr": np.array(RATE)} for frame in frames)
    return _streamed(path, feeds, {"state": "stateN"})


def _pitch(zoo: Path, path: Path) -> Iterator[Feed]:
    windows = _frames(_sound(zoo / "basic_pitch/data/vocadito_10.wav", 22050), 43844, 11025)
    return ({"serving_default_input_2:0": window[None, :, None]} for window in windows)


SOUNDS: Mapping[str, tuple[str, Callable[[Path, Path], Iterator[Feed]]]] = {
    "dtln": ("borrowed speech", _dtln),
    "gtcrn": ("real speech", _gtcrn),
    "silero": ("borrowed speech", _silero),
    "basic_pitch": ("real music", _pitch),
}


# ---- one model -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What became of one model. `steps` holds the outcome of each step that was reached.

    `sqnr` is that of the default line, `plain` that without bias correction, in dB.
    """

    file: str
    group: str
    data: str = ""
    pairs: int = 0
    sqnr: float | None = None
    plain: float | None = None
    verdict: str = ""
    seconds: float = 0.0
    steps: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    traceback: str = ""
    losses: list[str] = field(default_factory=list)


class _Sweep:
    """One model on its way along the line; each step says how it went."""

    def __init__(self, path: Path, row: Row, shapes: Mapping[str, tuple[int, ...]], tensors: bool) -> None:
        self.path, self.row, self.shapes, self.tensors = path, row, shapes, tensors

    def run(self, engine: bool) -> None:
        """All steps in turn, up to one that refuses the model or breaks."""
        steps: dict[str, Step] = {name: getattr(self, f"_{name}") for name in STEPS}
        for name, step in steps.items():
            if name == "engine" and not engine:
                return
            if not self._done(name, step):
                return

    def _done(self, name: str, step: Step) -> bool:
        try:
            self.row.steps[name] = step()
            return not (name == "plan" and not self.plan.sites)
        except qdq_surgeon.QdqError as error:
            self.row.steps[name] = "refused"
            self.row.refused = f"qdq-insert: error: {error}"
        except Exception:
            self.row.steps[name] = "TRACEBACK"
            self.row.traceback = traceback.format_exc()
        return False

    def _plan(self) -> str:
        self.model = qdq_surgeon.load(self.path)
        self.plan = qdq_surgeon.plan(self.model)
        return "ok" if self.plan.sites else "nothing to do"

    def _calibrate(self) -> str:
        batches, self.row.data = model_data(self.path, self.model, self.shapes)
        enough = len(batches) >= 8
        self.measuring = batches[3::4] if enough else batches
        self.calibrating = _feeds(batch for index, batch in enumerate(batches) if index % 4 != 3 or not enough)
        self.statistics = qdq_surgeon.calibrate(self.model, self.plan, self.calibrating)
        return "ok"

    def _insert(self) -> str:
        scales = qdq_surgeon.choose(self.model, self.plan, self.statistics)
        self.plain = qdq_surgeon.insert(self.model, self.plan, scales)
        self.row.pairs = len(list(scales.sites(self.plan)))
        result = qdq_surgeon.apply(self.model, self.plan, self.calibrating, statistics=self.statistics, compare=False)
        self.quantized = result.model
        return "ok"

    def _check(self) -> str:
        reason = _checked(self.quantized)
        if reason is None:
            return "ok"
        if _checked(self.model.original) is not None:
            return "as the input"
        raise AssertionError(f"the input passes onnx's checker, the result does not: {reason}")

    def _run(self) -> str:
        feeds = _feeds(self.measuring)
        comparison = qdq_surgeon.compare(self.model, self.quantized, feeds)
        self.row.sqnr = comparison.sqnr
        self.row.plain = qdq_surgeon.compare(self.model, self.plain, feeds).sqnr
        self.row.verdict = comparison.verdict
        if self.tensors and self.row.group == "trained" and comparison.sqnr < POOR:
            lost = losses(self.model, self.quantized, self.measuring[:4])
            self.row.losses = [str(loss) for loss in lost[:8]]
        return "ok"

    def _engine(self) -> str:
        from qdq_surgeon.tensorrt.audit import audit
        from qdq_surgeon.tensorrt.engine import build

        profile = {name: (sizes,) for name, sizes in self.shapes.items()}
        try:
            done = audit(self.quantized, backend="tensorrt-rtx", shapes=profile, beside_float=False)
            return f"{len(done.planned) - len(done.in_float)}/{len(done.planned)} INT8"
        except qdq_surgeon.QdqError as error:
            reason = str(error)
        try:
            build(self.model, backend="tensorrt-rtx", shapes=profile)
        except qdq_surgeon.QdqError:
            return "refused in float too"
        return f"REFUSED, not in float: {reason[:200]}"


def _feeds(batches: Iterable[Batch]) -> list[Feed]:
    return [batch.feed for batch in batches]


def _checked(model: ModelProto) -> str | None:
    """Why onnx's full check refuses a model, None where it does not."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        return str(error)
    return None


# ---- where the accuracy goes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """One node of the float model: the SQNR of its worst input and of its output in the Q/DQ model, in dB.

    `pairs` is what rounding alone leaves of each of its inputs that reads a pair: input name -> dB.
    """

    node: str
    tensor: str
    before: float
    after: float
    pairs: Mapping[str, float]

    @property
    def drop(self) -> float:
        return min(self.before, 100.0) - min(self.after, 100.0)

    def __str__(self) -> str:
        pairs = ", ".join(f"{name} alone {decibels(value)}" for name, value in self.pairs.items())
        return f"{self.node} -> {self.tensor}: {decibels(self.before)} in, {decibels(self.after)} out ({pairs})"


def losses(model: Model, quantized: ModelProto, batches: Iterable[Batch]) -> list[Loss]:
    """The nodes of the top graph, that with the largest drop of SQNR first."""
    view = qdq_surgeon.load(quantized).graph
    nodes = [node for node in model.graph.nodes if not node.scope]
    names = [name for node in nodes for name in node.outputs if model.graph.is_float(name)]
    pairs = {node.outputs[0]: _source(node, view) for node in view.nodes if node.op == "DequantizeLinear"}
    left, right = _tapped(model.proto, names), _tapped(quantized, [*names, *pairs])
    sums: dict[str, NDArray[np.float64]] = {name: np.zeros(2) for name in (*names, *pairs)}
    for batch in batches:
        (expected,), (actual,) = left.run(batch, names), right.run(batch, [*names, *pairs])
        found = dict(zip((*names, *pairs), actual, strict=True))
        known = {**batch.feed, **dict(zip(names, expected, strict=True))}
        for name in names:
            sums[name] += _powers(known[name], found[name])
        for name, source in pairs.items():
            original = found.get(source, batch.feed.get(source))
            original = view.value(source) if original is None else original
            sums[name] += _powers(original, found[name])
    found_sqnr = {name: _sqnr(total) for name, total in sums.items()}
    made = {node.first_output: node for node in view.nodes}
    result = []
    for node in nodes:
        if node.first_output not in found_sqnr:
            continue
        before = min((found_sqnr.get(name, math.inf) for name in node.inputs), default=math.inf)
        read = {pairs[name]: found_sqnr[name] for name in made[node.first_output].inputs if name in pairs}
        result.append(Loss(node.label, node.first_output, before, found_sqnr[node.first_output], read))
    return sorted(result, key=lambda loss: loss.drop, reverse=True)


def _source(node: Any, view: Any) -> str:
    return str(view.producer(node.inputs[0]).inputs[0])


def _tapped(proto: ModelProto, names: Iterable[str]) -> Session:
    """A session of the model with these tensors as outputs, each pair rounding where it stands."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in present)
    return Session(copy, simulate=True)


def _powers(expected: Any, actual: Any) -> NDArray[np.float64]:
    """Signal and noise; nothing for shapes that differ (a NonMaxSuppression kept other boxes)."""
    if np.shape(expected) != np.shape(actual):
        return np.zeros(2)
    left, right = np.float64(expected), np.float64(actual)
    good = np.isfinite(left) & np.isfinite(right)
    return np.array([np.sum(left**2, where=good), np.sum((left - right) ** 2, where=good)])


def _sqnr(powers: NDArray[np.float64]) -> float:
    signal, noise = powers
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# ---- all models ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of file names: only these models")
    parser.add_argument("--no-engines", action="store_true", help="leave TensorRT-RTX out")
    parser.add_argument("--tensors", action="store_true", help="say which nodes lose the accuracy of poor models")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(_one(options))))
        return 0
    options.no_engines = options.no_engines or not _has_engines()
    rows = list(_all(options))
    print("\n".join(_report(rows)))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return any(row.traceback for row in rows)


def _has_engines() -> bool:
    from qdq_surgeon.tensorrt.engine import choose_backend

    try:
        choose_backend("tensorrt-rtx")
    except qdq_surgeon.QdqError as error:
        print(f"no engines: {error}", file=sys.stderr)
        return False
    return True


def _paths() -> Iterator[Path]:
    zoo = zoo_folder()
    yield from (zoo / entry["file"] for entry in _index(zoo))
    yield from sorted(zoo.glob("edge/**/*.onnx"))


def _index(zoo: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((zoo / "index.json").read_text())
    return entries


def _one(options: argparse.Namespace) -> Row:
    zoo, start = zoo_folder(), time.perf_counter()
    row = _row(options.one)
    entry = next((entry for entry in _index(zoo) if entry["file"] == row.file), {})
    shapes = {name: tuple(sizes) for name, sizes in (entry.get("test_shapes") or {}).items()}
    _Sweep(options.one, row, shapes, options.tensors).run(engine=not options.no_engines)
    row.seconds = time.perf_counter() - start
    return row


def _row(path: Path) -> Row:
    file = str(path.relative_to(zoo_folder()))
    if file.startswith("edge/"):
        return Row(file, "edge")
    return Row(file, "untrained" if file.startswith(UNTRAINED) else "trained")


def _all(options: argparse.Namespace) -> Iterator[Row]:
    paths = [path for path in _paths() if not options.names or any(name in str(path) for name in options.names)]
    flags = [flag for flag in ("--no-engines", "--tensors") if getattr(options, flag[2:].replace("-", "_"))]
    for index, path in enumerate(paths):
        print(f"{index + 1}/{len(paths)} {path.name}", file=sys.stderr, flush=True)
        yield _in_a_process(path, flags)


def _in_a_process(path: Path, flags: list[str]) -> Row:
    command = [sys.executable, __file__, "--one", str(path), *flags]
    row = _row(path)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        row.traceback = f"still running after {LIMIT_SECONDS} s"
    except (ValueError, IndexError):
        row.traceback = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    return row


def _report(rows: list[Row]) -> Iterator[str]:
    """Markdown: trained models, the worst first; then the untrained, the refusals and the edge cases."""
    through = [row for row in rows if row.sqnr is not None]
    for group in ("trained", "untrained", "edge"):
        yield from _table(group, [row for row in through if row.group == group])
    yield from _listed("refused", {row.file: row.refused for row in rows if row.refused})
    idle = [row.file for row in rows if row.steps.get("plan") == "nothing to do"]
    yield from _listed("nothing to quantize", dict.fromkeys(idle, ""))
    yield from _listed("verdicts", {row.file: row.verdict for row in rows if row.verdict})
    yield from _listed("where the accuracy goes", {row.file: "\n    ".join(row.losses) for row in rows if row.losses})
    broken = {row.file: row.traceback for row in rows if row.traceback}
    yield from _listed("TRACEBACKS", broken)
    refused = sum(bool(row.refused) for row in rows)
    yield f"\n{len(rows)} models: {len(through)} through, {len(idle)} with nothing to quantize, {refused} refused, "
    yield f"{len(broken)} tracebacks; {sum(row.seconds for row in rows):.0f} s"


def _table(group: str, rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield f"\n## {group}\n"
    yield "| model | SQNR, dB | without correction | pairs | data | check | engine | s |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: row.sqnr or 0.0):
        check, engine = row.steps.get("check", "-"), row.steps.get("engine", "-")
        cells = (
            row.file,
            f"{row.sqnr:.1f}",
            f"{row.plain:.1f}",
            row.pairs,
            row.data,
            check,
            engine,
            f"{row.seconds:.0f}",
        )
        yield f"| {' | '.join(map(str, cells))} |"


def _listed(title: str, entries: Mapping[str, str]) -> Iterator[str]:
    if not entries:
        return
    yield f"\n## {title}\n"
    yield from (f"- {name}: {text}" if text else f"- {name}" for name, text in entries.items())


if __name__ == "__main__":
    sys.exit(main())
