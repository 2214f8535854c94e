"""Rows as text: what every rendering shows, and the table of the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import fused_lora.bench.contenders  # noqa: F401  registers the titles
from fused_lora.bench.registry import CONTENDERS
from fused_lora.bench.rows import Case, Row

HEADS = (
    *("contender", "ms", "quartiles", "x frozen", "x naive", "x PEFT", "x roofline"),
    *("saved MB", "error", "grad error"),
)


KEPT = {  # the ways to train an adapter, and how blocks of this library recompute
    "naive": "naive LoRA",
    "peft": "PEFT",
    "peft_checkpoint": "PEFT, checkpointed",
    "fused": "linear level",
    "fused_block": "elementwise",
    "fused_block_gemm": "gemm",
}


def title(contender: str) -> str:
    """What a reader calls ``contender``; rows may outlive a registration."""
    known = CONTENDERS.get(contender)
    return known.title if known else contender


def cells(row: Row) -> tuple[str, ...]:
    """One row under HEADS; a dash where nothing was measured."""
    return (
        row.contender,
        milliseconds(row.median_ms),
        f"{milliseconds(row.q1_ms)}-{milliseconds(row.q3_ms)}",
        times(row.ratio_frozen),
        times(row.ratio_naive),
        times(row.ratio_peft),
        times(row.median_ms / row.roofline_ms if row.roofline_ms else None),
        f"{row.saved_bytes / 1e6:.1f}",
        small(row.errors.get("y")),
        small(max((e for q, e in row.errors.items() if q != "y"), default=None)),
    )


def milliseconds(duration: float) -> str:
    """Three figures."""
    return f"{duration:.0f}" if duration >= 100 else f"{duration:.3g}"


def times(ratio: float | None) -> str:
    """A ratio."""
    return "-" if ratio is None else f"{ratio:.2f}"


def small(error: float | None) -> str:
    """An error."""
    return "-" if error is None else f"{error:.1e}"


def by_case(rows: Iterable[Row]) -> list[tuple[Case, list[Row]]]:
    """Rows that stood in the same race, in the order the races were run."""
    return [(case, list(group)) for case, group in groupby(rows, key=lambda row: row.case)]


def text(rows: Iterable[Row]) -> str:
    """One aligned table for each case."""
    parts = []
    for case, group in by_case(rows):
        lines = [HEADS, *(cells(row) for row in group)]
        parts += [f"{case.suite}: {case}", *aligned(lines), ""]
    return "\n".join(parts)


def kept(rows: Iterable[Row]) -> str:
    """What each way keeps for backward, a line for each case; empty without naive LoRA."""
    lines = []
    for case, group in by_case(rows):
        found = {row.contender: row.saved_bytes for row in group}
        if "naive" in found and case.suite != "six_projections":
            amounts = (found.get(name) for name in KEPT)
            cells = (_beside(amount, found["naive"]) for amount in amounts)
            lines.append((f"{case.suite}: {case}", *cells))
    if not lines:
        return ""
    heads = ("kept for backward, MB (x naive LoRA)", *KEPT.values())
    return "\n".join([*aligned([heads, *lines]), ""])


def _beside(amount: int | None, naive: int) -> str:
    return "-" if amount is None else f"{amount / 1e6:.0f} ({amount / naive:.2f})"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells as columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [_line(line, widths) for line in lines]


def _line(words: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        word.ljust(width) if i == 0 else word.rjust(width)
        for i, (word, width) in enumerate(zip(words, widths, strict=True))
    )
    return "  " + "  ".join([first, *rest])
