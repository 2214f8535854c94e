"""lora_residual: y = residual + gamma mask lora_linear(x), LayerScale and drop path in one pass."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LinearStage
from fused_lora.ops.chain.stage import ChainRecipe
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.operand import Adapted, check_frozen, compute_dtype


def lora_residual(
    x: Tensor,
    linear: Adapted,
    residual: Tensor,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    lean: bool = False,
) -> Tensor:
    """An output projection with what follows it in a block.

    Args:
        x: [..., K], kept for backward.
        linear: the projection, N columns.
        residual: [..., N], not kept.
        gamma: [N], LayerScale's frozen factor, or None.
        mask: drop path's factor per sample, such as [B, 1, 1], or None.
        lean: keep no h for backward but make it again.

    Returns:
        y [..., N] in the wider dtype of residual and projection.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    linear.check(x)
    check_frozen(gamma=gamma, mask=mask)
    expected = (*x.shape[:-1], linear.w.shape[0])
    if residual.shape != expected:
        raise ValueError(f"residual must be {expected}, got shape {tuple(residual.shape)}")
    dtype = compute_dtype(x)
    recipe = _residual_spec(linear.frame(), dtype, lean)
    return chain(recipe, x.to(dtype), linear.tensors(), residual, gamma, mask)


@lru_cache(maxsize=256)
def _residual_spec(frame: Frame, dtype: torch.dtype, lean: bool) -> ChainRecipe:
    return ChainRecipe((LinearStage((frame,), dtype),), lean=lean)
