"""A product and what follows it: in the kernel's epilogue where one is trusted, else composed.

u = x wT + bias + s h bT      y = residual + factor act(u)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_lora.kernels.cuda import lora_linear_ended as compiled
from fused_lora.kernels.interface import Adapters, Ending
from fused_lora.ops import gelu
from fused_lora.ops.chain.recipe import finish
from fused_lora.ops.epilogues import why_not_fused
from fused_lora.ops.lora_linear import forward
from fused_lora.types import Backend, Impl, Plan

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
    out: Tensor | None = None,  # [M, N], rows contiguous: for y behind an activation
    h: Tensor | None = None,  # [M, sum R], likewise
) -> Ended:
    """y [M, N], what the plan keeps, and u [M, N] where an activation follows."""
    question = (rows, w, tuple(adapters.spans), plan, ending, rows.dtype)
    if impl is not Impl.REFERENCE and why_not_fused(*question) is None:
        return _epilogue(plan).forward(rows, w, bias, adapters, plan, ending, out, h)
    y, kept = forward(rows, w, bias, adapters, plan, impl, bordered, h)
    return composed(y, kept, ending, out)


def composed(u: Tensor, kept: Tensor | None, ending: Ending, out: Tensor | None = None) -> Ended:
    """The same in passes of their own."""
    if ending.activation == "none":
        return finish(u, ending.residual, ending.factor), kept, None
    y = gelu.forward(u, ending.activation, out)
    return finish(y, ending.residual, ending.factor), kept, u


def _epilogue(plan: Plan) -> Any:
    if plan.backend is Backend.CUDA:
        return compiled
    from fused_lora.kernels.triton import lora_linear_ended as triton

    return triton
