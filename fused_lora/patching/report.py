"""What ``patch`` did, as a table; and what ``unpatch`` needs to undo it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One adapted linear."""

    module: str  # dotted name
    role: str  # "q|k|v", "out", ...
    k: int  # in_features
    n: int  # out_features
    ranks: tuple[int, ...]  # one per adapter
    parameters: int  # trained, in its adapters
    plan: str  # what computes it at the report's batch size


@dataclass
class PatchReport:
    """The adapted linears of one model; prints as a table."""

    model: str  # class name
    rows: list[Row]
    batch_size: int  # what the plans were made for
    device: str
    trainable: int  # parameters that train now, adapters and others
    total: int  # parameters in all
    froze: list[str] = field(default_factory=list, repr=False)  # names that trained before
    rows_per_image: dict[str, int] = field(default_factory=dict, repr=False)  # x rows per module
    left_alone: dict[str, str] = field(default_factory=dict)  # name: why it was not adapted

    def __str__(self) -> str:
        header = ("module", "role", "[N, K]", "rank", "parameters", "plan")
        body = [
            (
                row.module,
                row.role,
                f"[{row.n}, {row.k}]",
                "|".join(map(str, row.ranks)),
                f"{row.parameters:,}",
                row.plan,
            )
            for row in self.rows
        ]
        share = self.trainable / max(1, self.total)
        return "\n".join(
            [
                table(header, body),
                f"{self.model}: {len(self.rows)} linears adapted, {self.trainable:,} of "
                f"{self.total:,} parameters train ({share:.2%}); plans (forward/dx/gradient/kept) "
                f"are for batch {self.batch_size} on {self.device}",
                *(f"left alone: {name}: {why}" for name, why in self.left_alone.items()),
            ]
        )


def table(header: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *body]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
