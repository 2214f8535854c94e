"""What blocks keep as text: a table of the terminal, and one of the README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from fused_lora.bench.saved_bytes.rows import SavedCase, SavedRow
from fused_lora.bench.table import aligned, title

HEADS = (
    *("method", "KB per block", "of it casts of weights", "[M, d] tensors", "of them fp32"),
    *("fp32 copies of x", "KB in all", "over frozen: block", "in all"),
)


def text(case: SavedCase, rows: Sequence[SavedRow]) -> str:
    """One aligned table."""
    floor = next((row for row in rows if row.contender == "frozen"), None)
    body = [(*_cells(row), *_over(row, floor)) for row in rows]
    return "\n".join([f"{case.suite}: {case}", *aligned([HEADS, *body]), ""])


def _over(row: SavedRow, floor: SavedRow | None) -> tuple[str, str]:
    if floor is None or not floor.bytes_in_all:
        return "-", "-"
    return (
        f"{row.bytes_per_block / floor.bytes_per_block:.3f}",
        f"{row.bytes_in_all / floor.bytes_in_all:.3f}",
    )


def _cells(row: SavedRow) -> tuple[str, ...]:
    return (
        row.contender,
        f"{row.bytes_per_block / 1e3:.0f}",
        f"{row.weight_bytes_per_block / 1e3:.0f}",
        f"{row.units_per_block:.2f}",
        f"{row.fp32_bytes_per_block / row.case.unit:.2f}",
        f"{row.fp32_copies_per_block:.1f}",
        f"{row.bytes_in_all / 1e3:.0f}",
    )


def markdown_lines(rows: Sequence[SavedRow]) -> Iterator[str]:
    """A sentence and a table for each model and rank; nothing without rows."""
    ordered = sorted(rows, key=lambda row: (row.case.model, row.case.rank, row.case.batch))
    for (model, rank, _), group in groupby(
        ordered, key=lambda row: (row.case.model, row.case.rank, row.case.batch)
    ):
        yield (
            f"**Kept for backward by one block** of `{model}` at rank {rank}, in [M, d] tensors of "
            "the precision of the matmuls; in brackets, how many activations are copied to fp32 "
            "on the way (amp: fp32 weights under bf16 autocast):"
        )
        yield _markdown(list(group))


def _markdown(rows: Sequence[SavedRow]) -> str:
    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    cells = {(row.contender, row.case.dtype): _units(row) for row in rows}
    lines = [("method", *dtypes), ("---", *("---:",) * len(dtypes))]
    for contender in dict.fromkeys(row.contender for row in rows):
        found = (cells.get((contender, dtype), "-") for dtype in dtypes)
        lines.append((title(contender), *found))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _units(row: SavedRow) -> str:
    return f"{row.units_per_block:.1f} ({row.fp32_copies_per_block:.0f})"
