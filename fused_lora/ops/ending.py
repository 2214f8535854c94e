"""A product and what follows it: in the kernel's epilogue where one is trusted, else composed.

u = x wT + bias + s h bT      y = residual + factor act(u)
"""

from __future__ import annotations

from torch import Tensor

from fused_lora.kernels.interface import Adapters, Ending
from fused_lora.kernels.triton import available
from fused_lora.ops import gelu
from fused_lora.ops.backends import why_not_launch
from fused_lora.ops.chain.recipe import finish
from fused_lora.ops.lora_linear import forward
from fused_lora.types import Backend, Forward, Impl, Plan

Ended = tuple[Tensor, Tensor | None, Tensor | None]


def ended(
    rows: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    adapters: Adapters,
    plan: Plan,
    impl: Impl,
    ending: Ending,
    bordered: Tensor | None = None,  # as for ``lora_linear.forward``
) -> Ended:
    """y [M, N], what the plan keeps, and u [M, N] where an activation follows."""
    if impl is not Impl.REFERENCE and why_not_fused(rows, w, plan, ending) is None:
        from fused_lora.kernels.triton.lora_linear_ended import forward as fused

        return fused(rows, w, bias, adapters, plan, ending)
    y, kept = forward(rows, w, bias, adapters, plan, impl, bordered)
    return composed(y, kept, ending)


def composed(u: Tensor, kept: Tensor | None, ending: Ending) -> Ended:
    """The same in passes of their own."""
    if ending.activation == "none":
        return finish(u, ending.residual, ending.factor), kept, None
    y = gelu.forward(u, ending.activation)
    return finish(y, ending.residual, ending.factor), kept, u


def why_not_fused(rows: Tensor, w: Tensor, plan: Plan, ending: Ending) -> str | None:
    """One sentence why no epilogue serves ``ending``; None when one does."""
    active, (factor, residual) = ending.activation != "none", ending[1:]
    if plan.backend is not Backend.TRITON or plan.forward is not Forward.EXTENDED:
        return f"the epilogues are those of triton:extended, and the plan is {plan}"
    if active and not (factor is None and residual is None):
        return "an activation and a scale or a residual together are checked by nobody"
    for t in (factor, residual):
        if t is not None and (t.dtype not in available.DTYPES or t.stride(-1) != 1):
            return f"it reads contiguous rows of 16 or 32 bits, got {t.dtype} {t.stride()}"
    n, k = w.shape
    return why_not_launch(ending.kernel(rows.dtype), rows.shape[0], n, k, rows)
