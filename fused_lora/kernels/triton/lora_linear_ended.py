"""EXTENDED of lora_linear with an ending: y rounded once behind all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters, Ending
from fused_lora.kernels.triton import lora_extended
from fused_lora.kernels.triton.border import packed
from fused_lora.kernels.triton.launches import tile_of
from fused_lora.kernels.triton.lora_linear import readable, rows, rows_kept, shrink, uniform
from fused_lora.types import Keep, Plan, ragged


def forward_epilogue(
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    ending: Ending,
    out: Tensor | None = None,  # [M, N] for y, rows contiguous
    h: Tensor | None = None,  # [M, sum R] where it is there already
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], h [M, sum R] where the plan keeps it, and u [M, N] where the ending stores it."""
    active, factor, residual, stores_u = ending
    low = packed(uniform(adapters), x.dtype, rows_kept(x, plan))
    x, bias = rows(x), None if bias is None else bias.contiguous()
    n, k = w.shape
    kernel, uneven = ending.kernel(x.dtype), ragged(adapters.spans)
    tile = tile_of(kernel, x.shape[0], n, k, x.dtype, x.device, uneven)
    x, w = (readable(t, tile) for t in (x, w))
    h = shrink(x, low) if h is None else readable(h, tile)
    dtype = x.dtype
    for t in (factor, residual):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    if out is None:
        out = x.new_empty((x.shape[0], n), dtype=dtype)
    y, _, u = lora_extended.forward(
        *(x, w, bias, low, active, h, tile),
        factor=factor,
        residual=residual,
        out=out,
        stores_u=stores_u or x.element_size() > 2,  # without it fp32 spills in some tiles
    )
    return y, h.contiguous() if plan.keep is Keep.HIDDEN else None, u
