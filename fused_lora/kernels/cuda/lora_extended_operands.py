"""Adapters as ``lora_extended`` reads them: 16-bit matrices in rows of whole 16 bytes.

    h, dh  [M, sum P]   group g in P_g columns, its rank and up to 7 zeros
    b      [N_g, R_g]   s b, rounded once to the compute dtype
    a      [sum P, K]   rows of group g, then its zeros

What lies so already is read where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.programs.record import begins_at

STEP = 8  # elements of 16 bytes


def padded(rank: int) -> int:
    """The next multiple of ``STEP``."""
    return -rank % STEP + rank


def aligned(matrix: Tensor) -> bool:
    """Whether its rows are contiguous and begin at multiples of 16 bytes."""
    whole_rows = matrix.stride(1) == 1 and matrix.stride(0) % STEP == 0
    return whole_rows and begins_at(matrix) % 16 == 0


def readable(matrix: Tensor) -> Tensor:
    """``matrix``, copied unless it is ``aligned``."""
    return matrix if aligned(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def parts(ranks: Sequence[int]) -> Iterator[slice]:
    """The columns of each group in h, its zeros left out."""
    firsts = accumulate((padded(rank) for rank in ranks), initial=0)
    return (slice(first, first + rank) for first, rank in zip(firsts, ranks, strict=False))


def stacked_a(adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """All a, [sum P, K] in ``dtype``."""
    ranks = [a_g.shape[0] for a_g in adapters.a]
    only = adapters.a[0]
    if len(ranks) == 1 and ranks[0] % STEP == 0 and only.dtype is dtype and aligned(only):
        return only
    stack = only.new_zeros(sum(map(padded, ranks)), only.shape[1], dtype=dtype)
    for part, a_g in zip(parts(ranks), adapters.a, strict=True):
        stack[part].copy_(a_g)
    return stack


def scaled_b(adapters: Adapters, dtype: torch.dtype) -> list[Tensor]:
    """s b of every group, [N_g, R_g] in ``dtype``, aligned."""
    return [
        b_g if s == 1.0 and b_g.dtype is dtype and aligned(b_g) else _scaled(b_g, s, dtype)
        for b_g, s in zip(adapters.b, adapters.scales, strict=True)
    ]


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    n, rank = b.shape
    room = b.new_empty(n, padded(rank), dtype=dtype)[:, :rank]
    return torch.mul(b, scale, out=room)


def spread(h: Tensor, ranks: Sequence[int]) -> Tensor:
    """``h`` [M, sum R] as [M, sum P]; the zeros between groups are not written, nor read."""
    if aligned(h) and all(rank % STEP == 0 for rank in ranks[:-1]):
        return h
    wide = h.new_empty(h.shape[0], sum(map(padded, ranks)))
    for part, narrow in zip(parts(ranks), h.split(list(ranks), 1), strict=True):
        wide[:, part].copy_(narrow)
    return wide


def packed(h: Tensor, adapters: Adapters) -> Tensor:
    """``h`` [M, sum P] as [M, sum R], rows contiguous: without the zeros."""
    if h.shape[1] == adapters.rank:
        return h
    return torch.cat([h[:, part] for part in parts([span.rank for span in adapters.spans])], 1)


def shrink(x: Tensor, adapters: Adapters) -> Tensor:
    """h = x aT, [M, sum P], by the library."""
    return torch.mm(x, stacked_a(adapters, x.dtype).t())


def shrink_grad(dy: Tensor, adapters: Adapters) -> Tensor:
    """dh = s dy b, [M, sum P], by the library."""
    ranks = [span.rank for span in adapters.spans]
    dh = dy.new_empty(dy.shape[0], sum(map(padded, ranks)))
    groups = zip(parts(ranks), scaled_b(adapters, dy.dtype), adapters.spans, strict=True)
    for part, b_g, span in groups:
        dh[:, part] = torch.mm(dy[:, span.start : span.stop], b_g)
    return dh
