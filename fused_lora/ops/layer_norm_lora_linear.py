"""layer_norm_lora_linear: y = lora_linear(LayerNorm(x)), the norm's output not kept."""

from __future__ import annotations

from torch import Tensor

from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LoRALinear
from fused_lora.ops.chain.norm import LayerNorm
from fused_lora.ops.chain.recipe import Recipe
from fused_lora.ops.operand import Adapted, Norm, check_recompute, compute_dtype

KEEP = {"none": frozenset({1}), "elementwise": frozenset[int](), "gemm": frozenset[int]()}


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
    dtype = compute_dtype(x)
    stages = (LayerNorm(norm.eps, dtype), LoRALinear((linear.frame,), dtype))
    recipe = Recipe(stages, KEEP[recompute], recompute == "gemm")
    return chain(recipe, x, (norm.gamma, norm.beta, *linear.tensors))
