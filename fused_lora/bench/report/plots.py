"""What is plotted: time, memory kept and error, a panel for each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fused_lora.bench.gate import FACTOR
from fused_lora.bench.report.chart import Bar, Point, panel, scatter
from fused_lora.bench.rows import Row
from fused_lora.bench.table import milliseconds, times, title

Draw = Callable[[Row], Bar]
Mark = Callable[[Sequence[Row]], float | None]  # where a race's line is drawn


def time_bar(row: Row) -> Bar:
    """The median of a step."""
    over = "" if row.ratio_frozen is None else f" ({times(row.ratio_frozen)}x)"
    said = f"{milliseconds(row.median_ms)} ms{over}"
    return Bar(row.contender, row.median_ms, said, title(row.contender))


def memory_bar(row: Row) -> Bar:
    """What one forward pass keeps."""
    megabytes = row.saved_bytes / 1e6
    return Bar(row.contender, megabytes, f"{megabytes:.1f} MB", title(row.contender))


def error_bar(row: Row) -> Bar:
    """The largest error of an output or a gradient, over naive LoRA's of the same quantity."""
    ratios = {q: e / row.yardstick[q] for q, e in row.errors.items() if row.yardstick[q]}
    worst = max(ratios, key=ratios.__getitem__, default="y")
    ratio = ratios.get(worst, 0.0)
    return Bar(row.contender, ratio, f"{ratio:.2f} ({worst})", title(row.contender))


def panels(races: Sequence[Sequence[Row]], draw: Draw, mark: Mark) -> str:
    """One panel for each race, all on one scale."""
    drawn = [[draw(row) for row in rows] for rows in races]
    marks = [mark(rows) for rows in races]
    top = max([bar.value for bars in drawn for bar in bars] + [m for m in marks if m], default=1.0)
    svgs = [
        panel(f"rank {rows[0].case.rank}", bars, top, at)
        for rows, bars, at in zip(races, drawn, marks, strict=True)
        if bars
    ]
    return f'<div class="panels">{"".join(svgs)}</div>'


def _frozen(value: Draw) -> Mark:
    return lambda rows: next((value(r).value for r in rows if r.contender == "frozen"), None)


def time_plot(races: Sequence[Sequence[Row]]) -> str:
    """Milliseconds of a step, the frozen network's marked."""
    return panels(races, time_bar, _frozen(time_bar))


def memory_plot(races: Sequence[Sequence[Row]]) -> str:
    """Megabytes kept for backward, the frozen network's marked."""
    return panels(races, memory_bar, _frozen(memory_bar))


def error_plot(races: Sequence[Sequence[Row]]) -> str:
    """Errors over naive LoRA's, the gate marked; the frozen network has none."""
    adapted = [[row for row in rows if row.errors] for rows in races]
    return panels([rows for rows in adapted if rows], error_bar, lambda rows: FACTOR)


def time_over_memory(race: Sequence[Row]) -> str:
    """One picture of a race: milliseconds of a step over megabytes kept."""
    points = [
        Point(row.contender, row.saved_bytes / 1e6, row.median_ms, title(row.contender))
        for row in race
    ]
    heading = "time of a step over what is kept for backward"
    return scatter(heading, points, "MB kept for backward", "ms a step")
