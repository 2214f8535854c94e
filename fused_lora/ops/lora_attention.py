"""lora_attention: the first half of a transformer block in one node that can let go of q, k and v.

qkv = lora_linear(LayerNorm(x)),  out = softmax(q kT / sqrt D) v,
y = x + gamma mask lora_linear(out)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.ops.chain.attention import Attention
from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LoRALinear
from fused_lora.ops.chain.norm import LayerNorm
from fused_lora.ops.chain.recipe import Recipe
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.operand import Adapted, Norm, check_frozen, compute_dtype

OUT = 3  # the boundary between attention and output projection


def lora_attention(
    x: Tensor,
    norm: Norm,
    qkv: Adapted,
    proj: Adapted,
    heads: int,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Norm, fused qkv, attention, output projection and residual; qkv is made again in backward.

    Args:
        x: [B, T, d]; it and the attention's output are what is kept.
        norm: gamma, beta and eps.
        qkv: the projection to q, k and v, 3 heads D columns.
        proj: the output projection, d columns.
        heads: H.
        gamma: LayerScale's frozen factor [d], or None.
        mask: drop path's factor per sample, or None.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    if x.dim() != 3:
        raise ValueError(f"lora_attention: x must be [B, T, d], got shape {tuple(x.shape)}")
    norm.check(x)
    qkv.check(x)
    width = qkv.w.shape[0]
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"lora_attention: {width} columns of qkv do not make 3 x {heads} heads")
    proj.check_behind(x, width // 3)
    if proj.w.shape[0] != x.shape[2]:
        raise ValueError(f"lora_attention: proj has {proj.w.shape[0]} columns, x {x.shape[2]}")
    check_frozen(gamma=gamma, mask=mask)
    recipe = _recipe(
        norm.eps, qkv.frame, Attention(heads, x.shape[1]), proj.frame, compute_dtype(x)
    )
    operands = (norm.gamma, norm.beta, *qkv.tensors, *proj.tensors)
    return chain(recipe, x, operands, None, gamma, mask)


@lru_cache(maxsize=256)
def _recipe(
    eps: float, qkv: Frame, attention: Attention, proj: Frame, dtype: torch.dtype
) -> Recipe:
    first, last = LoRALinear((qkv,), dtype), LoRALinear((proj,), dtype)
    stages = (LayerNorm(eps, dtype), first, attention, last)
    return Recipe(stages, frozenset({OUT}), lean=True, around=True)
