"""The labelled models of the model zoo with their data, preprocessed. The zoo is not part of the project.

Its folder is given by the environment variable QDQ_ZOO; by default it is looked for beside the repository.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DEFAULT_ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
CALIBRATE_EVERY = 8
"""Where data and labels come in one set, every eighth sample calibrates and the others measure."""


@dataclass(frozen=True)
class Labelled:
    """One model with calibration samples, measuring samples and their labels. `offset`: classes before label 0."""

    name: str
    model: Path
    calibration: Array
    samples: Array
    labels: Array
    offset: int = 0


def zoo_folder() -> Path:
    """The zoo's folder; the program ends with a word where there is none."""
    folder = Path(os.environ.get("QDQ_ZOO", DEFAULT_ZOO))
    if not (folder / "index.json").exists():
        sys.exit(f"no model zoo at {folder}: set QDQ_ZOO to its folder")
    return folder


def labelled(everything: bool = False) -> Iterator[Labelled]:
    """Every labelled pair of the zoo, preprocessed as its README says.

    Where one set serves both, `everything` measures on the calibration samples too.
    """
    zoo = zoo_folder()
    images, image_labels = _images(zoo / "imagenet_sample" / "dev500")
    squeezenet = np.stack([_squeezenet(image) for image in images])
    yield _split(
        "squeezenet10", zoo / "squeezenet10_winml/SqueezeNet_fp32_from_fp16.onnx", squeezenet, image_labels, everything
    )
    mobilenet = np.stack([_mobilenet(image) for image in images])
    path = zoo / "imagenet_mobilenet/mobilenetv1_0.25_128_qat_float.onnx"
    yield _split("mobilenetv1_0.25", path, mobilenet, image_labels, everything, offset=1)
    dev, calibration = (np.load(zoo / f"cifar10/cifar10_{part}.npz") for part in ("dev_1000", "calib_200"))
    for name, file, prepare in (
        ("resnet8", "mlperf_tiny/resnet8_cifar10.onnx", _as_float),
        ("winml_cifar", "winml_cifar/ImageClassifier.onnx", _winml),
    ):
        yield Labelled(name, zoo / file, prepare(calibration["x"]), prepare(dev["x"]), dev["y"])
    keywords = np.load(zoo / "mlperf_tiny/data/kws01_dev_500.npz")
    yield _split("kws", zoo / "mlperf_tiny/kws_dscnn.onnx", _as_float(keywords["x"]), keywords["y"], everything)
    digits = np.load(zoo / "mnist_t10k/mnist_dev_1000.npz")
    pixels = _as_float(digits["x"]).reshape(-1, 1, 28, 28)
    yield _split("mnist_cntk", zoo / "mnist_cntk/mnist.onnx", pixels, digits["y"], everything)
    yield _split("mnist_torch", zoo / "mnist_torch/cnn_mnist.onnx", pixels / np.float32(255), digits["y"], everything)


def _split(name: str, model: Path, samples: Array, labels: Array, everything: bool, offset: int = 0) -> Labelled:
    chosen = np.arange(len(samples)) % CALIBRATE_EVERY == 0
    measuring = np.ones_like(chosen) if everything else ~chosen
    return Labelled(name, model, samples[chosen], samples[measuring], labels[measuring], offset)


def _images(folder: Path) -> tuple[list[Any], Array]:
    from PIL import Image

    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [next(value for value in row.values() if value.endswith(".jpg")) for row in rows]
    images = [Image.open(folder / name).convert("RGB") for name in names]
    return images, np.array([int(row["class_index"]) for row in rows])


def _crop(image: Any, size: int) -> Array:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), np.float32)


def _squeezenet(image: Any) -> Array:
    bgr = _crop(image, 224)[:, :, ::-1] - np.array([103.939, 116.779, 123.68], np.float32)
    return np.ascontiguousarray(bgr.transpose(2, 0, 1))


def _mobilenet(image: Any) -> Array:
    return _crop(image.resize((146, 146), 2), 128) / np.float32(127) - np.float32(1)


def _as_float(pixels: Array) -> Array:
    return pixels.astype(np.float32)


def _winml(pixels: Array) -> Array:
    scaled = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
