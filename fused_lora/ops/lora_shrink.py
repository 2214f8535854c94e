"""shrink: h = x aT, with seeded dropout on x that keeps neither mask nor a second x.

With dropout, h = d(x) aT where d(x) = x m / (1 - p) and the mask m is drawn from a seed; backward
draws it again: da = dhT d(x), dx = d(dh a). Triton's kernels, where this device trusts them, form
it as they read x; the library fills a tensor like x with it, for as long as a GEMM takes. The seed
comes from torch's global generator, so both checkpoint modes see the mask that they recompute, and
``torch.compile``, which traces ``fused_lora.ops.lora_shrink_traced``, the one of an eager call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.aten import lora_dropout as aten
from fused_lora.ops.backends import why_not_launch
from fused_lora.ops.lora_linear import as_rows, autocasts
from fused_lora.programs.run import refuse_double_backward, transformed, without_autocast
from fused_lora.trust.moment import untouchable
from fused_lora.types import Backend

MOST_DROPOUT = 1 - 2**-17  # that 16 random bits express


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
        rows, seed = as_rows(x, dtype), int(drawn())
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, a)
        with without_autocast(x.device):
            h, by = forward(rows, a, dropout, seed)
        ctx.meta = (x.shape, dropout, seed, by)
        return h.view(*x.shape[:-1], a.shape[0])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        shape, dropout, seed, by = ctx.meta
        rows, a = ctx.saved_tensors
        mask = (dropout, seed, by, ctx.needs_input_grad[0])
        with without_autocast(dh.device):
            dx, da = backward(as_rows(dh, dh.dtype), rows, a, *mask)
        return None if dx is None else dx.view(shape), da, None, None


def drawn() -> Tensor:
    """A seed of torch's global generator, an int64 on the CPU; a compiler draws each call's own."""
    return torch.ops.aten.random.default(torch.empty((), dtype=torch.int64, device="cpu"))


def forward(rows: Tensor, a: Tensor, dropout: float, seed: int) -> tuple[Tensor, Backend]:
    """h [M, R] of rows [M, K], and who made its mask."""
    by = server(rows, a, dropout)
    return _backend(by).shrink(rows, a, dropout, seed), by


def backward(
    dh: Tensor,  # [M, R], rows contiguous
    rows: Tensor | None,  # [M, K]; None where a asks for no gradient
    a: Tensor,  # [R, K]
    dropout: float,
    seed: int,
    by: Backend,  # as ``forward`` said
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and da, where asked for, through the mask of ``forward``."""
    face, mask = _backend(by), [dropout, seed]
    if by is Backend.TRITON and untouchable(dh):
        face, mask = aten, [dropout, seed, True]  # the mask that the kernels drew
    dx = face.input_grad(dh, a, *mask) if needs_x else None
    return dx, None if rows is None else face.a_grad(dh, rows, a, *mask)


def server(rows: Tensor, a: Tensor, dropout: float) -> Backend:
    """Who serves one call, forward and backward: the mask is of one making in both."""
    return Backend.ATEN if why_not_triton(rows, a, dropout) else Backend.TRITON


def why_not_triton(rows: Tensor, a: Tensor, dropout: float) -> str | None:
    """One sentence why Triton cannot serve h = d(rows) aT; None when it can."""
    (m, k), r = rows.shape, a.shape[0]
    if dropout >= MOST_DROPOUT:
        return f"it draws 16 bits for each element, too few for a dropout of {dropout}"
    return (
        why_not_launch("shrink_dropout", m, r, k, rows)
        or why_not_launch("grad_dropout", r, k, m, rows)
        or why_not_launch("extended_dropout", m, k, 0, rows)
    )


def _backend(by: Backend) -> Any:
    if by is Backend.ATEN:
        return aten
    from fused_lora.kernels.triton import lora_dropout as triton

    return triton
