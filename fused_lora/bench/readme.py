"""The README's table of measurements, generated from recorded rows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from fused_lora.bench.rows import Row, newest
from fused_lora.bench.table import milliseconds, small, times, title

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SUITE = "train_step"
HEADS = (
    *("model", "batch", "rank", "dtype", "method", "ms", "x frozen", "x naive", "x PEFT"),
    *("kept for backward", "error"),
)


def table(rows: Iterable[Row]) -> str:
    """Markdown: one table for each device, the newest row of every cell."""
    chosen = [row for row in newest(rows) if row.case.suite == SUITE]
    chosen.sort(key=lambda row: row.provenance.device)
    parts = []
    for device, group in groupby(chosen, key=lambda row: row.provenance.device):
        mine = sorted(group, key=_order)
        parts += [f"**{device}**, one training step:", "", *_markdown(mine), "", _foot(mine), ""]
    return "\n".join(parts).rstrip() or "No rows are recorded yet."


def rewrite(readme: Path, rows: Iterable[Row]) -> bool:
    """Put the table between the markers of ``readme``; whether that changed the file.

    Raises:
        ValueError: the markers are missing.
    """
    text = readme.read_text(encoding="utf-8")
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}")
    changed = f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}"
    readme.write_text(changed, encoding="utf-8")
    return changed != text


def _order(row: Row) -> tuple[str, str, int, int]:
    case = row.case
    return case.dtype, case.model, case.batch, case.rank


def _markdown(rows: list[Row]) -> list[str]:
    lines = [HEADS, ("---",) * 5 + ("---:",) * 6, *(_cells(row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(row: Row) -> tuple[str, ...]:
    case = row.case
    return (
        f"`{case.model}`",
        str(case.batch),
        str(case.rank),
        case.dtype,
        title(row.contender),
        milliseconds(row.median_ms),
        times(row.ratio_frozen),
        times(row.ratio_naive),
        times(row.ratio_peft),
        f"{row.saved_bytes / 1e6:.0f} MB",
        small(row.errors.get("y")),
    )


def _foot(rows: list[Row]) -> str:
    origin = max((row.provenance for row in rows), key=lambda found: found.time_utc)
    commits = ", ".join(sorted({row.provenance.commit for row in rows}))
    return (
        f"Medians of {min(row.rounds for row in rows)} or more interleaved rounds; "
        f"{origin.threads} threads, torch {origin.torch}, PEFT {origin.peft}, "
        f"timm {origin.timm}; commit {commits}; {origin.time_utc}."
    )
