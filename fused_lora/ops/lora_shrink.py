"""shrink: h = x aT, with seeded dropout on x that keeps neither mask nor a second x.

With dropout, h = d(x) aT where d(x) = x m / (1 - p) and the mask m is drawn from a seed; backward
draws it again: da = dhT d(x), dx = d(dh a). ``torch.compile``, which traces
``fused_lora.ops.lora_shrink_traced``, has the seed, and so the mask, of an eager call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops import dropped
from fused_lora.ops.lora_linear import as_rows, autocasts
from fused_lora.programs.run import refuse_double_backward, transformed, without_autocast


def shrink(x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
    """h = x aT, the low-rank half of an adapter that a router may weigh before ``expand_add``.

    Args:
        x: [..., K].
        a: [R, K], any floating dtype.
        dropout: probability with which elements of x are dropped, the rest scaled up.

    Returns:
        h [..., R] in the compute dtype: autocast's if it is on, else x's.

    Raises:
        ValueError: shapes that do not fit, or a probability outside [0, 1).
    """
    if a.dim() != 2 or x.dim() == 0 or x.shape[-1] != a.shape[1]:
        raise ValueError(f"shrink: x {tuple(x.shape)} must end in K of a {tuple(a.shape)} = [R, K]")
    dropped.check_dropout(dropout, "shrink")
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    if not dropout or transformed():
        x = F.dropout(x, dropout) if dropout else x
        return F.linear(x.to(dtype), a.to(dtype))
    if torch.compiler.is_compiling():
        from fused_lora.ops.lora_shrink_traced import traced

        return traced(x, a, dropout, dtype)
    return _DroppedShrink.apply(x, a, dropout, dtype)


class _DroppedShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
        rows, seed = as_rows(x, dtype), int(dropped.drawn())
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, a)
        with without_autocast(x.device):
            by = dropped.server(rows, a.shape[0], dropout)
            h = dropped.shrink(rows, a, dropout, seed, by)
        ctx.meta = (x.shape, dropout, seed, by)
        return h.view(*x.shape[:-1], a.shape[0])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        shape, dropout, seed, by = ctx.meta
        rows, a = ctx.saved_tensors
        mask = (dropout, seed, by, ctx.needs_input_grad[0])
        with without_autocast(dh.device):
            dx, da = dropped.grads(as_rows(dh, dh.dtype), rows, a, *mask)
        return None if dx is None else dx.view(shape), da, None, None
