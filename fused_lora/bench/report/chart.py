"""Bars as inline SVG; every colour is a CSS class, so that light and dark share one drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LABEL, PLOT, VALUE = 92, 190, 104  # columns of a panel: names, bars, numbers
BAR, STRIDE, TOP = 16, 23, 26  # height of a bar, distance between bars, room for the title


@dataclass(frozen=True)
class Bar:
    """One contender's bar."""

    contender: str
    value: float
    text: str  # the number as a reader sees it


def panel(heading: str, bars: Sequence[Bar], top: float, mark: float | None = None) -> str:
    """One small chart of horizontal bars.

    Args:
        heading: What the bars have in common.
        bars: From top to bottom.
        top: The value that spans the whole width; panels side by side share it.
        mark: A value to draw a line at.
    """
    width, height = LABEL + PLOT + VALUE, TOP + STRIDE * len(bars) + 4
    spoken = "; ".join(f"{bar.contender} {bar.text}" for bar in bars)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(f"{heading}: {spoken}")}">',
        f'<text class="heading" x="{LABEL}" y="14">{escape(heading)}</text>',
    ]
    for i, bar in enumerate(bars):
        parts += _bar(bar, TOP + STRIDE * i, _x(bar.value, top))
    if mark is not None:
        x = LABEL + _x(mark, top)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{height}"/>')
    return "\n".join([*parts, "</svg>"])


def _x(value: float, top: float) -> float:
    return PLOT * min(value / top, 1.0) if top > 0 else 0.0


def _bar(bar: Bar, y: int, length: float) -> list[str]:
    name, middle = escape(bar.contender), y + BAR - 4
    return [
        f'<text class="name" x="{LABEL - 8}" y="{middle}" text-anchor="end">{name}</text>',
        f'<rect class="bar {name}" x="{LABEL}" y="{y}" width="{max(length, 1.0):.1f}" '
        f'height="{BAR}" rx="2"/>',
        f'<text class="value" x="{LABEL + length + 6:.1f}" y="{middle}">{escape(bar.text)}</text>',
    ]
