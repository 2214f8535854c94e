"""shrink: h = x aT, with seeded dropout on x that keeps neither mask nor a second x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops import lora_dropout
from fused_lora.ops.lora_linear import as_rows, autocasts
from fused_lora.programs.run import refuse_double_backward, transformed, without_autocast
from fused_lora.types import Backend

# shrink with dropout under ``torch.compile``: registered ops with fake and autograd formulas.
#
#     h, mask = dropped_shrink(x, a, seed)      dx, da = dropped_shrink_backward(dh, x, a, mask)
#
#                 x, dx [M, K]   a, da [R, K]   h, dh [M, R]   seed, mask int64 on the CPU
#
# The graph draws a seed from torch's global generator as an eager call does, so that one that is
# compiled has the masks of one that is not. What stands for the mask is two numbers: the seed, and
# who formed it of that. Importing this module registers the ops.


LIBRARY = torch.library.Library("fused_lora", "FRAGMENT")
LIBRARY.define("dropped_shrink(Tensor x, Tensor a, Tensor seed, float p) -> (Tensor, Tensor)")
LIBRARY.define(
    "dropped_shrink_backward(Tensor dh, Tensor? x, Tensor a, Tensor mask, float p, bool needs_x) "
    "-> Tensor[]"
)
MAKERS = tuple(Backend)


def traced(x: Tensor, a: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """h [..., R] as one node of the graph, beside that of its seed."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    h, _ = torch.ops.fused_lora.dropped_shrink(rows, a, lora_dropout.drawn(), dropout)
    return h.reshape(*x.shape[:-1], a.shape[0])


def _forward(x: Tensor, a: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    number = int(seed)
    with without_autocast(x.device):
        rows = as_rows(x, x.dtype)
        by = lora_dropout.server(rows, a.shape[0], p)
        h = lora_dropout.shrink(rows, a, p, number, by)
    return h, torch.tensor((number, MAKERS.index(by)), dtype=torch.int64, device="cpu")


def _forward_fake(x: Tensor, a: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], a.shape[0]), seed.new_empty(2)


def _backward(
    dh: Tensor, x: Tensor | None, a: Tensor, mask: Tensor, p: float, needs_x: bool
) -> list[Tensor]:
    seed, by = mask.tolist()
    rows = None if x is None else as_rows(x, x.dtype)
    with without_autocast(dh.device):
        grads = lora_dropout.grads(as_rows(dh, dh.dtype), rows, a, p, seed, MAKERS[by], needs_x)
    return [grad.contiguous() for grad in grads if grad is not None]


def _backward_fake(
    dh: Tensor, x: Tensor | None, a: Tensor, mask: Tensor, p: float, needs_x: bool
) -> list[Tensor]:
    grads = [dh.new_empty(dh.shape[0], a.shape[1])] if needs_x else []
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    return grads if x is None else [*grads, da]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, _, ctx.p = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    if dh is None:
        return (None,) * 4
    x, a, mask = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    backward = torch.ops.fused_lora.dropped_shrink_backward
    grads = iter(backward(dh, x, a, mask, ctx.p, needs_x))
    dx = next(grads) if needs_x else None
    return dx, None if x is None else next(grads), None, None


LIBRARY.impl("dropped_shrink", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("dropped_shrink_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::dropped_shrink", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fused_lora::dropped_shrink_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fused_lora::dropped_shrink", _autograd, setup_context=_setup_context, lib=LIBRARY
)


# shrink: h = x aT, with seeded dropout on x that keeps neither mask nor a second x.
#
# With dropout, h = d(x) aT where d(x) = x m / (1 - p) and the mask m is drawn from a seed; backward
# draws it again: da = dhT d(x), dx = d(dh a). ``torch.compile``, which traces
# ``fused_lora.ops.lora_shrink``, has the seed, and so the mask, of an eager call.


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
    lora_dropout.check_dropout(dropout, "shrink")
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    if not dropout or transformed():
        x = F.dropout(x, dropout) if dropout else x
        return F.linear(x.to(dtype), a.to(dtype))
    if torch.compiler.is_compiling():
        return traced(x, a, dropout, dtype)
    return _DroppedShrink.apply(x, a, dropout, dtype)


class _DroppedShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
        rows, seed = as_rows(x, dtype), int(lora_dropout.drawn())
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, a)
        with without_autocast(x.device):
            by = lora_dropout.server(rows, a.shape[0], dropout)
            h = lora_dropout.shrink(rows, a, dropout, seed, by)
        ctx.meta = (x.shape, dropout, seed, by)
        return h.view(*x.shape[:-1], a.shape[0])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        shape, dropout, seed, by = ctx.meta
        rows, a = ctx.saved_tensors
        mask = (dropout, seed, by, ctx.needs_input_grad[0])
        with without_autocast(dh.device):
            dx, da = lora_dropout.grads(as_rows(dh, dh.dtype), rows, a, *mask)
        return None if dx is None else dx.view(shape), da, None, None
