"""Products small enough to emulate, each there for a reason.

All operands are few-bit numbers: every sum is exact in fp32, so that y is the truth, rounded once,
to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.types import Span

from .grad_cases import few_bits, one, padded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One shape, and why it is here."""

    why: str
    m: int
    k: int
    n: int
    spans: tuple[Span, ...]
    dtype: torch.dtype = BF16
    adapter: torch.dtype = F32
    gap: int = 0  # elements between rows of x, w and y, a multiple of 8
    processors: int = 1
    scale: float = 0.5


CASES = [
    Case("one whole tile, whole stages", 128, 128, 128, one(128, 16)),
    Case("tails on every side", 197, 72, 136, one(136, 5), gap=8),
    Case("less than one tile, less than one stage", 5, 24, 40, one(40, 3), F16),
    Case("one row, rank beyond a stage, stages beyond the ring", 1, 520, 128, one(128, 70)),
    Case("several tiles a block, in two columns", 300, 64, 264, one(264, 16), F16, F16, 0, 2),
    Case("qkv, groups that tiles divide", 130, 64, 384,
         tuple(Span(128 * g, 128 * g + 128, 16) for g in range(3)), processors=4),
    Case("qkv of 72, groups within a tile", 40, 64, 216,
         tuple(Span(72 * g, 72 * g + 72, 16 - 5 * g) for g in range(3)), scale=-2.0),
    Case("free columns, out of order, gaps, and a column of one", 70, 40, 200,
         (Span(150, 199, 3), Span(5, 64, 20), Span(100, 101, 4)), F16, gap=16),
    Case("adapters in the compute dtype, read where they are", 64, 72, 128, one(128, 24), BF16,
         BF16, scale=1.0),
    Case("no rank", 64, 64, 64, (Span(0, 64, 0),)),
]  # fmt: skip


class Problem:
    """The operands of ``case``, rows apart by NaN."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.x, self.w, self.dy = (
            padded(few_bits(*shape), case.gap, case.dtype)
            for shape in ((case.m, case.k), (case.n, case.k), (case.m, case.n))
        )
        self.bias = few_bits(case.n).to(case.dtype)
        self.factor = few_bits(case.n).to(case.dtype)
        a = [few_bits(span.rank, case.k).to(case.adapter) for span in case.spans]
        b = [few_bits(span.width, span.rank).to(case.adapter) for span in case.spans]
        self.adapters = Adapters(a, b, [case.scale] * len(a), case.spans)
        rank = self.adapters.rank
        self.h, self.dh = (few_bits(case.m, rank).to(case.dtype) for _ in range(2))

    def residual(self, columns: int) -> Tensor:
        """[M, ``columns``]."""
        return padded(few_bits(self.case.m, columns), self.case.gap, self.case.dtype)

    def out(self, columns: int) -> Tensor:
        """NaN [M, ``columns``], inside a larger tensor of NaN."""
        full = torch.full((self.case.m, columns), float("nan"))
        return padded(full, self.case.gap, self.case.dtype)

    def u(self) -> Tensor:
        """x wT + bias + s h bT in float64."""
        u = self.x.double() @ self.w.double().T + self.bias.double()
        for g, columns, ranks in self.adapters.ranks():
            b, s = self.adapters.b[g].double(), self.adapters.scales[g]
            u[:, columns] += s * self.h[:, ranks].double() @ b.T
        return u

    def dx(self) -> Tensor:
        """dy w + dh a in float64."""
        a = torch.cat([a_g.double() for a_g in self.adapters.a])
        return self.dy.double() @ self.w.double() + self.dh.double() @ a
