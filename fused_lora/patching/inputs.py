"""Gradients for the first block's input, which reentrant checkpoints ask for.

A reentrant checkpoint gives its result a gradient only where one of its inputs has one. Behind a
frozen stem none has, and the blocks would train nothing.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from fused_lora.patching.errors import PatchError
from fused_lora.patching.example import embedding_of


def enable_input_grads(model: nn.Module) -> RemovableHandle:
    """From now on what the stem hands to the blocks requires a gradient, wherever the model trains.

    Needed with ``torch.utils.checkpoint(..., use_reentrant=True)`` around a first block whose input
    nothing trains; other checkpoints and plain training do without. Costs one dx, of that block.

    Returns:
        The hook's handle; ``remove()`` takes it off.

    Raises:
        PatchError: a model in which no patch embedding and no convolution is found.
    """
    stem = _stem(model)
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
