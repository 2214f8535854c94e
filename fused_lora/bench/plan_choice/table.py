"""Rows of plan_choice as text, and their summary in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from fused_lora.bench.plan_choice.rows import PlanRow
from fused_lora.bench.table import aligned, milliseconds

HEADS = ("case", "chosen", "ms", "x frozen", "best measured", "ms", "chosen/best", "rounds")
WITHIN = (1.05, 1.10)  # ratios whose shares the summary gives


def text(rows: Sequence[PlanRow]) -> str:
    """One aligned table."""
    return "\n".join(aligned([HEADS, *(_cells(row) for row in rows)]))


def _cells(row: PlanRow) -> tuple[str, ...]:
    return (
        str(row.case),
        row.chosen,
        milliseconds(row.of(row.chosen).median_ms),
        f"{row.over_frozen:.2f}",
        "the same" if row.best == row.chosen else row.best,
        milliseconds(row.of(row.best).median_ms),
        f"{row.ratio:.2f}",
        str(row.rounds),
    )


def summary(rows: Sequence[PlanRow]) -> str:
    """How often the plan chose well, and where it chose worst."""
    if not rows:
        return "no case of plan_choice was measured"
    shares = [sum(row.ratio <= limit for row in rows) / len(rows) for limit in WITHIN]
    worst = max(rows, key=lambda row: row.ratio)
    return (
        f"The chosen plan is within 5 % of the best one measured in {shares[0]:.0%} of {len(rows)} "
        f"cases and within 10 % in {shares[1]:.0%}; worst {worst.ratio:.2f} times the best "
        f"({worst.case}: {worst.chosen} against {worst.best})."
    )
