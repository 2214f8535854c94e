"""Parts of parameters as operands, with gradients that are never padded to the parameter's size.

    autograd   dA = dA_t + pad(dA_s)                pad: a zero-filled tensor of A's size, per use
    borrow     dA = dA_t,  dA[:R, :K_s] += dA_s     one kernel on the part, in autograd's order

A part's backward puts its gradient aside, under the backward pass that runs, and hands the
parameter's edge a stride-0 zero: it costs no memory and keeps the edge alive. When all uses have
run, a hook on the parameter replaces that zero by the sum. So ``.grad``, ``torch.autograd.grad``,
accumulation over passes and DDP see what they always see. What is put aside belongs to the pass: it
is gone when the pass ends, by an exception too.

Hooks that a user put on the parameter itself (``Tensor.register_hook``) before its first shared
backward see the zero instead of the gradient; ``register_post_accumulate_grad_hook`` sees it whole.
Under ``torch.compile`` and ``torch.func``, and where the parameter is no leaf, parts are autograd's
own slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.nn.aside import put_aside
from fused_lora.nn.box import Box
from fused_lora.programs.run import refuse_double_backward, transformed


def borrow(owners: Sequence[Tensor], boxes: Sequence[Box]) -> list[Tensor]:
    """One view per (owner, box); an owner may come several times.

    Raises:
        TypeError: an owner that is sharded over devices, of which no part can be had.
    """
    lent = [i for i, owner in enumerate(owners) if lends(owner)]
    if len(lent) == len(owners):
        return list(_Borrow.apply(boxes, *owners))
    parts = [box.of(owner) for owner, box in zip(owners, boxes, strict=True)]
    if lent:
        borrowed = _Borrow.apply([boxes[i] for i in lent], *(owners[i] for i in lent))
        for i, part in zip(lent, borrowed, strict=True):
            parts[i] = part
    return parts


def lends(owner: Tensor) -> bool:
    """Whether a part of ``owner`` is to be borrowed; otherwise it is autograd's slice."""
    if type(owner) is not nn.Parameter and hasattr(owner, "device_mesh"):
        raise TypeError(
            f"a {type(owner).__name__} {tuple(owner.shape)} is sharded over {owner.device_mesh}: "
            "parts of it cannot be shared; keep adapters unsharded"
        )
    trains = owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()
    return trains and not (torch.compiler.is_compiling() or transformed())


class _Borrow(torch.autograd.Function):
    """Views out; their gradients into the accounts of the owners."""

    @staticmethod
    def forward(ctx: Any, boxes: list[Box], *owners: Tensor) -> tuple[Tensor, ...]:
        """One view per owner."""
        ctx.boxes, ctx.owners = boxes, owners
        ctx.set_materialize_grads(False)
        return tuple(box.of(owner) for box, owner in zip(boxes, owners, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Per owner: the zero that stands for all of its parts, once per pass."""
        refuse_double_backward()
        return None, *put_aside(ctx.owners, ctx.boxes, grads)
