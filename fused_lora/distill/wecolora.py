"""WeCoLoRA: a student that copies some of its teacher's layers and learns the rest as adapters.

    kept blocks    i % reduction == 0                          T, S  [B, tokens, d]
    loss           c_t mean |T - S| + c_l cross_entropy(logits, labels)

T and S are the last blocks' outputs before the final norm; the method proper has c_l = 0. Its
baselines train every copied weight, or nothing.

Grigore, Georgescu, Alvarez Justo, Johansen, A. I. Ionescu and R. T. Ionescu, "Weight copy and
low-rank adaptation for few-shot distillation of vision transformers", arXiv 2404.09326 (2024).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.arguments import brief, flag, module_of, one_of, strings, whole
from fused_lora.distill.convolutions import adapt_convolutions, merge_convolutions
from fused_lora.distill.recipe.tables import Recipe, RecipeError, Student
from fused_lora.distill.stack import kept_of, pairs_of, stacks_of, tokens_of
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.child_adapters import FusedLoRAConv2d
from fused_lora.patching.patch import patch, unpatch
from fused_lora.patching.rules import find

if TYPE_CHECKING:
    from fused_lora.distill.data.batches import Batch

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
    one_of("keep", keep, KEEPS)
    flag("share", share)
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
    module_of(teacher, "teacher", TypeError)
    whole("reduction", reduction, 2)
    for name, module in teacher.named_modules():
        if isinstance(module, AdaptedLinear | FusedLoRAConv2d):
            raise RuntimeError(f"the teacher's {name} carries adapters: unpatch the teacher first")
    depths = {stack.name: len(stack.blocks) for stack in stacks_of(teacher)}
    if reduction > max(depths.values()):
        raise ValueError(f"reduction {reduction} is above the depth of every stack: {depths}")


def _owned(teacher: nn.Module, own: Iterable[str]) -> set[str]:
    names = [name for name, _ in teacher.named_parameters()]
    owned: set[str] = set()
    for pattern in strings("own", own):
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            raise ValueError(f"own: {brief(pattern)} matches no parameter of the teacher")
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


Terms = dict[str, Tensor]  # "loss", and what it is made of


class Objective(nn.Module):
    """A model and its loss in one module, so that DDP can wrap it."""

    def __init__(
        self, student: nn.Module, blocks: Sequence[str], tokens: float = 1.0, labels: float = 0.0
    ) -> None:
        super().__init__()
        self.student = student
        self.blocks = list(blocks) if tokens else []
        self.tokens, self.labels = tokens, labels

    def forward(self, images: Tensor, labels: Tensor, wanted: Sequence[Tensor]) -> Terms:
        """The terms of one batch; ``wanted`` holds T of each of the blocks."""
        logits, tokens = tokens_of(self.student, images, self.blocks, whole=bool(self.labels))
        terms: Terms = {}
        if self.blocks:
            apart = [token_loss(s, t) for s, t in zip(tokens, wanted, strict=True)]
            terms["tokens"] = torch.stack(apart).mean()
        if self.labels:
            wide = logits if logits.dtype.itemsize > 4 else logits.float()
            terms["labels"] = F.cross_entropy(wide, labels)
        factors = {"tokens": self.tokens, "labels": self.labels}
        terms["loss"] = sum((factors[k] * v for k, v in terms.items()), torch.zeros(()).to(images))
        return terms


def unreached(objective: nn.Module, batch: Batch, wanted: Sequence[Tensor]) -> list[str]:
    """The parameters that train and get no gradient from the loss."""
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    training = objective.training
    loss = objective.eval()(batch.images, batch.labels, wanted)["loss"]
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    objective.train(training)
    return [name for name, grad in zip(trained, grads, strict=True) if grad is None]


@dataclass(frozen=True)
class DistillMethod:
    """How a student is made, and how it ends."""

    student: Callable[[nn.Module, Recipe], nn.Module]
    learns: bool = True  # else it is used as it is made
    distills: bool = True  # else it is the teacher itself
    everything: bool = False  # all weights train that the loss reaches


def copied_with_adapters(teacher: nn.Module, recipe: Recipe) -> nn.Module:
    """WeCoLoRA: the copied layers frozen and shared, adapters on them."""
    about = recipe.student
    student = copy_layers(teacher, about.reduction, own=about.trainable, keep=about.keep)
    if not find(teacher):
        _check_convolutional(recipe)
        stages = [stack.name for stack in stacks_of(teacher)]
        seed, trainable = recipe.train.seed, about.trainable
        adapt_convolutions(student, stages, about.rank, seed, trainable)
        return student
    patch(
        student,
        about.rank,
        targets=about.targets or None,
        qkv=about.qkv,
        trainable=about.trainable,
        seed=recipe.train.seed,
        allow_large_rank=about.allow_large_rank,
        dropout=about.dropout,
    )
    return student


def _check_convolutional(recipe: Recipe) -> None:
    """Options of projections mean nothing to convolutions: an error, not silence."""
    about, plain = recipe.student, Student()
    for name in ("targets", "qkv", "dropout"):
        if (value := getattr(about, name)) != getattr(plain, name):
            raise RecipeError(
                f"student.{name} = {value!r} is for the projections of a transformer, and the "
                "teacher has convolutions alone"
            )


def copied(teacher: nn.Module, recipe: Recipe) -> nn.Module:
    """WeCo+KD: the copied layers, all of them trained."""
    about = recipe.student
    student = copy_layers(teacher, about.reduction, share=False, keep=about.keep)
    return student.requires_grad_(True)


def itself(teacher: nn.Module, recipe: Recipe) -> nn.Module:
    """The teacher, trained on labels in full."""
    return teacher.requires_grad_(True)


METHODS = {
    "wecolora": DistillMethod(copied_with_adapters),
    "weco_kd": DistillMethod(copied, everything=True),
    "weco": DistillMethod(copied, learns=False),
    "finetune": DistillMethod(itself, distills=False, everything=True),
    "slad": DistillMethod(itself),  # a model of its own: see slad_run
    "family": DistillMethod(itself, everything=True),  # likewise: see family
}


def objective_of(student: nn.Module, teacher: nn.Module, recipe: Recipe) -> Objective:
    """The loss of the recipe on ``student``."""
    if not METHODS[recipe.method].distills:
        return Objective(student, [], tokens=0.0, labels=1.0)
    pairs = pairs_of(teacher, recipe.student.reduction, recipe.loss.blocks)
    names = [pair.student for pair in pairs]
    return Objective(student, names, recipe.loss.tokens, recipe.loss.labels)


def wanted_of(teacher: nn.Module, recipe: Recipe) -> list[str]:
    """The teacher's blocks that the loss compares; none where it looks at labels alone."""
    if not METHODS[recipe.method].distills or not recipe.loss.tokens:
        return []
    pairs = pairs_of(teacher, recipe.student.reduction, recipe.loss.blocks)
    return [pair.teacher for pair in pairs]


def finish(student: nn.Module, recipe: Recipe) -> nn.Module:
    """The student as it is to be used: adapters merged, in eval mode."""
    if recipe.method == "wecolora":
        if any(isinstance(module, AdaptedLinear) for module in student.modules()):
            unpatch(student, merge=True)
        merge_convolutions(student)
    return student.eval()
