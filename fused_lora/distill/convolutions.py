"""Adapters on the convolutions of a student's stages, where it has no transformer blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from fused_lora.distill.statistics import hold_statistics, release_statistics
from fused_lora.nn.child_adapters import FusedLoRAConv2d


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
    further = _matched(student, trainable)
    student.requires_grad_(False)
    generator = torch.Generator(found[0][1].weight.device).manual_seed(seed)
    for _, conv in found:
        most = min(conv.out_channels, conv.weight[0].numel())
        FusedLoRAConv2d.adopt(conv, min(rank, most), generator=generator)
    for parameter in further:
        parameter.requires_grad_(True)
    hold_statistics(student)
    return [name for name, _ in found]


def merge_convolutions(student: nn.Module) -> None:
    """Plain convolutions again, with what their adapters learned, and ordinary norms."""
    for module in list(student.modules()):
        if isinstance(module, FusedLoRAConv2d):
            module.release(merge=True)
    release_statistics(student)


def _matched(student: nn.Module, patterns: Iterable[str]) -> list[nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        mine = {n: p for n, p in student.named_parameters() if re.search(pattern, n)}
        if not mine:
            raise ValueError(f"trainable: {pattern!r} matches no parameter of the student")
        found |= mine
    return list(found.values())
