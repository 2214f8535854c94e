"""Adapters with dropout on their x: who masks, by which seed, and the two passes around it.

    h = (D x) aT      y = x wT + bias + s h bT      dh = s dy b
    da = dhT (D x)    db = s dyT h                  dx = dy w + D (dh a)

What is kept of D, elementwise keep / (1 - p), is its seed: a number of torch's global generator, so
both checkpoint modes see the mask that they recompute. Triton's kernels, where this device trusts
them, form the mask as they read x; the library fills a tensor like x with it, for as long as two
products take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.aten import lora_linear as library
from fused_lora.kernels.aten import lora_linear_cases as aten
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.ops.backends import why_not_launch
from fused_lora.types import Backend, Forward, Gradient, Keep, Needs, Plan
from fused_lora.verify.verdicts import why_not_concrete

MOST_DROPOUT = 1 - 2**-17  # that 16 random bits express
# What forms h apart from the base product.
FORMS_H = (Forward.SEPARATE, Forward.BORDERED, Forward.EXTENDED, Forward.OPEN)


def check_dropout(dropout: float, where: str) -> None:
    """Raises ValueError unless it is a probability below 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{where}: dropout must lie in [0, 1), got {dropout}")


def drawn() -> Tensor:
    """A seed of torch's global generator, an int64 on the CPU; a compiler draws each call's own."""
    seed = torch.empty((), dtype=torch.int64, device="cpu")
    if torch.compiler.is_compiling():  # which sees no write to a tensor of its own as a draw
        return torch.ops.aten.random.default(seed)
    return seed.random_()


def seeded(operation: Any, inputs: Sequence[Any]) -> list[Any]:
    """``inputs`` with a seed drawn wherever ``operation`` reads one."""
    filled = list(inputs)
    for place in operation.seeds:
        filled[place] = drawn()
    return filled


def server(rows: Tensor, rank: int, dropout: float) -> Backend:
    """Who serves one call, forward and backward: the mask is of one making in both."""
    return Backend.ATEN if why_not_triton(rows, rank, dropout) else Backend.TRITON


def why_not_triton(rows: Tensor, r: int, dropout: float) -> str | None:
    """One sentence why Triton cannot serve h = d(rows) aT of ``r`` ranks; None when it can."""
    m, k = rows.shape
    if dropout >= MOST_DROPOUT:
        return f"it draws 16 bits for each element, too few for a dropout of {dropout}"
    return (
        why_not_launch("shrink_dropout", m, r, k, rows)
        or why_not_launch("grad_dropout", r, k, m, rows)
        or why_not_launch("extended_dropout", m, k, 0, rows)
    )


def shrink(rows: Tensor, a: Tensor, dropout: float, seed: aten.Seed, by: Backend) -> Tensor:
    """h [M, R] of rows [M, K]."""
    return _backend(by).dropout_shrink(rows, a, dropout, seed)  # type: ignore[no-any-return]


def grads(
    dh: Tensor,  # [M, R], rows contiguous
    rows: Tensor | None,  # [M, K]; None where a asks for no gradient
    a: Tensor,  # [R, K]
    dropout: float,
    seed: aten.Seed,
    by: Backend,  # as in forward
    needs_x: bool,
    dx: Tensor | None = None,  # [M, K], what that of the branch is added to
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and da, where asked for, through the mask of forward."""
    given = (dh, rows, a, dropout, seed, needs_x, dx)
    if by is Backend.TRITON and why_not_concrete(dh):
        return aten.dropout_grads(*given, counted=True)  # the mask that the kernels drew
    return _backend(by).dropout_grads(*given)  # type: ignore[no-any-return]


def plan_of(plan: Plan, needs: Needs, by: Backend) -> Plan:
    """``plan`` as far as it serves a dropped branch, whose h and gradients are formed apart."""
    forward = plan.forward
    if forward not in FORMS_H:
        plan, forward = replace(plan, backend=Backend.ATEN), Forward.SEPARATE
    return replace(
        plan,
        forward=forward,
        dx=Forward.SEPARATE,
        gradient=Gradient.RANK if needs.a or needs.b else Gradient.NONE,
        keep=Keep.HIDDEN if needs.b else Keep.NOTHING,
        grads_by=None,
        writes_dh=False,
        dropped_by=by,
    )


def hidden(rows: Tensor, adapters: Adapters, dropout: float, seed: aten.Seed, plan: Plan) -> Tensor:
    """h [M, sum R]."""
    assert plan.dropped_by
    return shrink(rows, adapters.stacked_a(), dropout, seed, plan.dropped_by)


def backward(
    dy: Tensor,  # [M, N], rows contiguous
    rows: Tensor | None,  # [M, K]; None where no gradient reads it
    h: Tensor | None,  # [M, sum R]; formed again where needed and not given
    w: Tensor | None,  # [N, K]; None where dx is not asked for
    adapters: Adapters,
    dropout: float,
    seed: aten.Seed,
    needs: Needs,
    plan: Plan,
) -> Grads:
    """The gradients named by ``needs``."""
    assert plan.dropped_by
    low = adapters.to(dy.dtype)
    a: list[Tensor | None] = [None] * len(low.spans)
    b = list(a)
    if needs.b:
        if h is None:
            assert rows is not None
            h = hidden(rows, adapters, dropout, seed, plan)
        b = [*library.b_grads(dy, h, adapters, low)]
    dx = None
    if needs.x:
        assert w is not None
        dx = dy @ w
    if needs.x or needs.a:
        stacked, dh = adapters.stacked_a(), library.shrink_grad(dy, low)
        given = (dropout, seed, plan.dropped_by, needs.x, dx)
        dx, da = grads(dh, rows if needs.a else None, stacked, *given)
        if da is not None:
            a = [da[ranks].to(adapters.a[g].dtype) for g, _, ranks in adapters.ranks()]
    dw = None
    if needs.w:
        assert rows is not None
        dw = dy.t() @ rows
    return Grads(dx, dw, dy.sum(0) if needs.bias else None, a, b)


def _backend(by: Backend) -> Any:
    if by is Backend.ATEN:
        return aten
    from fused_lora.kernels.triton import lora_linear as triton

    return triton
