"""What a patch did, row by row, and the error that says why it did nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

IN_WEIGHT = "in the weight, at every read"  # the plan of a weight that is read, not called


class PatchError(ValueError):
    """The model cannot be patched as asked; it was left as it was."""


@dataclass(frozen=True)
class ProjectionRow:
    """One adapted linear."""

    module: str  # dotted name
    role: str  # "q|k|v", "out", ...
    k: int  # in_features
    n: int  # out_features
    ranks: tuple[int, ...]  # one per adapter
    parameters: int  # trained, in its adapters
    plan: str  # what computes it at the report's batch size
    base_error: float | None = None  # |w^ - w| / |w| of a base in FP8, w^ what it computes with


@dataclass(frozen=True)
class BlockRow:
    """One block, or one MLP by itself: fused over or left to its modules."""

    name: str  # dotted
    level: str  # "block" | "mlp" | "linear"
    recompute: str = ""  # what backward recomputes; empty at the level of linears
    reason: str = ""  # why it, or a half of it, was left to its modules
    kept_bytes: int = 0  # of activations, for backward, at the report's batch size

    @property
    def words(self) -> str:
        """What holds for this row and others like it."""
        if self.level == "linear":
            return f"left to its modules: {self.reason}"
        kept = f", keeps {self.kept_bytes / 1e6:,.1f} MB" if self.kept_bytes else ""
        half = f"; one half left to its modules, {self.reason}" if self.reason else ""
        return f"fused, recompute {self.recompute}{kept}{half}"


@dataclass(frozen=True)
class ShareRow:
    """One module with separate projections side by side."""

    name: str  # dotted
    members: tuple[str, ...]  # those that share one x; none where each computes by itself
    reason: str = ""  # why they do not

    @property
    def words(self) -> str:
        """What holds for this row and others like it."""
        if self.reason:
            return f"each computes by itself: {self.reason}"
        return f"{', '.join(self.members)} in one call"


@dataclass
class PatchReport:
    """The adapted linears of one model; prints as a table."""

    model: str  # class name
    rows: list[ProjectionRow]
    batch_size: int  # what the plans were made for
    device: str
    trainable: int  # parameters that train now, adapters and others
    total: int  # parameters in all
    froze: list[str] = field(default_factory=list, repr=False)  # names that trained before
    rows_per_image: dict[str, int] = field(default_factory=dict, repr=False)  # x rows per module
    blocks: list[BlockRow] = field(default_factory=list)  # empty at the level of linears
    left_alone: dict[str, str] = field(default_factory=dict)  # name: why it was not adapted
    shares: list[ShareRow] = field(default_factory=list)  # separate projections of one module
    hook: Any = field(default=None, repr=False, compare=False)  # of the stem, for checkpoints
    base_row: Tensor | None = field(default=None, repr=False, compare=False)  # of a weight, then

    @classmethod
    def of(
        cls, model: nn.Module, rows: list[ProjectionRow], batch_size: int, **more: Any
    ) -> PatchReport:
        """The report on ``model`` as it is now; ``more`` are the fields with a default."""
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trainable, total = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
        device = str(next(model.parameters()).device)
        return cls(type(model).__name__, rows, batch_size, device, trainable, total, **more)

    def __str__(self) -> str:
        header: tuple[str, ...] = ("module", "role", "[N, K]", "rank", "parameters", "plan")
        body: list[tuple[str, ...]] = [
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
        if any(row.base_error is not None for row in self.rows):
            header += ("base error",)
            body = [(*cells, _error(row)) for cells, row in zip(body, self.rows, strict=True)]
        share = self.trainable / max(1, self.total)
        return "\n".join(
            [
                table(header, body),
                f"{self.model}: {len(self.rows)} linears adapted, {self.trainable:,} of "
                f"{self.total:,} parameters train ({share:.2%}); plans (forward/dx/gradient/kept) "
                f"are for batch {self.batch_size} on {self.device}",
                *grouped(self.blocks),
                *grouped(self.shares),
                *(f"left alone: {name}: {why}" for name, why in self.left_alone.items()),
            ]
        )


def _error(row: ProjectionRow) -> str:
    return "" if row.base_error is None else f"{row.base_error:.2e}"


def grouped(blocks: Sequence[BlockRow | ShareRow]) -> list[str]:
    """A line for all rows that say the same."""
    names: dict[str, list[str]] = {}
    for row in blocks:
        names.setdefault(row.words, []).append(row.name or "the model itself")
    return [f"{first_and_more(found)}: {words}" for words, found in names.items()]


def first_and_more(names: Sequence[str]) -> str:
    """The first name, and how many there are beside it."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def table(header: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *body]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
