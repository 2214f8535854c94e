"""shrink: h = x aT, with seeded dropout on x that keeps neither mask nor a second x.

With dropout, h = d(x) aT where d(x) = x m / (1 - p) and the mask m is drawn from a seed; backward
draws it again: da = dhT d(x), dx = d(dh a). The seed comes from torch's global generator, so both
checkpoint modes see the mask that they recompute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops.lora_linear import as_rows, autocasts, refuse_double_backward, without_autocast
from fused_lora.ops.lora_linear_plain import transformed


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
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"shrink: dropout must lie in [0, 1), got {dropout}")
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    if dropout and not (torch.compiler.is_compiling() or transformed()):
        return _DroppedShrink.apply(x, a, dropout, dtype)
    x = F.dropout(x, dropout) if dropout else x
    return F.linear(x.to(dtype), a.to(dtype))


def dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x m / (1 - p), the same m for the same seed and shape."""
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1.0 - dropout, generator=generator)
    return mask.mul_(x).mul_(1.0 / (1.0 - dropout))


class _DroppedShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
        rows = as_rows(x, dtype)
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        ctx.meta = (x.shape, dropout, seed)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, a)
        with without_autocast(x.device):
            h = F.linear(dropped(rows, dropout, seed), a.to(dtype))
        return h.view(*x.shape[:-1], a.shape[0])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        shape, dropout, seed = ctx.meta
        rows, a = ctx.saved_tensors
        dh = as_rows(dh, dh.dtype)
        dx = da = None
        with without_autocast(dh.device):
            if ctx.needs_input_grad[0]:
                dx = dropped(dh @ a.to(dh.dtype), dropout, seed).view(shape)
            if rows is not None:
                da = (dh.t() @ dropped(rows, dropout, seed)).to(a.dtype)
        return dx, da, None, None
