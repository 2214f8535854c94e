"""One image for a model that came without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RGB_224 = (3, 224, 224)


def examples_for(model: nn.Module) -> list[Tensor]:
    """One image, or one clip, on the meta device, in each size that the model may mean.

    The likeliest comes first: what a configuration says, what the patch embedding was built for,
    224 x 224; then the same with as many channels as the first convolution takes.
    """
    said = [_of_configuration(model), _of_timm(model), _of_attributes(model), RGB_224]
    sizes = [size for size in said if size]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        sizes += [(*size[:-3], first.in_channels, *size[-2:]) for size in sizes]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return [torch.empty(1, *size, device="meta", dtype=dtype) for size in dict.fromkeys(sizes)]


def _of_configuration(model: nn.Module) -> tuple[int, ...] | None:
    """transformers: ``config``, or the vision part of it."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    image = next(
        (s for name in ("image_size", "crop_size") if (s := getattr(config, name, None))), None
    )
    sides = _sides(image)
    if sides is None:
        return None
    channels = next(
        (
            c
            for name in ("num_channels", "in_channels", "in_chans")
            if isinstance(c := getattr(config, name, None), int)
        ),
        3,
    )
    frames = next(
        (
            f
            for name in ("num_frames", "frames_per_clip")
            if isinstance(f := getattr(config, name, None), int)
        ),
        None,
    )
    return (channels, *sides) if frames is None else (frames, channels, *sides)


def _of_timm(model: nn.Module) -> tuple[int, ...] | None:
    size: Any = None
    for holder in ("pretrained_cfg", "default_cfg"):
        configuration = getattr(model, holder, None)
        if isinstance(configuration, dict) and (size := configuration.get("input_size")):
            break
    embed = embedding_of(model)
    if sides := _sides(getattr(embed, "img_size", None)):
        size = (size[0] if size else 3, *sides)
    convolutions = (m for m in embed.modules() if isinstance(m, nn.Conv2d)) if embed else ()
    if first := next(iter(convolutions), None):  # of a hybrid: its backbone's, not the projection
        size = (first.in_channels, *(size[1:] if size else RGB_224[1:]))
    return size


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The patch embedding, in a wrapper (``features_only``) too; the first of several."""
    names = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return next((module for name, module in names if name == "patch_embed"), None)


def _of_attributes(model: nn.Module) -> tuple[int, ...] | None:
    """torchvision and open_clip: ``image_size`` on the model itself."""
    sides = _sides(getattr(model, "image_size", None))
    return (3, *sides) if sides else None


def _sides(image: Any) -> tuple[int, int] | None:
    if isinstance(image, int) and not isinstance(image, bool):
        return image, image
    if isinstance(image, (tuple, list)) and len(image) == 2 and all(type(s) is int for s in image):
        return image[0], image[1]
    return None
