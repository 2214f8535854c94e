"""A U-Net small enough for tests, with weights and statistics that a recipe can take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_lora.distill.models import UNet
from fused_lora.distill.recipe import Recipe
from tests.distill.runs import recipe

OPTIONS = {"encoder": "resnet34", "in_chans": 1, "stages": 3, "channels": [8, 12, 8, 8]}
CLASSES = 11


def unet(**options: Any) -> UNet:
    """In eval mode, its last norms awake and its statistics not those of a fresh model."""
    torch.manual_seed(3)
    model = UNet(**OPTIONS | {"num_classes": CLASSES, "zero_init_last": False} | options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def checkpoint(folder: Path, **options: Any) -> str:
    """The file of ``unet``."""
    model = unet(**options)
    path = folder / f"unet_{model.num_classes}_{model.encoder.conv1.in_channels}.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def segmenting(folder: Path, **tables: Any) -> Recipe:
    """WeCoLoRA of the U-Net for a few steps on the strokes of a few digits."""
    options = OPTIONS | {"num_classes": CLASSES}
    teacher = {"model": "unet", "options": options, "checkpoint": checkpoint(folder)}
    data = {"source": "digit_masks", "image_size": 16}
    given: dict[str, Any] = {"teacher": teacher, "data": data, "loss": {"blocks": "stages"}}
    for name, table in tables.items():
        given[name] = given.get(name, {}) | table if isinstance(table, dict) else table
    return recipe(**given)
