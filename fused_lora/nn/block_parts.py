"""What the modules of a block are, and in one sentence why one of them cannot be fused over.

Classes are known by where they are defined: a forward that is stood in for must be one that was
read. Everything is asked again at every call, since dropout, hooks and merged weights come and go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.block_swap import kind
from fused_lora.ops.operand import Adapted, Norm, compute_dtype

BLOCKS = frozenset({"timm.models.vision_transformer.Block"})
ATTENTIONS = frozenset(
    {"timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"}
)
MLPS = frozenset({"timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU"})
NORMS = frozenset({"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"})
LAYER_SCALES = frozenset(
    {"timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale"}
)
DROP_PATHS = frozenset({"timm.layers.drop.DropPath"})
IDENTITY = "torch.nn.modules.linear.Identity"
ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}


def absent(module: Any) -> bool:
    """Whether there is nothing in this place."""
    return module is None or kind(module) == IDENTITY


def why_not_linear(linear: Any) -> str | None:
    """Why an adapted linear has to be called as a module."""
    if not isinstance(linear, AdaptedLinear):
        return f"{type(linear).__name__} without adapters"
    if linear.merged or not linear.adapter_enabled:
        return "merged or disabled adapters"
    if linear.config.dora:
        return "DoRA"
    if linear.config.base_dtype:
        return f"a base in {linear.config.base_dtype}"
    ours = type(linear).forward is AdaptedLinear.forward
    return None if ours else f"{type(linear).__name__}, whose forward is its own"


def why_not_norm(norm: Any) -> str | None:
    """Why a norm is no LayerNorm over the last dimension."""
    if kind(norm) not in NORMS or len(norm.normalized_shape) != 1:
        return f"norm of type {type(norm).__name__}"
    return "timm's fast norm" if getattr(norm, "_fast_norm", False) else None


def why_not_branch(scale: Any, drop: Any) -> str | None:
    """Why LayerScale and drop path are not the factors they should be."""
    if not absent(scale) and kind(scale) not in LAYER_SCALES:
        return f"layer scale of type {type(scale).__name__}"
    if not absent(scale) and scale.gamma.requires_grad:
        return "a LayerScale that trains"
    if not absent(drop) and kind(drop) not in DROP_PATHS:
        return f"drop path of type {type(drop).__name__}"
    return None


def active_dropout(*drops: Any) -> bool:
    """Whether any of these drops something now; what is no ``nn.Dropout`` might."""
    return any(
        type(drop) is not nn.Dropout or (drop.training and drop.p > 0)
        for drop in drops
        if not absent(drop)
    )


def operands(linear: AdaptedLinear) -> Adapted:
    """What the operations take of an adapted linear."""
    a, b = linear._operands()
    spans, config = linear._used, linear.config
    dropout = config.dropout if linear.training else 0.0
    return Adapted(linear.weight, linear.bias, a, b, linear.scales, spans, config.impl, dropout)


def norm_of(norm: nn.LayerNorm) -> Norm:
    """What the operations take of a LayerNorm."""
    return Norm(norm.weight, norm.bias, norm.eps)


def gamma_of(scale: Any) -> Tensor | None:
    """LayerScale's factor, if there is one."""
    return None if absent(scale) else scale.gamma


def mask_of(drop: Any, x: Tensor, gamma: Tensor | None) -> Tensor | None:
    """Drop path's factor per sample, drawn by the module itself; None where it draws nothing."""
    if absent(drop) or not drop.training or not drop.drop_prob:
        return None
    dtype = compute_dtype(x)  # what the module would see: the projection's, or LayerScale's
    dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    return drop(torch.ones((x.shape[0],) + (1,) * (x.dim() - 1), dtype=dtype, device=x.device))


def why_not_input(x: Tensor, weight: Tensor) -> str | None:
    """Why x has to go through the modules one by one."""
    if x.is_meta or x.numel() == 0:
        return "nothing to compute"
    casts = torch.is_autocast_enabled(x.device.type)
    return None if casts or x.dtype is weight.dtype else f"x in {x.dtype} and weights that are not"
