"""What a caller states of how images become inputs of the model."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..errors import DataError, nearest

STRETCH, SHORTER_SIDE, LETTERBOX = "stretch", "shorter side", "letterbox"
CHOICES = {
    "resize": (STRETCH, SHORTER_SIDE, LETTERBOX),
    "layout": ("NCHW", "NHWC"),
    "color": ("RGB", "BGR", "gray"),
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
}
STATE_PREPROCESSING = (
    "state how they were prepared for training, in a TOML file (--preprocess) of at least the line 'range = [0, 1]', "
    "the numbers that pixels of 0 and 255 become, with mean, std, resize, size, crop, color and layout as in training"
)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes an input of the model. Only `range` must be stated.

    Each image goes through these steps, in this order:

    1. It is decoded to 8 bits per channel (of an animation, the first frame) and turned upright as its EXIF
       orientation says.
    2. It is converted to `color`: RGB, BGR or gray (luma by ITU-R 601); transparency is dropped, not blended. Where
       it is not stated, the input's channels tell: 1 is gray, everything else RGB.
    3. It is resized with `interpolation`, antialiased (as Pillow and torchvision do; OpenCV and TensorFlow, by
       default, do not), by `resize`:
       - "stretch": to `size` (height, width), whatever the proportions;
       - "shorter side": the shorter side becomes `size`, one number; the longer one follows, rounded down;
       - "letterbox": as large as fits into `size` with its proportions, rounded; in the centre, filled up with `pad`.
    4. The centre is cut out by `crop` (height, width); an odd rest is split as torchvision's CenterCrop splits it.
    5. Pixel values are mapped so that 0 becomes `range[0]` and 255 becomes `range[1]`.
    6. (value - `mean`) / `std`, per channel in the order of `color`, in the units of `range`.
    7. The axes are put in the order of `layout`, and the values in the type of the input. Where the layout is not
       stated, it is NHWC if the input has 1 or 3 in the last of its four axes and not in the second, else NCHW.

    `size` and `crop` are in pixels: (height, width), or one number for both. What comes out, `crop` or else the `size`
    of "stretch" and "letterbox", may be left to a model that fixes its height and width. The `size` of "shorter side"
    may be left to the longer side of what comes out. `pad` is a pixel value, 0 to 255, of all channels. `input` names
    the model's input; a model without it is refused. Raises DataError for values that make no sense.
    """

    range: tuple[float, float]
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    resize: str = STRETCH
    size: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    pad: int = 0
    color: str | None = None
    layout: str | None = None
    interpolation: str = "bilinear"
    input: str | None = None

    def __post_init__(self) -> None:
        if not (_is_numbers(self.range) and len(self.range) == 2 and self.range[0] != self.range[1]):
            raise _wrong("range", "two different numbers, such as [0, 1]", self.range)
        for key, value in (("mean", self.mean), ("std", self.std)):
            if not (_is_number(value) or _is_numbers(value)):
                raise _wrong(key, "a number, or one per channel", value)
        if np.min(self.std) <= 0:
            raise _wrong("std", "above 0", self.std)
        for key, side in (("size", self.size), ("crop", self.crop)):
            if side is not None and not _is_side(side) and not _is_sides(side):
                raise _wrong(key, "one number of pixels or [height, width]", side)
        if self.resize == SHORTER_SIDE and _is_sides(self.size):
            raise _wrong("size", f"one number where resize is '{SHORTER_SIDE}'", self.size)
        if not (_is_whole(self.pad) and 0 <= self.pad <= 255):
            raise _wrong("pad", "a whole number from 0 to 255", self.pad)
        for key, known in CHOICES.items():
            choice = getattr(self, key)
            if choice not in known and not (choice is None and key in ("color", "layout")):
                raise _wrong(key, f"one of {', '.join(map(repr, known))}", choice)
        if not isinstance(self.input, str | None):
            raise _wrong("input", "the name of an input", self.input)

    @staticmethod
    def from_toml(path: str | Path) -> Preprocessing:
        """Read a TOML file whose keys are the fields of this class. Raises DataError, which names file and key."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as TOML ({error})") from error
        known = [field.name for field in fields(Preprocessing)]
        for key in values:
            if key not in known:
                raise DataError(f"{path}: unknown key '{key}'.{nearest(key, known)} Keys: {', '.join(known)}")
        if "range" not in values:
            raise DataError(f"{path}: 'range' is missing: the numbers that pixels of 0 and 255 become, as [0, 1]")
        stated: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        try:
            return Preprocessing(**stated)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: Any) -> TypeGuard[tuple[float, ...]]:
    return isinstance(value, tuple | list) and bool(value) and all(map(_is_number, value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_sides(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_side, value))


def _wrong(key: str, wanted: str, value: object) -> DataError:
    given = list(value) if isinstance(value, tuple) else value
    return DataError(f"{key} is {wanted}, not {given!r}")
