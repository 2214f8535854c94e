"""shrink with dropout under ``torch.compile``: registered ops with fake and autograd formulas.

    h, mask = dropped_shrink(x, a, seed)      dx, da = dropped_shrink_backward(dh, x, a, mask)

                x, dx [M, K]   a, da [R, K]   h, dh [M, R]   seed, mask int64 on the CPU

The graph draws a seed from torch's global generator as an eager call does, so that one that is
compiled has the masks of one that is not. What stands for the mask is two numbers: the seed, and
who formed it of that. Importing this module registers the ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_lora.ops import dropped
from fused_lora.ops.lora_linear import as_rows
from fused_lora.programs.run import refuse_double_backward, without_autocast
from fused_lora.types import Backend

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
    h, _ = torch.ops.fused_lora.dropped_shrink(rows, a, dropped.drawn(), dropout)
    return h.reshape(*x.shape[:-1], a.shape[0])


def _forward(x: Tensor, a: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    number = int(seed)
    with without_autocast(x.device):
        rows = as_rows(x, x.dtype)
        by = dropped.server(rows, a.shape[0], p)
        h = dropped.shrink(rows, a, p, number, by)
    return h, torch.tensor((number, MAKERS.index(by)), dtype=torch.int64, device="cpu")


def _forward_fake(x: Tensor, a: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], a.shape[0]), seed.new_empty(2)


def _backward(
    dh: Tensor, x: Tensor | None, a: Tensor, mask: Tensor, p: float, needs_x: bool
) -> list[Tensor]:
    seed, by = mask.tolist()
    rows = None if x is None else as_rows(x, x.dtype)
    with without_autocast(dh.device):
        grads = dropped.grads(as_rows(dh, dh.dtype), rows, a, p, seed, MAKERS[by], needs_x)
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
