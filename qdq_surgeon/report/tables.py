"""Plain-text tables and numbers, as they appear in results and on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others, two spaces between."""
    lines = [tuple(heads), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
