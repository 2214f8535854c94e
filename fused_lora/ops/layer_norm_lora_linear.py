"""layer_norm_lora_linear: y = lora_linear(LayerNorm(x)), the norm's output not kept."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LinearStage
from fused_lora.ops.chain.norm import LayerNorm
from fused_lora.ops.chain.stage import ChainRecipe
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.operand import Adapted, Norm, check_recompute, compute_dtype


def layer_norm_lora_linear(
    x: Tensor, norm: Norm, linear: Adapted, recompute: str = "elementwise"
) -> Tensor:
    """The adapted projection (a grouped qkv, or fc1) of a normalised x.

    Args:
        x: [..., K]; kept for backward, in its own dtype.
        norm: gamma, beta and eps.
        linear: the projection, N columns.
        recompute: "none" keeps the norm's output too; otherwise backward makes it again.

    Returns:
        y [..., N] in the compute dtype.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    check_recompute(recompute)
    norm.check(x)
    linear.check(x)
    recipe = _norm_linear_spec(norm.eps, linear.frame(), compute_dtype(x), recompute)
    return chain(recipe, x, (norm.gamma, norm.beta, *linear.tensors()))


@lru_cache(maxsize=256)
def _norm_linear_spec(eps: float, frame: Frame, dtype: torch.dtype, recompute: str) -> ChainRecipe:
    keep = frozenset({1} if recompute == "none" else ())
    stages = (LayerNorm(eps, dtype), LinearStage((frame,), dtype))
    return ChainRecipe(stages, keep, recompute == "gemm")
