"""Adapters on the convolutions of a student's stages, where it has no transformer blocks."""

from __future__ import annotations

import torch
from torch import nn

from fused_lora.nn.conv import FusedLoRAConv2d


def adapt_convolutions(student: nn.Module, within: list[str], rank: int, seed: int) -> list[str]:
    """Put ConvLoRA on every convolution of the modules ``within``, and freeze the rest.

    Where a kernel cannot express ``rank``, its adapter has the largest rank that it can.

    Returns:
        The dotted names of the adapted convolutions.

    Raises:
        ValueError: there is no convolution there; nothing is changed.
    """
    found = [
        (name, module)
        for name, module in student.named_modules()
        if type(module) is nn.Conv2d and any(name.startswith(f"{home}.") for home in within)
    ]
    if not found:
        raise ValueError(f"{type(student).__name__} has no plain convolution within {within}")
    student.requires_grad_(False)
    generator = torch.Generator(found[0][1].weight.device).manual_seed(seed)
    for _, conv in found:
        most = min(conv.out_channels, conv.weight[0].numel())
        FusedLoRAConv2d.adopt(conv, min(rank, most), generator=generator)
    return [name for name, _ in found]


def merge_convolutions(student: nn.Module) -> None:
    """Plain convolutions again, with what their adapters learned."""
    for module in list(student.modules()):
        if isinstance(module, FusedLoRAConv2d):
            module.release(merge=True)
