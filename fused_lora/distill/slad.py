"""SLAD: teacher and student learn a task together, through the same adapters.

Joint ("Shared LoRA adapters for task specific distillation", arXiv 2605.29726, 2026): one step
with all three terms of ``slad_loss``. Its ablations run in two phases, first the teacher alone,
then the student beside a teacher that stays: with LoRA on both but nothing shared, with a teacher
that was only probed, or with one whose every weight was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.share import share_adapters, shared_parameters
from fused_lora.distill.slad_loss import (
    JOINT,
    STUDENT_ONLY,
    TEACHER_ONLY,
    Logits,
    Losses,
    Terms,
    slad_losses,
)
from fused_lora.distill.tokens import tokens_of
from fused_lora.patching.patch import patch, unpatch
from fused_lora.types import Role

METHODS = ("joint", "two_step", "probe", "finetune")


class Slad(nn.Module):
    """Both models with their heads: one module for an optimizer, a state dict and DDP.

    Args:
        teacher: a vision transformer.
        student: a smaller one.
        teacher_head: tokens to logits, as ``fused_lora.distill.heads`` has them.
        student_head: likewise.
        terms: the phase; ``begin`` changes it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_head: nn.Module,
        student_head: nn.Module,
        terms: Terms = JOINT,
    ) -> None:
        super().__init__()
        self.teacher, self.teacher_head = teacher, teacher_head
        self.student, self.student_head = student, student_head
        self.begin(terms)

    def begin(self, terms: Terms) -> None:
        """Enter a phase: what it does not train goes to eval mode."""
        self.terms = terms
        self.train(self.training)

    def train(self, mode: bool = True) -> Slad:
        """As ``nn.Module.train``, but a model that nothing trains stays in eval mode."""
        super().train(mode)
        trains = self.terms.trains_teacher, self.terms.runs_student
        sides = (self.teacher, self.teacher_head), (self.student, self.student_head)
        for trained, side in zip(trains, sides, strict=True):
            for module in side:
                if not (trained and _learns(module)):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Logits:
        """The logits that the phase's loss reads, of images [B, channels, height, width]."""
        student = teacher = None
        if self.terms.runs_teacher:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.terms.trains_teacher):
                teacher = _logits(self.teacher, self.teacher_head, images)
        if self.terms.runs_student:
            student = _logits(self.student, self.student_head, images)
        return Logits(student, teacher)

    def losses(self, logits: Logits, labels: Tensor) -> Losses:
        """``slad_losses`` in this phase."""
        return slad_losses(logits, labels, self.terms)

    def trained(self) -> list[nn.Parameter]:
        """What an optimizer of this phase takes: each parameter once."""
        sides = []
        if self.terms.trains_teacher:
            sides += [self.teacher, self.teacher_head]
        if self.terms.runs_student:
            sides += [self.student, self.student_head]
        found = {id(p): p for side in sides for p in side.parameters() if p.requires_grad}
        shared = shared_parameters(self.student) if self.terms.runs_student else []
        return list((found | {id(p): p for p in shared}).values())


def _learns(module: nn.Module) -> bool:
    own = any(p.requires_grad for p in module.parameters())
    return own or bool(shared_parameters(module))


def _logits(model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    return head(tokens_of(model, images, head.blocks))  # type: ignore[arg-type]


def prepare(
    teacher: nn.Module,
    student: nn.Module,
    teacher_head: nn.Module,
    student_head: nn.Module,
    method: str = "joint",
    *,
    rank: int = 16,
    targets: Iterable[Role | str] | str | None = ("q", "k", "v"),
    mapping: str | Callable[[int], int] = "even",
    **options: Any,
) -> tuple[Slad, tuple[Terms, ...]]:
    """Put adapters where the method wants them; hand back the module and its phases, in order.

    Args:
        teacher: a vision transformer, not patched.
        student: a smaller one.
        teacher_head: of ``fused_lora.distill.heads``.
        student_head: likewise.
        method: "joint" shares the teacher's adapters with the student; "two_step" gives each its
            own and trains the teacher first; "probe" trains the teacher's head alone first;
            "finetune" all of the teacher first, which then gets no adapters.
        rank: R of every adapter.
        targets: the roles that get adapters.
        mapping: as in ``fused_lora.share_adapters``.
        **options: of ``fused_lora.patch``.

    Raises:
        PatchError: a model that cannot be patched or shared with; both are left as they were.
        ValueError: an unknown method, or an option out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    options |= {"rank": rank, "targets": targets}
    plain = method in ("probe", "finetune")  # a teacher without adapters
    first, second = (student, None) if plain else (teacher, student)
    patch(first, **options)
    try:
        if method == "joint":
            example = options.get("example_input")
            share_adapters(teacher, student, mapping, example_input=example)
        elif second is not None:
            patch(second, **options)
    except BaseException:
        unpatch(first)
        raise
    if plain:
        teacher.requires_grad_(method == "finetune")
        if classifier := getattr(teacher, "get_classifier", None):
            classifier().requires_grad_(False)  # another head reads the tokens
    phases = (JOINT,) if method == "joint" else (TEACHER_ONLY, STUDENT_ONLY)
    return Slad(teacher, student, teacher_head, student_head, phases[0]), phases
