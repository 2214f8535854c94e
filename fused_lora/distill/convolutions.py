"""Adapters on the convolutions of a student's stages, where it has no transformer blocks.

    y = (x - mean) / sqrt(var + eps) gamma + beta      mean, var of the teacher, in any mode

BatchNorm's statistics belong to the frozen weights, and stay: a few images are no substitute for
the set that they come from, and adapters merge into the convolutions alone, so that what the norms
do must be the same before and after.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fused_lora.nn.child_adapters import FusedLoRAConv2d
from fused_lora.patching.options import patterns_of
from fused_lora.patching.patch import check_trainable

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def hold_statistics(model: nn.Module) -> list[str]:
    """Make every BatchNorm compute with its running statistics and keep them, in training too.

    Returns:
        The dotted names of the norms; ``release_statistics`` is the way back.
    """
    held = []
    for name, module in model.named_modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            _release(module)
            module.register_forward_pre_hook(_in_eval)
            held.append(name)
    return held


def release_statistics(model: nn.Module) -> None:
    """Ordinary norms again, which follow the mode that the model is put in."""
    for module in model.modules():
        if isinstance(module, NORMS):
            _release(module)


def _in_eval(norm: nn.Module, inputs: Any) -> None:
    norm.training = False


def _release(norm: nn.Module) -> None:
    mine = [key for key, hook in norm._forward_pre_hooks.items() if hook is _in_eval]
    for key in mine:
        del norm._forward_pre_hooks[key]


def adapt_convolutions(
    student: nn.Module, within: list[str], rank: int, seed: int, trainable: Iterable[str] = ()
) -> list[str]:
    """Put ConvLoRA on every convolution of the modules ``within``, and freeze the rest.

    Where a kernel cannot express ``rank``, its adapter has the largest rank that it can. The
    statistics of every BatchNorm are held.

    Args:
        student: of ``copy_layers``.
        within: dotted names, such as those of its stages.
        rank: of every adapter.
        seed: of the adapters' a.
        trainable: regular expressions of further parameters to train.

    Returns:
        The dotted names of the adapted convolutions.

    Raises:
        ValueError: there is no convolution there, or a pattern has no match; nothing is changed.
    """
    found = [
        (name, module)
        for name, module in student.named_modules()
        if type(module) is nn.Conv2d and any(name.startswith(f"{home}.") for home in within)
    ]
    if not found:
        raise ValueError(f"{type(student).__name__} has no plain convolution within {within}")
    patterns = patterns_of(trainable)
    check_trainable(student, patterns)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(pattern.search(name) for pattern in patterns))
    generator = torch.Generator(found[0][1].weight.device).manual_seed(seed)
    for _, conv in found:
        most = min(conv.out_channels, conv.weight[0].numel())
        FusedLoRAConv2d.adopt(conv, min(rank, most), generator=generator)
    hold_statistics(student)
    return [name for name, _ in found]


def merge_convolutions(student: nn.Module) -> None:
    """Plain convolutions again, with what their adapters learned, and ordinary norms."""
    for module in list(student.modules()):
        if isinstance(module, FusedLoRAConv2d):
            module.release(merge=True)
    release_statistics(student)
