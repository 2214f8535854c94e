"""Random grouped problems: shapes nobody rounds, strided adapters, free column ranges."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.types import Span


@dataclass
class Problem:
    """The operands of one call, in the dtype they are computed in."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    a: list[Tensor]
    b: list[Tensor]
    scales: tuple[float, ...]
    spans: tuple[Span, ...]
    dy: Tensor

    def double(self) -> Problem:
        """The same, already rounded, numbers in float64."""
        up = lambda t: None if t is None else t.double()  # noqa: E731
        return Problem(
            up(self.x), up(self.w), up(self.bias), [up(t) for t in self.a],
            [up(t) for t in self.b], self.scales, self.spans, up(self.dy),
        )  # fmt: skip


def strided(rng: random.Random, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] as a sub-block of a larger tensor, transposed one time in three."""
    if rng.random() < 0.3:
        return strided_block(rng, columns, rows, dtype).t()
    return strided_block(rng, rows, columns, dtype)


def strided_block(rng: random.Random, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The first rows and columns of a larger tensor, or a tensor of its own."""
    extra = rng.choice([0, 0, 3])
    return torch.randn(rows + extra, columns + extra, dtype=dtype)[:rows, :columns]


def draw(seed: int, dtype: torch.dtype) -> Problem:
    """Problem number ``seed``: M 0..3000, K and N 8..1024, G 1..4, R 1..512."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = lambda low, high: round(low * (high / low) ** rng.random())  # noqa: E731
    m = rng.choice([0, 1, 197, *[size(2, 3000)] * 17])
    k, n, groups = size(8, 1024), size(8, 1024), rng.randint(1, 4)
    cuts = sorted(rng.sample(range(n + 1), 2 * groups)) if rng.random() < 0.3 else None
    cuts = cuts or [c for g in range(groups) for c in (n * g // groups, n * (g + 1) // groups)]
    spans = tuple(
        Span(start, stop, min(size(1, 512), k, stop - start))
        for start, stop in zip(cuts[::2], cuts[1::2], strict=True)
    )
    return Problem(
        torch.randn(m, k, dtype=dtype),
        torch.randn(n, k, dtype=dtype) / k**0.5,
        torch.randn(n, dtype=dtype) if rng.random() < 0.5 else None,
        [strided(rng, span.rank, k, dtype) / k**0.5 for span in spans],
        [strided(rng, span.width, span.rank, dtype) / span.rank**0.5 for span in spans],
        tuple(rng.choice([1.0, 0.25, 2.0]) for _ in spans),
        spans,
        torch.randn(m, n, dtype=dtype),
    )
