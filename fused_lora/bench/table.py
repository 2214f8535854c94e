"""Rows as tables of text and of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import fused_lora.bench.methods  # noqa: F401  registers the titles
from fused_lora.bench.registry import METHODS
from fused_lora.bench.rows import TIMED, Case, Row
from fused_lora.bench.shapes import SHAPES

HEADS = (
    *("method", "ms", "quartiles", "x frozen", "x naive", "x PEFT", "x roofline"),
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


def title(method: str) -> str:
    """What a reader calls ``method``; rows may outlive a registration."""
    known = METHODS.get(method)
    return known.title if known else method


def cells(row: Row) -> tuple[str, ...]:
    """One row under HEADS; a dash where nothing was measured."""
    return (
        row.method,
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
    """Rows of one case, in the order they were timed."""
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
        found = {row.method: row.saved_bytes for row in group}
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


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table: ``left`` columns aligned to the left, the others to the right."""
    rule = (*("---",) * left, *("---:",) * (len(heads) - left))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


TITLES = {
    "train_step": "one training step: forward, loss, backward, AdamW",
    "wecolora_step": "one WeCoLoRA step: teacher forward, half of its blocks trained",
    "host": "the host's share of a step: twelve blocks whose arithmetic costs nothing",
    "six_projections": "the linear layers of one block, forward and backward",
}
RATIO_HEADS = (
    *("model", "images", "rank", "ms", "x frozen", "x naive", "joint, x PEFT"),
    *("kept, MB (naive)", "error of y (naive)"),
)


@dataclass(frozen=True)
class RatioRow:
    """One case: the row of ``fused`` and those it is compared with."""

    case: Case
    rows: Mapping[str, Row]  # by method

    @property
    def title(self) -> str:
        """What was timed."""
        return TITLES.get(self.case.suite, self.case.suite)

    @property
    def dtype(self) -> str:
        """The precision."""
        return self.case.dtype

    def cells(self) -> tuple[str, ...]:
        """One line: three adapters beside naive LoRA's three, joint beside PEFT."""
        case, ours = self.case, self.rows["fused"]
        joint, naive = self.rows.get("fused_joint"), self.rows.get("naive")
        kept = f"{naive.saved_bytes / 1e6:.0f}" if naive else "-"
        return (
            f"`{case.model}`",
            str(case.batch),
            str(case.rank),
            milliseconds(ours.median_ms),
            times(ours.ratio_frozen),
            times(ours.ratio_naive),
            times(joint.ratio_peft if joint else None),
            f"{ours.saved_bytes / 1e6:.0f} ({kept})",
            f"{small(ours.errors.get('y'))} ({small(ours.yardstick.get('y'))})",
        )


def ratio_rows(rows: Iterable[Row]) -> list[RatioRow]:
    """Every case in which ``fused`` ran, in the order of suites, precisions, models and ranks."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if (row.case.mode, row.case.cache) != ("eager", "warm"):
            continue
        cases.setdefault(row.case, {})[row.method] = row
    found = [RatioRow(case, group) for case, group in cases.items() if "fused" in group]
    return sorted(found, key=lambda each: _order(each.case))


def _order(case: Case) -> tuple[int, str, int, int, int]:
    models = list(SHAPES)
    place = models.index(case.model) if case.model in models else len(models)
    return -TIMED.index(case.suite), case.dtype, place, case.batch, case.rank


def markdown(lines: Sequence[RatioRow]) -> str:
    """The ratio_rows as a table."""
    return markdown_table(RATIO_HEADS, [each.cells() for each in lines])


HOST_HEADS = ("", "precision", "ms", "x frozen", "x PEFT", "Python calls", "operations")


def host_lines(rows: Iterable[Row]) -> str:
    """The rows of the host suite as a table, a line for each method; empty where there are none."""
    found = [
        (
            f"`{row.method}`",
            row.case.dtype,
            milliseconds(row.median_ms),
            times(row.ratio_frozen),
            times(row.ratio_peft),
            f"{row.python_calls:,}",
            f"{row.operations:,}",
        )
        for row in sorted(rows, key=lambda row: (row.case.dtype != "fp32", row.median_ms))
        if row.case.suite == "host"
    ]
    return markdown_table(HOST_HEADS, found, left=2) if found else ""
