"""FP32 and INT8 side by side on the labelled models of the zoo, ours step by step and the rivals in the same run.

    python tools/zoo_accuracy.py [--all] [--sides default onnxruntime:MinMax ...] [--markdown] [MODEL ...]

Calibration and measuring samples are disjoint unless --all is given. Agreement is the share of samples on which INT8
and FP32 choose the same class; its standard error is printed, because on 500 samples a point is noise. SQNR is that of
the class scores before a last Softmax, each sample centred. Coverage: weighted ops that read both inputs through a
pair. Seconds are those of the whole job, from the file to the model. All models are simulated alike, every pair
rounding where it stands. onnxruntime is asked for what TensorRT takes: symmetric INT8, weights per channel, float
biases. ModelOpt is measured where it is installed.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from zoo import Labelled, labelled

import qdq_surgeon
from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.calibration.sessions import Session
from qdq_surgeon.model import Model
from qdq_surgeon.refinement.judging import judged
from qdq_surgeon.report.tables import table

EVERY_OP = "every-op.toml"
"""Also what is too small to be faster in INT8, as peers do: for a comparison at equal coverage."""
EVERY_OP_RULES = (
    "".join(
        f'''
[[rule]]
name     = "{name}"
match    = "{match}"
where    = {{ x = "activation", w = "constant" }}
quantize = ["x", "w"]
axis     = {{ w = {axis} }}
because  = "Measured at the coverage of other tools."
'''
        for name, match, axis in (
            ("conv", "Conv(x, w, ...)", 0),
            ("gemm", "Gemm(x, w, ..., transB=0)", 1),
            ("gemm-transposed", "Gemm(x, w, ..., transB=1)", 0),
            ("matmul", "MatMul(x, w)", -1),
        )
    )
    + """
[[rule]]
include = "tensorrt"
"""
)
OURS: Mapping[str, Mapping[str, Any]] = {
    "max alone": {"method": "max", "bias_correction": False},
    "mse alone": {"bias_correction": False},
    "default": {},
    "default, max": {"method": "max"},
    "default, auto": {"method": "auto"},
    "gptq alone": {"bias_correction": False, "gptq": True},
    "default, gptq": {"gptq": True},
    "default, every op": {"placement": EVERY_OP},
    "default, worst 3 float": {"float_worst": 3},
}
"""The steps alone and together; `default` is mse with scale reuse and bias correction."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
HEADS = ("side", "top-1", "agreement", "+-", "SQNR dB", "INT8 ops", "seconds")
PERCENTILE = 99.99


@dataclass(frozen=True)
class Figures:
    """One side on one model."""

    top1: float
    agreement: float
    samples: int
    sqnr: float
    covered: int
    weighted: int
    seconds: float

    @property
    def error(self) -> float:
        """The standard error of the agreement."""
        return math.sqrt(self.agreement * (1 - self.agreement) / self.samples)


def main() -> None:
    sides = _sides()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument(
        "--sides", nargs="+", choices=sides, default=list(sides), help="default: all that are installed"
    )
    parser.add_argument("--all", action="store_true", help="measure on the calibration samples too, as peers report")
    parser.add_argument("--markdown", action="store_true", help="print the means as a Markdown table")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    found: dict[str, list[Figures]] = {side: [] for side in options.sides}
    for pair in labelled(options.all):
        if options.names and pair.name not in options.names:
            continue
        measured = {side: _figures(pair, sides[side]) for side in options.sides}
        for side, figures in measured.items():
            found[side].append(figures)
        print(f"\n{pair.name}: {len(pair.labels)} samples, FP32 top-1 {_float_top1(pair):.3f}")
        print(table(HEADS, [_row(side, figures) for side, figures in measured.items()]), flush=True)
    _print_means(found, options.markdown)


def _row(side: str, figures: Figures) -> tuple[str, ...]:
    return (
        side,
        f"{figures.top1:.3f}",
        f"{figures.agreement:.3f}",
        f"{figures.error:.3f}",
        f"{figures.sqnr:.1f}",
        f"{figures.covered}/{figures.weighted}",
        f"{figures.seconds:.1f}",
    )


def _print_means(found: Mapping[str, list[Figures]], markdown: bool) -> None:
    heads = ("side", "mean agreement", "mean SQNR dB", "INT8 ops", "seconds, all models")
    rows = [
        (
            side,
            f"{np.mean([figures.agreement for figures in every]):.4f}",
            f"{np.mean([figures.sqnr for figures in every]):.2f}",
            f"{sum(figures.covered for figures in every)}/{sum(figures.weighted for figures in every)}",
            f"{sum(figures.seconds for figures in every):.1f}",
        )
        for side, every in found.items()
        if every
    ]
    print()
    if not markdown:
        print(table(heads, rows))
        return
    for cells in (heads, ("---",) * len(heads), *rows):
        print(f"| {' | '.join(cells)} |")


Side = Callable[[Labelled, Model, Path], ModelProto]
"""From a model with calibration samples to a Q/DQ model; the folder is for files."""


def _sides() -> dict[str, Side]:
    sides: dict[str, Side] = {name: _ours(options) for name, options in OURS.items()}
    sides |= {f"onnxruntime:{method}": _onnxruntime(method) for method in ("MinMax", "Entropy", "Percentile")}
    if find_spec("modelopt"):
        sides |= {f"modelopt:{method}": _modelopt(method) for method in ("max", "entropy")}
    return sides


def _ours(options: Mapping[str, Any]) -> Side:
    def make(pair: Labelled, _: Model, folder: Path) -> ModelProto:
        (folder / EVERY_OP).write_text(EVERY_OP_RULES, encoding="utf-8")
        chosen = dict(options)
        if "placement" in options:
            chosen["placement"] = folder / options["placement"]
        samples = len(pair.calibration)
        return qdq_surgeon.quantize(
            folder / "model.onnx", pair.calibration, samples=samples, compare=False, **chosen
        ).model

    return make


def _onnxruntime(method: str) -> Side:
    def make(pair: Labelled, model: Model, folder: Path) -> ModelProto:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        quantize_static(
            folder / "model.onnx",
            folder / "quantized.onnx",
            _Reader(pair, model),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
                "CalibPercentile": PERCENTILE,
            },
        )
        return onnx.load(folder / "quantized.onnx")

    return make


def _modelopt(method: str) -> Side:
    def make(pair: Labelled, model: Model, folder: Path) -> ModelProto:
        from modelopt.onnx.quantization import quantize

        name = model.inputs[0].name
        quantize(
            str(folder / "model.onnx"),
            calibration_data={name: pair.calibration},
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(folder / "quantized.onnx"),
        )
        return onnx.load(folder / "quantized.onnx")

    return make


class _Reader:
    """What onnxruntime calls a CalibrationDataReader: one feed for each sample."""

    def __init__(self, pair: Labelled, model: Model) -> None:
        self._feeds: Iterator[dict[str, Any]] = (
            part.feed
            for batch in read_data(pair.calibration, model).batches
            for part in (batch.part(index, index + 1) for index in range(batch.samples))
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _figures(pair: Labelled, side: Side) -> Figures:
    model = qdq_surgeon.load(pair.model)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model.proto, Path(folder) / "model.onnx")
        started = time.perf_counter()
        quantized = side(pair, model, Path(folder))
        seconds = time.perf_counter() - started
    reference, found = _scores(model.proto, pair, model), _scores(quantized, pair, model, simulate=True)
    signal, noise = (np.sum(np.square(values)) for values in (_centred(reference), _centred(reference - found)))
    chosen = found.argmax(1)
    covered, weighted = _coverage(quantized)
    return Figures(
        float(np.mean(chosen == pair.labels + pair.offset)),
        float(np.mean(chosen == reference.argmax(1))),
        len(pair.labels),
        10 * math.log10(float(signal / noise)) if noise else math.inf,
        covered,
        weighted,
        seconds,
    )


def _float_top1(pair: Labelled) -> float:
    model = qdq_surgeon.load(pair.model)
    return float(np.mean(_scores(model.proto, pair, model).argmax(1) == pair.labels + pair.offset))


def _scores(proto: ModelProto, pair: Labelled, model: Model, simulate: bool = False) -> NDArray[np.float64]:
    """The class scores before a last Softmax, (samples, classes)."""
    name = judged(model.graph)[0]
    copy = ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = Session(copy, simulate=simulate)
    runs = [run[0] for batch in read_data(pair.samples, model).batches for run in session.run(batch, [name])]
    return np.concatenate([scores.reshape(len(scores), -1) for scores in runs]).astype(np.float64)


def _centred(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(scores - scores.mean(1, keepdims=True))


def _coverage(quantized: ModelProto) -> tuple[int, int]:
    """How many weighted nodes read both inputs from a DequantizeLinear, and how many there are."""
    makers = {output: node.op_type for node in quantized.graph.node for output in node.output}
    nodes = [node for node in quantized.graph.node if node.op_type in WEIGHTED]
    full = [node for node in nodes if all(makers.get(name) == "DequantizeLinear" for name in node.input[:2])]
    return len(full), len(nodes)


if __name__ == "__main__":
    main()
