"""The Hopper product with an ending: y rounded once behind all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_extended
from fused_lora.kernels.cuda.lora_extended_operands import aligned, packed, readable
from fused_lora.kernels.cuda.lora_linear import vector
from fused_lora.kernels.interface import Adapters, Ending
from fused_lora.types import Keep, Plan


def kind(ending: Ending) -> str:
    """What a check of it is called: gelu, or scale."""
    return "scale" if ending.activation == "none" else "gelu"


def why_not_epilogue(dtype: torch.dtype, ending: Ending) -> str | None:
    """One sentence why a product of ``dtype`` cannot end so; None when it can."""
    for name, t in (("factor", ending.factor), ("residual", ending.residual)):
        if t is not None and t.dtype is not dtype:
            return f"its ending reads a {name} of {dtype}, got {t.dtype}"
    if ending.residual is not None and not aligned(ending.residual):
        return "the residual or its rows do not begin at multiples of 16 bytes"
    return None


def forward_epilogue(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    ending: Ending,
    out: Tensor | None = None,  # [M, N] for y, rows contiguous
    h: Tensor | None = None,  # [M, sum R] where it is there already
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], h [M, sum R] where the plan keeps it, and u [M, N] of an activation."""
    direct = out if out is not None and aligned(out) else None
    y, h, u = lora_extended.forward(
        *(readable(x), readable(w), vector(bias), adapters, ending.activation, h),
        factor=vector(ending.factor),
        residual=ending.residual,
        out=direct,
    )
    if out is not None and direct is None:
        y = out.copy_(y)
    return y, packed(h, adapters) if plan.keep is Keep.HIDDEN else None, u
