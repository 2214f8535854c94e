"""lora_attention: the first half of a transformer block in one node.

qkv = lora_linear(LayerNorm(x)),  out = softmax(q kT / sqrt D) v,
y = x + gamma mask lora_linear(out)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.kernels.aten import attention as kernels
from fused_lora.ops.chain.attention import Attention, split
from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LinearStage
from fused_lora.ops.chain.norm import LayerNorm
from fused_lora.ops.chain.stage import ChainRecipe
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.operand import Adapted, Norm, check_frozen, check_recompute, compute_dtype

KEEPS = {  # boundaries: 1 behind the norm, 2 behind qkv, 3 behind the attention
    "none": frozenset({1, 2, 3}),
    "elementwise": frozenset({2, 3}),
    "gemm": frozenset({3}),
}


def lora_attention(
    x: Tensor,
    norm: Norm,
    qkv: Adapted,
    proj: Adapted,
    heads: int,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    recompute: str = "gemm",
) -> Tensor:
    """Norm, fused qkv, attention, output projection and residual.

    Args:
        x: [B, T, d]; it and the attention's output are what is kept.
        norm: gamma, beta and eps.
        qkv: the projection to q, k and v, 3 heads D columns.
        proj: the output projection, d columns.
        heads: H.
        gamma: LayerScale's frozen factor [d], or None.
        mask: drop path's factor per sample, or None.
        recompute: what backward makes again: "none"; "elementwise", the norm's output; "gemm",
            q, k and v as well.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    recipe = attention_spec(x, norm, qkv, proj, heads, gamma, mask, recompute)
    operands = (norm.gamma, norm.beta, *qkv.tensors(), *proj.tensors())
    return chain(recipe, x, operands, None, gamma, mask)


def attention_spec(
    x: Tensor,
    norm: Norm,
    qkv: Adapted,
    proj: Adapted,
    heads: int,
    gamma: Tensor | None,
    mask: Tensor | None,
    recompute: str,
) -> ChainRecipe:
    """What ``lora_attention`` is asked to do; raises as it does."""
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
    check_recompute(recompute)
    frames, dtype = (qkv.frame(), proj.frame()), compute_dtype(x)
    kernel = None if torch.compiler.is_compiling() else kernel_for(x, heads, width)
    attention = Attention(heads, x.shape[1], kernel)
    return _attention_spec(norm.eps, *frames, attention, dtype, recompute)


def kernel_for(x: Tensor, heads: int, width: int) -> kernels.Key | None:
    """Torch's fused attention for these, whose backward takes what its forward gave; or None.

    Args:
        x: [B, T, d].
        heads: H.
        width: columns of q, k and v together.
    """
    qkv = torch.empty(1, x.shape[1], width, dtype=compute_dtype(x), device=x.device)
    return kernels.serves(*split(qkv, heads))


@lru_cache(maxsize=256)
def _attention_spec(
    eps: float,
    qkv: Frame,
    proj: Frame,
    attention: Attention,
    dtype: torch.dtype,
    recompute: str,
) -> ChainRecipe:
    first, last = LinearStage((qkv,), dtype), LinearStage((proj,), dtype)
    stages = (LayerNorm(eps, dtype), first, attention, last)
    return ChainRecipe(stages, KEEPS[recompute], lean=recompute == "gemm", around=True)
