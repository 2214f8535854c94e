"""One line for each model and rank: this library beside what is like it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fused_lora.bench.rows import RACES, Case, Row
from fused_lora.bench.shapes import SHAPES
from fused_lora.bench.table import milliseconds, small, times

TITLES = {
    "train_step": "one training step: forward, loss, backward, AdamW",
    "wecolora_step": "one WeCoLoRA step: teacher forward, half of its blocks trained",
    "host": "the host's share of a step: twelve blocks whose arithmetic costs nothing",
    "six_projections": "the linear layers of one block, forward and backward",
}
HEADS = (
    *("model", "images", "rank", "ms", "x frozen", "x naive", "joint, x PEFT"),
    *("kept, MB (naive)", "error of y (naive)"),
)


@dataclass(frozen=True)
class Comparison:
    """One case: the row of ``fused`` and those it is compared with."""

    case: Case
    rows: Mapping[str, Row]  # by contender

    @property
    def title(self) -> str:
        """What was timed."""
        return TITLES.get(self.case.suite, self.case.suite)

    @property
    def dtype(self) -> str:
        """The precision."""
        return self.case.dtype

    def cells(self) -> tuple[str, ...]:
        """One line under HEADS; three adapters beside naive LoRA's three, joint beside PEFT."""
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


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Every case in which ``fused`` ran, in the order of suites, precisions, models and ranks."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if (row.case.mode, row.case.cache) != ("eager", "warm"):
            continue
        cases.setdefault(row.case, {})[row.contender] = row
    found = [Comparison(case, group) for case, group in cases.items() if "fused" in group]
    return sorted(found, key=lambda each: _order(each.case))


def _order(case: Case) -> tuple[int, str, int, int, int]:
    models = list(SHAPES)
    place = models.index(case.model) if case.model in models else len(models)
    return -RACES.index(case.suite), case.dtype, place, case.batch, case.rank


def markdown(lines: Sequence[Comparison]) -> str:
    """The comparisons as a table."""
    rule = ("---", *("---:",) * (len(HEADS) - 1))
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (HEADS, rule, *(each.cells() for each in lines))
    )


HOST_HEADS = ("", "precision", "ms", "x frozen", "x PEFT", "Python calls", "operations")


def host_lines(rows: Iterable[Row]) -> str:
    """The rows of the host suite as a table, a line for each method; empty where there are none."""
    found = [
        (
            f"`{row.contender}`",
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
    rule = ("---", "---", *("---:",) * (len(HOST_HEADS) - 2))
    lines = [f"| {' | '.join(cells)} |" for cells in (HOST_HEADS, rule, *found)]
    return "\n".join(lines) if found else ""
