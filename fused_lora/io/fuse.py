"""Several adapters on column ranges of one linear are exactly one adapter of rank sum R.

    A = [a_q; a_k; a_v]                  [sum R, K]
    B = diag(f_q b_q, f_k b_k, f_v b_v)  [N, sum R], zero outside the blocks
    s = the scale largest in magnitude,  f_g = s_g / s

Where all scales are equal, every f is 1 and the blocks hold the b_g bit for bit. Otherwise a block
is rounded once; |f| <= 1, so it never overflows. Where dividing it by f does not give b_g back to
the bit, b_g itself is written under a key of its own, which PEFT passes over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.io.keys import AdapterFileError
from fused_lora.nn import AdaptedLinear
from fused_lora.types import Span


@dataclass(frozen=True)
class Group:
    """One adapter's place in the fused one."""

    name: str  # "" where the linear has one adapter
    span: Span  # its columns of y, its rank
    scale: float  # s_g
    factor: float = 1.0  # f_g


def groups_of(module: AdaptedLinear, scale: float | None = None) -> tuple[Group, ...]:
    """The module's groups with its own scales, or all with ``scale``."""
    scales = module.scales if scale is None else (scale,) * len(module.scales)
    top = max(scales, key=abs)
    return tuple(
        Group(name, span, s, 1.0 if s == top else s / top)
        for (name, span), s in zip(module.groups.items(), scales, strict=True)
    )


def outer_scale(groups: Sequence[Group]) -> float:
    """The scale of the fused adapter."""
    return max((group.scale for group in groups), key=abs)


def total_rank(groups: Sequence[Group]) -> int:
    """Rank of the fused adapter."""
    return sum(group.span.rank for group in groups)


def fuse(
    groups: Sequence[Group], pairs: Mapping[str, tuple[Tensor, Tensor]], columns: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(A, B, the b_g that folding would round), by copies of the (a_g, b_g) of each group."""
    a = torch.cat([pairs[group.name][0] for group in groups])
    halves = [pairs[group.name][1] for group in groups]
    dtype = torch.cat([b[:0, :0] for b in halves]).dtype  # as cat promotes
    fused = a.new_zeros(columns, len(a), dtype=dtype)
    unfolded = {}
    for (group, block), b in zip(_blocks(fused, groups), halves, strict=True):
        block.copy_(_times(b.to(dtype), group.factor))
        if not torch.equal(_over(block, group.factor), b.to(dtype)):
            unfolded[group.name] = b.clone()
    return a, fused, unfolded


def split(
    a: Tensor, b: Tensor, groups: Sequence[Group], where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(a_g, b_g) by group name; raises AdapterFileError if b is not zero outside the blocks."""
    outside = b.clone()
    for _, block in _blocks(outside, groups):
        block.zero_()
    if count := int(torch.count_nonzero(outside)):
        names = [group.name for group in groups]
        raise AdapterFileError(
            f"{where}: {count} values of {tuple(b.shape)} are not zero outside the blocks of "
            f"{names}, so this one adapter is not {len(names)} separate ones: patch with "
            f'qkv="joint" and rank {len(a)} there'
        )
    rows = torch.split(a, [group.span.rank for group in groups])
    return {
        group.name: (row, _over(block, group.factor))
        for row, (group, block) in zip(rows, _blocks(b, groups), strict=True)
    }


def _blocks(b: Tensor, groups: Sequence[Group]) -> Iterator[tuple[Group, Tensor]]:
    first = 0
    for group in groups:
        last = first + group.span.rank
        yield group, b[group.span.start : group.span.stop, first:last]
        first = last


def _times(b: Tensor, factor: float) -> Tensor:
    return b if factor == 1.0 else (b.double() * factor).to(b.dtype)


def _over(block: Tensor, factor: float) -> Tensor:
    return block if factor in (0.0, 1.0) else (block.double() / factor).to(block.dtype)
