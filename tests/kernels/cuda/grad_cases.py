"""Gradient problems small enough to emulate, each there for a reason.

x, dy, a and b are few-bit numbers: h and dh are exact before they are rounded to the type of the
products, so their rounding is the reference's to the bit and what is left of an error is that of
the sums. What is rounded to TF32 lies a little beside such a number, as far as rounds to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.types import Needs, Span

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
    arch: int = 90  # whose shared memory the plan may use
    given: str = ""  # "h", "dh" or both
    rows: int = 0  # elements between rows of x and dy
    scale: float = 0.5


def one(n: int, r: int) -> tuple[Span, ...]:
    return (Span(0, n, r),)


CASES = [
    Case("ViT-B, the narrowest it fits", 40, 768, 768, one(768, 16), arch=80),
    Case("ViT-S, fragments in shared memory", 33, 384, 384, one(384, 48)),
    Case("ViT-S, rank 64", 17, 384, 384, one(384, 64)),
    Case("ViT-B, rank 32", 17, 768, 768, one(768, 32)),
    Case("ViT-L", 17, 1024, 1024, one(1024, 16), F16),
    Case("fc1 of ViT-S", 17, 384, 1536, one(1536, 4)),
    Case("two rank blocks where shared memory is small", 33, 384, 384, one(384, 32), arch=89),
    Case("the rows of one image, odd multiples of 8", 197, 200, 136, one(136, 4)),
    Case("half a strip on both sides, three tiles a slice", 90, 8, 24, one(24, 5), F16, BF16),
    Case("one row", 1, 64, 40, one(40, 16), adapter=F16),
    Case("qkv", 50, 72, 216, tuple(Span(72 * g, 72 * g + 72, 16) for g in range(3))),
    Case("free ranks and columns, out of order, gaps", 35, 64, 136,
         (Span(104, 131, 3), Span(5, 64, 20)), rows=8),
    Case("rank 64 on four warps each", 20, 200, 200, one(200, 60), arch=80),
    Case("fc1 of ViT-B, a cluster of two", 40, 768, 3072, one(3072, 16)),
    Case("qkv of ViT-S, a cluster", 20, 384, 1152,
         tuple(Span(384 * g, 384 * g + 384, 16) for g in range(3))),
    Case("ViT-L, rank 64, a cluster of four", 20, 1024, 1024, one(1024, 64)),
    Case("a block of a cluster has no x, dh given", 33, 136, 3976, one(3976, 9), F16, given="dh"),
    Case("a cluster where shared memory is small", 33, 768, 768, one(768, 16), arch=120),
    Case("h given", 40, 136, 72, one(72, 10), given="h", rows=24),
    Case("dh given, crowded registers", 20, 384, 384, one(384, 50), given="dh"),
    Case("both given, one chunk", 40, 136, 200, one(200, 16), given="h dh"),
    Case("both given, many chunks", 20, 768, 3072, one(3072, 16), given="h dh", arch=89),
    Case("both given, rank 32 of two", 40, 200, 136, (Span(0, 64, 16), Span(64, 136, 9)),
         given="h dh", arch=120),
    Case("both given, rank 48", 33, 1024, 136, one(136, 48), F16, given="h dh"),
    Case("both given, rank 64", 33, 136, 136, one(136, 64), given="h dh", rows=16),
]  # fmt: skip
TF32_CASES = [
    Case("ViT-S", 20, 384, 384, one(384, 16), F32, arch=89),
    Case("ViT-B, fragments in registers, a narrow pitch", 12, 768, 768, one(768, 16), F32, arch=80),
    Case("fragments in registers, two rank blocks", 9, 384, 384, one(384, 32), F32, arch=89),
    Case("ViT-B, rank 32, a cluster of two", 12, 768, 768, one(768, 32), F32),
    Case("ViT-S, rank 48 of three, a cluster", 17, 384, 384,
         (Span(0, 128, 16), Span(128, 256, 16), Span(256, 384, 16)), F32),
    Case("ViT-S, rank 64, a cluster", 9, 384, 384, one(384, 64), F32),
    Case("fc1 of ViT-S, a cluster, rank 4", 12, 384, 1536, one(1536, 4), F32, BF16),
    Case("the rows of one image, odd multiples of 4", 197, 100, 68, one(68, 4), F32),
    Case("a quarter of a strip, three tiles a slice", 45, 4, 12, one(12, 5), F32, F16),
    Case("one row", 1, 36, 20, one(20, 16), F32),
    Case("free ranks and columns, out of order, gaps", 19, 68, 140,
         (Span(107, 134, 3), Span(5, 68, 20)), F32, rows=4),
    Case("h given", 21, 132, 76, one(76, 10), F32, given="h", rows=12),
    Case("dh given, two rank blocks", 20, 196, 100, one(100, 24), F32, arch=80, given="dh"),
    Case("dh given, crowded registers", 9, 180, 76, one(76, 40), F32, given="dh"),
    Case("both given, many chunks", 12, 768, 1540, one(1540, 16), F32, given="h dh", arch=89),
    Case("both given, rank 32 of two", 20, 200, 140, (Span(0, 64, 16), Span(64, 140, 9)), F32,
         given="h dh", arch=120),
    Case("both given, rank 48", 17, 260, 68, one(68, 48), F32, given="h dh"),
    Case("both given, rank 64", 17, 132, 68, one(68, 64), F32, given="h dh", rows=16),
]  # fmt: skip
CASES += TF32_CASES


class Problem:
    """The operands of ``case``; a and b are blocks of larger tensors, a transposed."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        ranks = [span.rank for span in case.spans]
        self.firsts = list(accumulate(ranks, initial=0))
        self.x = padded(self.beside(few_bits(case.m, case.k)), case.rows, case.dtype)
        self.dy = padded(self.beside(few_bits(case.m, case.n)), case.rows, case.dtype)
        a = [block(self.beside(few_bits(case.k, r)), case.adapter).T for r in ranks]
        b = [block(self.beside(few_bits(s.width, s.rank)), case.adapter) for s in case.spans]
        scales = [case.scale * (g + 1) for g in range(len(ranks))]
        self.adapters = Adapters(a, b, scales, case.spans)
        self.h, self.dh = self.shrunk()

    def factor(self, t: Tensor) -> Tensor:
        """``t`` as a product takes it, in float64."""
        return (to_tf32(t.float()) if self.case.dtype is F32 else t).double()

    def beside(self, values: Tensor) -> Tensor:
        """What rounds to ``values`` where products round."""
        if self.case.dtype is not F32:
            return values
        aside = 2 * torch.rand(values.shape, device=values.device) - 1
        return values * (1 + 2.0**-12 * 0.9 * aside)

    def shrunk(self) -> tuple[Tensor, Tensor]:
        """h and dh, [M, sum R], rounded once to the type of the products."""
        a, b, scales, spans = self.adapters
        h = torch.cat([self.factor(self.x) @ self.factor(a_g).T for a_g in a], 1)
        parts = [
            s * (self.factor(self.dy[:, span.start : span.stop]) @ self.factor(b_g))
            for b_g, s, span in zip(b, scales, spans, strict=True)
        ]
        both = [t.float().to(self.case.dtype) for t in (h, torch.cat(parts, 1))]
        h, dh = (self.factor(t).to(self.case.dtype) for t in both)
        return h, dh

    @property
    def given(self) -> dict[str, Tensor]:
        """h and dh, where the case gives them, with gaps between their rows."""
        named = dict(h=self.beside(self.h), dh=self.beside(self.dh))
        return {name: padded(named[name], 3, self.case.dtype) for name in self.case.given.split()}

    def expected(self, needs: Needs) -> Grads:
        """In float64, from h and dh as they are rounded; then in the operands' dtypes."""
        _, _, scales, spans = self.adapters
        a: list[Tensor | None] = [None] * len(spans)
        b: list[Tensor | None] = [None] * len(spans)
        for g, (span, s) in enumerate(zip(spans, scales, strict=True)):
            ranks = slice(self.firsts[g], self.firsts[g + 1])
            if needs.a:
                x = self.factor(self.x)
                a[g] = (self.dh[:, ranks].double().T @ x).to(self.case.adapter)
            if needs.b:
                dy = self.factor(self.dy[:, span.start : span.stop])
                b[g] = (s * dy.T @ self.h[:, ranks].double()).to(self.case.adapter)
        bias = self.dy.double().sum(0).to(self.case.dtype) if needs.bias else None
        return Grads(None, None, bias, a, b)


def to_tf32(t: Tensor) -> Tensor:
    """fp32 ``t`` with the ten bits of fraction that TF32 has; ties go away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(F32)


def few_bits(*shape: int) -> Tensor:
    """Eighths between -1 and 1: products and sums of thousands of them are exact in fp32."""
    return torch.randint(-8, 9, shape) / 8


def padded(values: Tensor, gap: int, dtype: torch.dtype, device: str | None = None) -> Tensor:
    """``values`` with ``gap`` NaN between rows."""
    m, n = values.shape
    buffer = torch.full((m, n + gap), float("nan"), dtype=dtype, device=device or values.device)
    return buffer[:, :n].copy_(values)


def block(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` inside a larger tensor of NaN."""
    m, n = values.shape
    buffer = torch.full((m + 3, n + 5), float("nan"), dtype=dtype)
    return buffer[1 : m + 1, 2 : n + 2].copy_(values)
