"""How much of an adapter's effect survives in y: a number between 0 and about 1.

The least-squares gain of y - y0 on the exact adapter term, with |s b a| = 1e-3 |w| and y0 the base
product rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.types import Span

RATIO = 1e-3
Forward = Callable[[Tensor, Tensor, Adapters], Tensor]


def gain(forward: Forward, m: int, k: int, n: int, r: int = 16) -> float:
    """Of one way to compute y [M, N] in bfloat16."""
    x, w = torch.randn(m, k).bfloat16(), (torch.randn(n, k) / k**0.5).bfloat16()
    a, b = torch.randn(r, k).bfloat16(), torch.randn(n, r).bfloat16()
    scale = RATIO * float(w.double().norm() / (b.double() @ a.double()).norm())
    term = scale * (x.double() @ a.double().T) @ b.double().T
    y = forward(x, w, Adapters([a], [b], (scale,), (Span(0, n, r),)))
    difference = y.double() - (x.double() @ w.double().T).bfloat16().double()
    return float((difference * term).sum() / (term * term).sum())


def separate(x: Tensor, w: Tensor, adapters: Adapters) -> Tensor:
    """y = x wT, rounded, then y += s h bT, rounded again."""
    h = x @ adapters.a[0].T
    return (x @ w.T).addmm_(h, adapters.b[0].T, alpha=adapters.scales[0])
