"""An example input for a model, and gradients of the input for checkpoints."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from fused_lora.arguments import module_of
from fused_lora.patching.report import PatchError

RGB_224 = (3, 224, 224)


def examples_for(model: nn.Module) -> list[Tensor]:
    """One image, or one clip, on the meta device, in each size that the model may mean.

    The likeliest comes first: what a configuration says, what the patch embedding was built for,
    224 x 224; then the same with as many channels as the first convolution takes.
    """
    sizes_found = [_of_configuration(model), _of_timm(model), _of_attributes(model), RGB_224]
    sizes = [size for size in sizes_found if size]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        sizes += [(*size[:-3], first.in_channels, *size[-2:]) for size in sizes]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return [torch.empty(1, *size, device="meta", dtype=dtype) for size in dict.fromkeys(sizes)]


def _of_configuration(model: nn.Module) -> tuple[int, ...] | None:
    """transformers: ``config``, or the vision part of it."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config

    def first(*names: str, kind: type = object) -> Any:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if value and isinstance(value, kind)), None)

    if (sides := _sides(first("image_size", "crop_size"))) is None:
        return None
    channels = first("num_channels", "in_channels", "in_chans", kind=int) or 3
    frames = first("num_frames", "frames_per_clip", kind=int)
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


# Gradients for the first block's input, which reentrant checkpoints ask for.
#
# A reentrant checkpoint gives its result a gradient only where one of its inputs has one. Behind a
# frozen stem none has, and the blocks would train nothing.


def enable_input_grads(model: nn.Module) -> RemovableHandle:
    """From now on what the stem hands to the blocks requires a gradient, wherever the model trains.

    Needed with ``torch.utils.checkpoint(..., use_reentrant=True)`` around a first block whose input
    nothing trains; other checkpoints and plain training do without. Costs one dx, of that block.

    Returns:
        The hook's handle; ``remove()`` takes it off.

    Raises:
        PatchError: a model in which no patch embedding and no convolution is found.
    """
    stem = _stem(module_of(model, error=PatchError))
    if stem is None:
        raise PatchError(
            f"{type(model).__name__} has no patch embedding and no convolution to put a hook on: "
            "call requires_grad_() on what goes into the first checkpoint"
        )
    return stem.register_forward_hook(_require)


def _require(module: nn.Module, args: Any, y: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return None
    return tree_map_only(Tensor, lambda t: t.requires_grad_() if _may(t) else t, y)


def _may(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.is_leaf


def _stem(model: nn.Module) -> nn.Module | None:
    ask = getattr(model, "get_input_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):
        found = None
    if isinstance(found, nn.Module):
        return found
    first = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    return embedding_of(model) or next(first, None)


def reentrant(model: nn.Module) -> bool:
    """Whether the model was told to checkpoint, by the reentrant way (timm, transformers)."""
    timm = sys.modules.get("timm.layers")
    of_timm = bool(timm and hasattr(timm, "use_reentrant_ckpt") and timm.use_reentrant_ckpt())
    for module in model.modules():
        own = module.__dict__
        if own.get("grad_checkpointing") is True and of_timm:
            return True
        function = own.get("_gradient_checkpointing_func")
        if own.get("gradient_checkpointing") is True and isinstance(function, partial):
            return bool(function.keywords.get("use_reentrant", True))
    return False
