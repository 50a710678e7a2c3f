"""A ranking as a bar chart: plain SVG, no scripts, no outside resources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABELS, ROW, MARGIN = 900, 380, 22, 16
BAR, WEIGHT_BAR, TEXT, FAINT = "#2f6fde", "#e08a1e", "#1d2433", "#5b6477"

_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Bar(NamedTuple):
    """One row: what it is called, how long it is (0 to 1), what is written behind it, its colour."""

    label: str
    share: float
    note: str
    colour: str = BAR


def escaped(text: str) -> str:
    """Text for a page or a picture; what XML cannot hold, such as control characters, becomes the replacement sign."""
    return escape(_NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """An SVG picture, one row for each bar; the longest fills the width."""
    longest = max((bar.share for bar in bars), default=0.0) or 1.0
    height = 2 * MARGIN + ROW * (len(bars) + 1)
    rows = "".join(_row(bar, MARGIN + ROW * (index + 1), longest) for index, bar in enumerate(bars))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="{MARGIN}" y="{MARGIN + 4}" font-weight="bold" font-size="14">{escaped(title)}</text>{rows}</svg>\n'
    )


def _row(bar: Bar, top: int, longest: float) -> str:
    room = WIDTH - LABELS - 2 * MARGIN - 150
    length = max(1.0, room * bar.share / longest)
    label = bar.label if len(bar.label) <= 52 else f"{bar.label[:24]}…{bar.label[-27:]}"
    middle = top + ROW - 7
    return (
        f'<text x="{LABELS}" y="{middle}" text-anchor="end"><title>{escaped(bar.label)}</title>{escaped(label)}</text>'
        f'<rect x="{LABELS + 8}" y="{top + 3}" width="{length:.1f}" height="{ROW - 7}" fill="{bar.colour}"/>'
        f'<text x="{LABELS + 14 + length:.1f}" y="{middle}" fill="{FAINT}">{escaped(bar.note)}</text>'
    )
