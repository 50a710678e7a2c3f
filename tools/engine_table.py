"""What the engine makes of each placement: python tools/engine_table.py FOLDER   (FOLDER: see make_networks.py)

For ResNet-50, MobileNetV2 and an encoder with random weights: kernels, weighted ops in INT8, their share of the
multiply-accumulates, activation bytes, kernels that only convert; for the float model, our placements, and
onnxruntime's quantize_static with the options that TensorRT needs. Prints a Markdown table.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import qdq_surgeon
from qdq_surgeon.tensorrt.audit import Figures, audit
from qdq_surgeon.tensorrt.engine import choose_backend

PLACEMENTS = ("tensorrt", "tensorrt-all-add-inputs", "tflite")
NETWORKS = ("resnet50", "mobilenet_v2", "encoder")
SAMPLES = 4


def main() -> None:
    folder = Path(sys.argv[1])
    print(f"Engines of {choose_backend()}.\n")
    print("| network | placement | kernels | weighted ops in INT8 | MACs in INT8 | activation MB | only convert |")
    print("|---|---|---|---|---|---|---|")
    for network in NETWORKS:
        for placement, figures in _rows(folder / f"{network}.onnx"):
            cells = (figures.kernels, figures.int8_ops, f"{figures.int8_macs:.0%}")
            rest = (f"{figures.bytes_moved / 1e6:.1f}", figures.conversions)
            print("|", " | ".join(map(str, (network, placement, *cells, *rest))), "|", flush=True)


def _rows(path: Path) -> Iterator[tuple[str, Figures]]:
    model = qdq_surgeon.load(path)
    shape = [dim.dim_value for dim in model.inputs[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(0).standard_normal((SAMPLES, *shape[1:])).astype(np.float32)
    for index, placement in enumerate(PLACEMENTS):
        result = qdq_surgeon.quantize(model, {model.inputs[0].name: data}, placement=placement, compare=False)
        done = audit(result.model, beside_float=index == 0)
        if done.float_figures:
            yield "float", done.float_figures
        yield placement, done.figures
    try:
        yield "onnxruntime", audit(_by_onnxruntime(path, model.inputs[0].name, data), beside_float=False).figures
    except qdq_surgeon.QdqError as error:
        print(f"| {path.stem} | onnxruntime | {error} |")


def _by_onnxruntime(path: Path, name: str, data: NDArray[Any]) -> onnx.ModelProto:
    """quantize_static, symmetric, per channel, bias left alone: its default output does not parse in TensorRT."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter([{name: sample[None]} for sample in data])

        def get_next(self) -> Any:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        output = Path(folder) / "model.onnx"
        quantize_static(
            str(path),
            str(output),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        logging.disable(logging.NOTSET)
        return onnx.load(output)


if __name__ == "__main__":
    main()
