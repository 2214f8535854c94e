"""The page's pictures as SVG: bars and points, drawn from rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fused_lora.bench.correctness_gate import FACTOR
from fused_lora.bench.rows import Row
from fused_lora.bench.table import milliseconds, times, title

LABEL, PLOT, VALUE = 216, 230, 120  # columns of a panel: names, bars, numbers
BAR, STRIDE, TOP = 16, 23, 26  # height of a bar, distance between bars, room for the title


@dataclass(frozen=True)
class Bar:
    """One method's bar."""

    method: str  # a CSS class
    value: float
    text: str  # the number as a reader sees it
    name: str  # the method as a reader calls it


@dataclass(frozen=True)
class Point:
    """One method's place in a scatter."""

    method: str  # a CSS class
    x: float
    y: float
    name: str


def panel(heading: str, bars: Sequence[Bar], top: float, mark: float | None = None) -> str:
    """One small chart of horizontal bars.

    Args:
        heading: What the bars have in common.
        bars: From top to bottom.
        top: The value that spans the whole width; panels side by side share it.
        mark: A value to draw a line at.
    """
    width, height = LABEL + PLOT + VALUE, TOP + STRIDE * len(bars) + 4
    spoken = "; ".join(f"{bar.name} {bar.text}" for bar in bars)
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
    kind, name, middle = escape(bar.method), escape(bar.name), y + BAR - 4
    return [
        f'<text class="name" x="{LABEL - 8}" y="{middle}" text-anchor="end">{name}</text>',
        f'<rect class="bar {kind}" x="{LABEL}" y="{y}" width="{max(length, 1.0):.1f}" '
        f'height="{BAR}" rx="2"/>',
        f'<text class="value" x="{LABEL + length + 6:.1f}" y="{middle}">{escape(bar.text)}</text>',
    ]


WIDE, HIGH, LEFT, LOW, EDGE = 900, 380, 64, 46, 24  # of a scatter
CHAR = 6.6  # width of a letter


def scatter(heading: str, points: Sequence[Point], x_axis: str, y_axis: str) -> str:
    """A point for each method, both axes from nought: nearer to the corner is better.

    Names stand beside their points, moved down where they would lie on one another.
    """
    right, top = (1.12 * max(getattr(p, axis) for p in points) or 1.0 for axis in ("x", "y"))
    spoken = "; ".join(f"{p.name}: {p.x:.4g} {x_axis}, {p.y:.4g} {y_axis}" for p in points)
    parts = [
        f'<svg viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img" '
        f'aria-label="{escape(f"{heading}: {spoken}")}">',
        f'<line class="axis" x1="{LEFT}" x2="{WIDE}" y1="{HIGH - LOW}" y2="{HIGH - LOW}"/>',
        f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="8" y2="{HIGH - LOW}"/>',
        f'<text class="name" x="{WIDE}" y="{HIGH - 6}" text-anchor="end">{escape(x_axis)}</text>',
        f'<text class="name" x="{LEFT + 8}" y="18">{escape(y_axis)}</text>',
    ]
    parts += [
        f'<text class="name" x="{_across(x, right):.1f}" y="{HIGH - LOW + 18}" '
        f'text-anchor="middle">{x:,g}</text>'
        for x in ticks(right)
    ]
    parts += [
        f'<text class="name" x="{LEFT - 8}" y="{_down(y, top) + 4:.1f}" text-anchor="end">'
        f"{y:,g}</text>"
        for y in ticks(top)
    ]
    taken: list[tuple[float, float, float]] = []  # left, right and height of each name
    for point in sorted(points, key=lambda p: (p.y, p.x), reverse=True):
        x, y = _across(point.x, right), _down(point.y, top)
        length = CHAR * len(point.name)
        left = x + 11 if x + 11 + length < WIDE else x - 11 - length
        height = y + 4
        while any(a < left + length and left < b and abs(h - height) < 15 for a, b, h in taken):
            height += 15
        taken.append((left, left + length, height))
        kind = escape(point.method)
        parts += [
            f'<circle class="bar {kind}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>',
            f'<text class="value" x="{left:.1f}" y="{height:.1f}">{escape(point.name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def ticks(end: float) -> list[float]:
    """Four to nine round numbers above nought and below ``end``."""
    power = 10.0 ** math.floor(math.log10(end))
    step = next(power * part for part in (0.1, 0.2, 0.5, 1.0) if end / (power * part) < 10)
    return [step * i for i in range(1, math.ceil(end / step))]


def _across(x: float, right: float) -> float:
    return LEFT + (WIDE - LEFT - EDGE) * x / right


def _down(y: float, top: float) -> float:
    return 8 + (HIGH - LOW - 8) * (1 - y / top)


Draw = Callable[[Row], Bar]
Mark = Callable[[Sequence[Row]], float | None]  # where a case's line is drawn


def time_bar(row: Row) -> Bar:
    """The median of a step."""
    over = "" if row.ratio_frozen is None else f" ({times(row.ratio_frozen)}x)"
    label = f"{milliseconds(row.median_ms)} ms{over}"
    return Bar(row.method, row.median_ms, label, title(row.method))


def memory_bar(row: Row) -> Bar:
    """What one forward pass keeps."""
    megabytes = row.saved_bytes / 1e6
    return Bar(row.method, megabytes, f"{megabytes:.1f} MB", title(row.method))


def error_bar(row: Row) -> Bar:
    """The largest error of an output or a gradient, over naive LoRA's of the same quantity."""
    ratios = {q: e / row.yardstick[q] for q, e in row.errors.items() if row.yardstick[q]}
    worst = max(ratios, key=ratios.__getitem__, default="y")
    ratio = ratios.get(worst, 0.0)
    return Bar(row.method, ratio, f"{ratio:.2f} ({worst})", title(row.method))


def panels(cases: Sequence[Sequence[Row]], draw: Draw, mark: Mark) -> str:
    """One panel for each case, all on one scale."""
    drawn = [[draw(row) for row in rows] for rows in cases]
    marks = [mark(rows) for rows in cases]
    top = max([bar.value for bars in drawn for bar in bars] + [m for m in marks if m], default=1.0)
    svgs = [
        panel(f"rank {rows[0].case.rank}", bars, top, at)
        for rows, bars, at in zip(cases, drawn, marks, strict=True)
        if bars
    ]
    return f'<div class="panels">{"".join(svgs)}</div>'


def _frozen(value: Draw) -> Mark:
    return lambda rows: next((value(r).value for r in rows if r.method == "frozen"), None)


def time_plot(cases: Sequence[Sequence[Row]]) -> str:
    """Milliseconds of a step, the frozen network's marked."""
    return panels(cases, time_bar, _frozen(time_bar))


def memory_plot(cases: Sequence[Sequence[Row]]) -> str:
    """Megabytes kept for backward, the frozen network's marked."""
    return panels(cases, memory_bar, _frozen(memory_bar))


def error_plot(cases: Sequence[Sequence[Row]]) -> str:
    """Errors over naive LoRA's, the gate marked; the frozen network has none."""
    adapted = [[row for row in rows if row.errors] for rows in cases]
    return panels([rows for rows in adapted if rows], error_bar, lambda rows: FACTOR)


def time_over_memory(case_rows: Sequence[Row]) -> str:
    """One picture of a case: milliseconds of a step over megabytes kept."""
    points = [
        Point(row.method, row.saved_bytes / 1e6, row.median_ms, title(row.method))
        for row in case_rows
    ]
    heading = "time of a step over what is kept for backward"
    return scatter(heading, points, "MB kept for backward", "ms a step")
