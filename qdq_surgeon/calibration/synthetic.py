"""Made-up inputs, for models that come without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, nearest
from .batches import Batch, Feeds, Input, make_batch

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Trial: TypeAlias = "Callable[[dict[str, NDArray[Any]]], str | None]"
"""Runs the model on a feed and tells why it does not run; None where it does."""

SYNTHETIC = "synthetic inputs"
SYNTHETIC_SAMPLES = 16
SYNTHETIC_SIZES = (224, 512, 64, 16, 1)
"""What unknown dimensions are tried with, in order, when inputs are made up."""


def synthetic(inputs: tuple[Input, ...], shapes: Shapes, runs: Trial | None) -> Feeds:
    """Seeded normal values for floats, 0 and 1 for integers. Unknown sizes: `shapes`, else the first that runs."""
    return Feeds(_batches(inputs, shapes, runs), SYNTHETIC, SYNTHETIC_SAMPLES, synthetic=True)


def _batches(inputs: tuple[Input, ...], shapes: Shapes, runs: Trial | None) -> Iterator[Batch]:
    by_name = {declared.name: declared for declared in inputs}
    for name, shape in shapes.items():
        if name not in by_name:
            raise DataError(f"--shapes: the model has no input '{name}'.{nearest(name, by_name)}")
        if not by_name[name].fits(shape):
            raise DataError(f"--shapes: '{name}' has {list(shape)}, but the model wants {by_name[name].text}")
    generator = np.random.default_rng(0)
    size = _size_that_runs(inputs, shapes, runs, generator)
    del runs  # it may hold a whole model
    for _ in range(SYNTHETIC_SAMPLES):
        yield make_batch(_made_up(inputs, shapes, size, generator), inputs, SYNTHETIC)


def _size_that_runs(
    inputs: tuple[Input, ...], shapes: Shapes, runs: Trial | None, generator: np.random.Generator
) -> int:
    """The first of SYNTHETIC_SIZES with which the model runs; where all sizes are stated, these must run."""
    stated = all(declared.name in shapes or declared.is_sized for declared in inputs)
    for size in SYNTHETIC_SIZES:
        feed = _made_up(inputs, shapes, size, generator)
        reason = runs(feed) if runs else None
        if reason is None:
            return size
        if stated:
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise DataError(f"the model does not run on inputs of these sizes ({sizes}): {reason}")
    raise DataError("no input sizes were found with which the model runs: state them with --shapes name:1x3x224x224")


def _made_up(
    inputs: tuple[Input, ...], shapes: Shapes, size: int, generator: np.random.Generator
) -> dict[str, NDArray[Any]]:
    feed: dict[str, NDArray[Any]] = {}
    batch = {declared.shape[0] for declared in inputs if declared.shape}
    for declared in inputs:
        dims = declared.shape or ()
        ones = [axis == 0 or (dim is not None and dim in batch) for axis, dim in enumerate(dims)]
        filled = tuple(d if isinstance(d, int) else 1 if one else size for d, one in zip(dims, ones, strict=True))
        shape = shapes.get(declared.name, filled)
        integral = declared.dtype.kind in "biu"
        values = generator.integers(0, 2, shape) if integral else generator.standard_normal(shape)
        feed[declared.name] = np.asarray(values).astype(declared.dtype)
    return feed
