"""WeCoLoRA: a student that copies some of its teacher's layers and learns the rest as adapters.

    kept blocks    i % reduction == 0                          T, S  [B, tokens, d]
    loss           mean |T - S|, T and S the last blocks' outputs before the final norm

Grigore, Georgescu, Alvarez Justo, Johansen, A. I. Ionescu and R. T. Ionescu, "Weight copy and
low-rank adaptation for few-shot distillation of vision transformers", arXiv 2404.09326 (2024).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

from torch import Tensor, nn

from fused_lora.distill.stack import kept_of, stacks_of
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.child_adapters import FusedLoRAConv2d

KEEPS = ("spaced", "first")


def copy_layers(
    teacher: nn.Module,
    reduction: int,
    *,
    share: bool = True,
    own: Iterable[str] = (),
    keep: str = "spaced",
) -> nn.Module:
    """A student of every ``reduction``-th block of ``teacher``, everything else as it is there.

    Args:
        teacher: a model with a stack of equal blocks (any timm ViT), or one per stage (a ResNet,
            alone or as the encoder of a U-Net, whose decoder stays whole).
        reduction: keep block i of a stack where i % reduction == 0; block 0 of a stage, which
            changes the shape, always stays.
        share: the student's parameters **are** the teacher's, which this call freezes; moving or
            casting one model then moves both. False copies them, and freezes nothing. Buffers,
            such as the statistics of BatchNorm, are the student's own.
        own: regular expressions of parameters to copy where the others are shared, because they
            are to be trained, such as "^head".
        keep: "spaced", as above; "first" keeps as many blocks of each stack from the input on
            (the baseline that prunes the top).

    Returns:
        The student, in the teacher's mode; ``fused_lora.patch`` gives it its adapters.

    Raises:
        ValueError: no stack of equal blocks, a reduction out of range, a pattern without match.
        RuntimeError: the teacher carries adapters.
    """
    _check(teacher, reduction)
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {list(KEEPS)}, got {keep!r}")
    owned = _owned(teacher, own)
    shared = {
        id(parameter): parameter
        for name, parameter in teacher.named_parameters()
        if share and name not in owned
    }
    student = copy.deepcopy(teacher, dict(shared))
    for parameter in shared.values():
        parameter.requires_grad_(False)
    for stack in stacks_of(student):
        kept = kept_of(len(stack.blocks), reduction)
        _thin(student, stack.name, kept if keep == "spaced" else list(range(len(kept))))
    return student


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean |T - S| over every token, in fp32 or wider."""
    assert student.shape == teacher.shape, (student.shape, teacher.shape)
    wide = student if student.dtype.itemsize > 4 else student.float()
    return (teacher.to(wide.dtype) - wide).abs().mean()


def _check(teacher: nn.Module, reduction: int) -> None:
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 2:
        raise ValueError(f"reduction must be a whole number from 2 on, got {reduction!r}")
    for name, module in teacher.named_modules():
        if isinstance(module, AdaptedLinear | FusedLoRAConv2d):
            raise RuntimeError(f"the teacher's {name} carries adapters: unpatch the teacher first")
    depths = {stack.name: len(stack.blocks) for stack in stacks_of(teacher)}
    if reduction > max(depths.values()):
        raise ValueError(f"reduction {reduction} is above the depth of every stack: {depths}")


def _owned(teacher: nn.Module, own: Iterable[str]) -> set[str]:
    names = [name for name, _ in teacher.named_parameters()]
    owned: set[str] = set()
    for pattern in [own] if isinstance(own, str) else own:
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            raise ValueError(f"own: {pattern!r} matches no parameter of the teacher")
        owned |= found
    return owned


def _thin(student: nn.Module, name: str, kept: list[int]) -> None:
    container = student.get_submodule(name)
    assert isinstance(container, nn.Sequential | nn.ModuleList)
    depth, blocks = len(container), [container[i] for i in kept]
    container._modules.clear()
    for i, block in enumerate(blocks):
        container.add_module(str(i), block)
    info = getattr(student, "feature_info", None)  # timm's table of taps, one per block of a ViT
    if isinstance(info, list) and len(info) == depth:
        student.feature_info = info[: len(kept)]  # type: ignore[assignment]
