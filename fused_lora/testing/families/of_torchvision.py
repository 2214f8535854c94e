"""torchvision: ViT and both Swins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": [2, 2],
}
MODELS = ("ViT", "Swin", "Swin v2", "MaxViT")


def build(name: str) -> nn.Module:
    """The small model called ``name``."""
    from torchvision.models import maxvit, swin_transformer, vision_transformer

    if name == "ViT":
        model = vision_transformer.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
        nn.init.normal_(model.heads.head.weight)  # zeros otherwise, and no gradient behind it
    elif name == "MaxViT":
        model = maxvit.MaxVit((64, 64), 16, 2, [16], [1], 8, 0.0, num_classes=5)
    else:
        parts = {} if name == "Swin" else _of_v2(swin_transformer)
        model = swin_transformer.SwinTransformer(**SWIN, **parts, num_classes=5)
    return model.eval()


def _of_v2(home: Any) -> dict[str, Any]:
    return {
        "block": home.SwinTransformerBlockV2,
        "downsample_layer": home.PatchMergingV2,
    }


def example(name: str) -> dict[str, Any]:
    """Two images for it."""
    side = 64 if name == "MaxViT" else 32
    return {"x": torch.randn(2, 3, side, side)}
