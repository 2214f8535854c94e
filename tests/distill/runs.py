"""Recipes small enough for tests, and the teacher that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_lora.distill.data.batches import Order
from fused_lora.distill.data.sets import digits
from fused_lora.distill.data.views import ScanView, TransformedImages
from fused_lora.distill.features import LiveFeatures
from fused_lora.distill.models import UNet, build
from fused_lora.distill.recipe import Recipe
from fused_lora.distill.recipe.read import of
from fused_lora.distill.recipe.tables import Teacher, Train
from fused_lora.distill.stack import pairs_of
from fused_lora.distill.train.devices import Precision, World
from fused_lora.distill.train.fit import Fit
from fused_lora.distill.wecolora import Objective

OPTIONS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
}
NO_CONTEXT = World()
MODEL = {"model": "vit_tiny_patch16_224", "options": OPTIONS}


def recipe(**tables: Any) -> Recipe:
    """WeCoLoRA for a few steps on a few digits; ``tables`` change single keys."""
    given: dict[str, Any] = {
        "teacher": dict(MODEL),
        "student": {"reduction": 2, "rank": 2},
        "data": {"fraction": 0.05},
        "train": {"steps": 6, "batch_size": 16, "log_every": 2, "save_every": 3, "blr": 0.1},
        "evaluate": {"head": True},
    }
    return of(changed(given, tables))


def changed(given: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """``given`` with single keys of its tables changed."""
    for name, table in tables.items():
        given[name] = given.get(name, {}) | table if isinstance(table, dict) else table
    return given


def slad_recipe(folder: Path, method: str = "joint", **tables: Any) -> Recipe:
    """SLAD on the same digits: a student of two blocks, half as wide as its teacher."""
    small = MODEL | {"options": OPTIONS | {"embed_dim": 8, "depth": 2}}
    weights = folder / "small.safetensors"
    if not weights.is_file():
        from safetensors.torch import save_file

        torch.manual_seed(1)
        save_file(dict(build(Teacher(**small)).state_dict()), str(weights))
    table = small | {"checkpoint": str(weights), "head_blocks": 2, "method": method}
    given: dict[str, Any] = {"teacher": {"checkpoint": checkpoint(folder)}, "slad": table}
    return recipe(method="slad", **given, **tables)


def checkpoint(folder: Path) -> str:
    """The file of a teacher with seeded weights, none of them zero."""
    from safetensors.torch import save_file

    path = folder / "teacher.safetensors"
    if not path.is_file():
        torch.manual_seed(3)
        model = build(recipe().teacher)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
        save_file(dict(model.state_dict()), str(path))
    return str(path)


def fit_of(
    teacher: nn.Module,
    student: nn.Module,
    precision: str = "fp64",
    steps: int = 5,
    world: World = NO_CONTEXT,
    folder: Path | None = None,
    blocks: str = "last",
    **train: Any,
) -> Fit:
    """A run on 40 digits, without the recipe around it."""
    pairs = pairs_of(teacher, 2, blocks)
    computes = Precision(precision, torch.device("cpu"))
    table = {"steps": steps, "batch_size": 8, "blr": 0.3, "log_every": 1, "precision": precision}
    table = Train(**table | train)
    order = Order(range(40), table.batch_size, table.accumulate, world.size, table.seed)
    data = TransformedImages(digits("train"), ScanView(8, 1, "none"))
    objective = Objective(student.to(computes.stored), [pair.student for pair in pairs])
    live = LiveFeatures(teacher.to(computes.stored), [pair.teacher for pair in pairs], computes)
    return Fit(objective, live, data, order, table, computes, world, folder)


UNET = {"encoder": "resnet34", "in_chans": 1, "stages": 3, "channels": [8, 12, 8, 8]}
CLASSES = 11


def unet(**options: Any) -> UNet:
    """In eval mode, its last norms awake and its statistics not those of a fresh model."""
    torch.manual_seed(3)
    model = UNet(**UNET | {"num_classes": CLASSES, "zero_init_last": False} | options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def unet_checkpoint(folder: Path, **options: Any) -> str:
    """The file of ``unet``."""
    model = unet(**options)
    path = folder / f"unet_{model.num_classes}_{model.encoder.conv1.in_channels}.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def segmenting(folder: Path, **tables: Any) -> Recipe:
    """WeCoLoRA of the U-Net for a few steps on the strokes of a few digits."""
    options = UNET | {"num_classes": CLASSES}
    teacher = {"model": "unet", "options": options, "checkpoint": unet_checkpoint(folder)}
    data = {"source": "digit_masks", "image_size": 16}
    given: dict[str, Any] = {"teacher": teacher, "data": data, "loss": {"blocks": "stages"}}
    return recipe(**changed(given, tables))
