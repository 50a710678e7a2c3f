"""Folders of images as arrays: decoded one batch at a time, and prepared as `Preprocessing` states it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, nearest
from ..model import Model
from .batches import Feeds, Input, declared_inputs
from .cutting import cut
from .preprocessing import SHORTER_SIDE, STRETCH, Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocessing", "is_image", "read_images", "walk"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def is_image(path: Path) -> bool:
    """True where the file's name says that it is an image."""
    return path.suffix.lower() in SUFFIXES


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, sorted by name at every level; hidden ones are skipped."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def read_images(folder: str | Path, model: Model, preprocessing: Preprocessing) -> Feeds:
    """All images of a folder and its subfolders, in the order of their names, for a model with one input.

    They are decoded one batch at a time. Raises DataError, at once, for a model whose input is no image, for what it
    leaves unknown and `preprocessing` does not state, and for files that are no images; while batches are read, for
    images that cannot be decoded. Needs Pillow.
    """
    if importlib.util.find_spec("PIL") is None:
        raise DataError("reading images needs Pillow: pip install 'qdq-surgeon[images]'")
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is no folder: preprocessing is for folders of images")
    declared = _image_input(declared_inputs(model), preprocessing, str(folder))
    files = tuple(walk(Path(folder)))
    if not files:
        raise DataError(f"{folder} holds no images")
    for path in files:
        if not is_image(path):
            raise DataError(f"{path} is not an image: a folder of images holds nothing else, hidden files apart")
    return cut({declared.name: _images(files, declared, preprocessing)}, (declared,), str(folder))


@dataclass(frozen=True, eq=False)
class _Images:
    """Images as the rows of an array.

    `size` is what they are resized to, or twice the shorter side, and `out` what is cut from that, both (height,
    width). `values` says what each pixel value becomes in each channel: [256, channels].
    """

    files: tuple[Path, ...]
    stated: Preprocessing
    color: str
    layout: str
    size: tuple[int, int]
    out: tuple[int, int]
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        channels = self.values.shape[1]
        sample = (channels, *self.out) if self.layout == "NCHW" else (*self.out, channels)
        return (len(self.files), *sample)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def pieces(self, size: int) -> Iterator[NDArray[Any]]:
        for start in range(0, len(self.files), size):
            yield np.stack([self._prepared(path) for path in self.files[start : start + size]])

    def _prepared(self, path: Path) -> NDArray[Any]:
        """One image, by the steps that `Preprocessing` tells."""
        resized = _resized(_decoded(path, "L" if self.color == "gray" else "RGB"), self.stated, self.size)
        pixels = np.asarray(_centre(resized, self.out, path)).reshape(*self.out, -1)
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        values: NDArray[Any] = self.values[pixels, np.arange(self.values.shape[1])]
        return values.transpose(2, 0, 1) if self.layout == "NCHW" else values


def _image_input(inputs: tuple[Input, ...], stated: Preprocessing, folder: str) -> Input:
    names = [declared.name for declared in inputs]
    if stated.input is not None and stated.input not in names:
        raise DataError(f"preprocessing: the model has no input '{stated.input}'.{nearest(stated.input, names)}")
    if len(inputs) != 1:
        raise DataError(
            f"{folder}: images feed one input, but the model has {len(inputs)} ({', '.join(names)}): "
            "give mappings of input names to arrays, as from a script with load_data()"
        )
    if inputs[0].rank not in (None, 4):
        raise DataError(f"{folder}: '{names[0]}' is no batch of images: the model wants {inputs[0].text}")
    return inputs[0]


def _images(files: tuple[Path, ...], declared: Input, stated: Preprocessing) -> _Images:
    """The images as rows, with the input's shape telling what is not stated."""
    dims = declared.shape or (None,) * 4
    by_pixel = dims[3] in (1, 3) and dims[1] not in (1, 3)
    layout = stated.layout or ("NHWC" if by_pixel else "NCHW")
    channels, height, width = dims[1:] if layout == "NCHW" else (dims[3], dims[1], dims[2])
    color = stated.color or ("gray" if channels == 1 else "RGB")
    made = 1 if color == "gray" else 3
    if isinstance(channels, int) and channels != made:
        raise DataError(
            f"preprocessing: {color} in {layout} makes {made} channels, but '{declared.name}' wants {declared.text}: "
            "state color and layout"
        )
    out = _pair(stated.crop if stated.resize == SHORTER_SIDE else stated.crop or stated.size)
    if not out and isinstance(height, int) and isinstance(width, int):
        out = (height, width)
    if not out:
        key = "crop" if stated.resize == SHORTER_SIDE else "size"
        raise DataError(f"preprocessing: '{declared.name}' takes images of any size, {declared.text}: state {key}")
    size = _pair(stated.size) or (_pair(max(out)) if stated.resize == SHORTER_SIDE else out) or out
    return _Images(files, stated, color, layout, size, out, _values(stated, made, declared))


def _values(stated: Preprocessing, channels: int, declared: Input) -> NDArray[Any]:
    """What each of the 256 pixel values becomes in each channel: [256, channels]."""
    for key, numbers in (("mean", stated.mean), ("std", stated.std)):
        if np.size(numbers) not in (1, channels):
            raise DataError(f"preprocessing: {key} has {np.size(numbers)} numbers for {channels} channels")
    low, high = stated.range
    mapped = np.arange(256)[:, None] / 255 * (high - low) + low
    values: NDArray[Any] = np.ones(channels) * ((mapped - np.asarray(stated.mean)) / np.asarray(stated.std))
    if declared.dtype.kind not in "iu":
        return values.astype(np.float32)
    limits = np.iinfo(declared.dtype)
    whole: NDArray[Any] = np.rint(values)
    if not np.allclose(values, whole, rtol=0, atol=1e-6) or whole.min() < limits.min or whole.max() > limits.max:
        raise DataError(
            f"preprocessing: '{declared.name}' wants {declared.dtype}, and these range, mean and std do not give such "
            "numbers: state range = [0, 255] alone to keep the pixels as they are"
        )
    return whole.astype(declared.dtype)


def _decoded(path: Path, mode: str) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits per channel (mode {opened.mode}): convert it")
            return ImageOps.exif_transpose(opened).convert(mode)
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not an image that can be decoded ({reason})") from error


def _resized(image: Image, stated: Preprocessing, size: tuple[int, int]) -> Image:
    from PIL import Image

    resample = Image.Resampling[stated.interpolation.upper()]
    width, height = image.size
    if stated.resize == STRETCH:
        return image.resize((size[1], size[0]), resample)
    if stated.resize == SHORTER_SIDE:
        shorter = min(width, height)
        return image.resize((size[0] * width // shorter, size[0] * height // shorter), resample)
    scale = min(size[0] / height, size[1] / width)
    fitted = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample)
    canvas = Image.new(image.mode, (size[1], size[0]), (stated.pad,) * len(image.getbands()))
    canvas.paste(fitted, ((size[1] - fitted.width) // 2, (size[0] - fitted.height) // 2))
    return canvas


def _centre(image: Image, size: tuple[int, int], path: Path) -> Image:
    height, width = size
    if image.height < height or image.width < width:
        has = f"{image.height}x{image.width}"
        raise DataError(
            f"{path} is {has} after resizing, too small for a crop of {height}x{width}: state a larger size"
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pair(side: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return height, width
