"""The methods: from a teacher and a recipe to a student with what trains in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fused_lora.distill.wecolora as wecolora
from fused_lora.distill.convolutions import adapt_convolutions, merge_convolutions
from fused_lora.distill.objective import Objective
from fused_lora.distill.recipe.checked import RecipeError
from fused_lora.distill.recipe.tables import Recipe, Student
from fused_lora.distill.stack import stacks_of
from fused_lora.distill.taps import pairs_of
from fused_lora.nn import AdaptedLinear
from fused_lora.patching.patch import patch, unpatch
from fused_lora.patching.rules import find


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
    student = wecolora.copy_layers(teacher, about.reduction, own=about.trainable, keep=about.keep)
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
    student = wecolora.copy_layers(teacher, about.reduction, share=False, keep=about.keep)
    return student.requires_grad_(True)


def itself(teacher: nn.Module, recipe: Recipe) -> nn.Module:
    """The teacher, trained on labels in full."""
    return teacher.requires_grad_(True)


METHODS = {
    "wecolora": DistillMethod(copied_with_adapters),
    "weco_kd": DistillMethod(copied, everything=True),
    "weco": DistillMethod(copied, learns=False),
    "slad": DistillMethod(lambda teacher, recipe: teacher),  # two models: see slad_run
    "family": DistillMethod(
        lambda teacher, recipe: teacher, everything=True
    ),  # likewise: see family
    "finetune": DistillMethod(itself, distills=False, everything=True),
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
