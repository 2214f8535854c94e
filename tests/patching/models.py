"""Small vision transformers in the shapes people use."""

from __future__ import annotations

import timm
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models import vision_transformer as vit
from torch import nn


def build(**options) -> nn.Module:
    """A two-block ViT of width 48."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return vit.VisionTransformer(**sizes | {"num_classes": 10} | options).eval()


def named(name: str, **options) -> nn.Module:
    """A timm model by name, two blocks deep."""
    return timm.create_model(name, pretrained=False, depth=2, **options).eval()


VARIANTS = {
    "plain": build,
    "LayerScale": lambda: build(init_values=1e-5),
    "qk-norm": lambda: build(qk_norm=True),
    "no qkv bias": lambda: build(qkv_bias=False),
    "packed GluMlp": lambda: build(mlp_layer=GluMlp, act_layer=nn.SiLU),
    "packed SwiGLU": lambda: build(mlp_layer=SwiGLUPacked),
    "SwiGLU": lambda: build(mlp_layer=SwiGLU),
    "pre-norm with registers": lambda: build(pre_norm=True, reg_tokens=4),
    "attention pool": lambda: build(class_token=False, global_pool="map"),
    "post-norm": lambda: build(block_fn=vit.ResPostBlock),
    "parallel things": lambda: build(block_fn=vit.ParallelThingsBlock),
    "drop path": lambda: build(drop_path_rate=0.3),
    "ViT-Ti": lambda: named("vit_tiny_patch16_224", img_size=32),
    "DeiT": lambda: named("deit_tiny_distilled_patch16_224", img_size=32),
    "DINOv2": lambda: named("vit_small_patch14_dinov2", img_size=28),
    "DINOv2 registers": lambda: named("vit_small_patch14_reg4_dinov2", img_size=28),
    "CLIP": lambda: named("vit_base_patch32_clip_224", img_size=64),
}


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    """Random images in the model's size."""
    size = model.patch_embed.img_size
    parameter = next(model.parameters())
    return torch.randn(count, 3, *size, dtype=parameter.dtype)


def wake(model: nn.Module, std: float = 0.05) -> nn.Module:
    """b away from zero, so that the adapters do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model
