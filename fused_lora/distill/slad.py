"""SLAD: teacher and student learn a task together, through the same adapters.

loss = a_s CE(S) + a_t CE(T) + a_KL T^2 KL(S, T)     S, T logits; KL(S, T) of softmax(. / T)

Joint ("Shared LoRA adapters for task specific distillation", arXiv 2605.29726, 2026): one step
with all three terms. Its ablations run in two phases, first the teacher alone, then the student
beside a teacher that stays: with LoRA on both but nothing shared, with a teacher that was only
probed, or with one whose every weight was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.arguments import number, one_of
from fused_lora.distill.blocks import tokens_of
from fused_lora.distill.share import share_adapters, shared_parameters
from fused_lora.patching.patch import patch, unpatch
from fused_lora.types import Role

IGNORE = 255  # label of pixels that do not count


@dataclass(frozen=True)
class Terms:
    """The weights of the loss, and its temperature.

    Attributes:
        student: a_s.
        teacher: a_t; at 0 the teacher runs without gradients, in eval mode.
        agreement: a_KL.
        temperature: T.
        into_teacher: let the KL term's gradient reach the teacher too.
    """

    student: float = 1.0
    teacher: float = 1.0
    agreement: float = 1.0
    temperature: float = 2.0
    into_teacher: bool = False

    def __post_init__(self) -> None:
        names = ("student", "teacher", "agreement")
        weights = tuple(number(name, getattr(self, name)) for name in names)
        if not all(weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"weights must be finite, not negative and not all 0, got {weights}")
        if number("temperature", self.temperature) <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def runs_student(self) -> bool:
        """Whether any term reads the student's logits."""
        return bool(self.student or self.agreement)

    @property
    def runs_teacher(self) -> bool:
        """Whether any term reads the teacher's."""
        return bool(self.teacher or self.agreement)

    @property
    def trains_teacher(self) -> bool:
        """Whether any term's gradient reaches the teacher."""
        return bool(self.teacher or (self.agreement and self.into_teacher))


JOINT = Terms()
TEACHER_ONLY = Terms(student=0, teacher=1, agreement=0)
STUDENT_ONLY = Terms(student=0.5, teacher=0, agreement=0.5)


class Logits(NamedTuple):
    """[B, classes], or [B, classes, height, width]; None for a model that did not run."""

    student: Tensor | None
    teacher: Tensor | None


class Losses(NamedTuple):
    """The weighted sum, and its terms before weighting; None for one of weight 0."""

    total: Tensor
    student: Tensor | None
    teacher: Tensor | None
    agreement: Tensor | None


def slad_losses(logits: Logits, labels: Tensor, terms: Terms = JOINT) -> Losses:
    """The loss of a batch.

    Args:
        logits: of both models, [B, classes, ...].
        labels: [B, ...] whole numbers; ``IGNORE`` counts in no term.
        terms: the weights.

    Raises:
        ValueError: logits that are missing, or whose shapes do not fit each other or the labels.
    """
    _check_logits(logits, labels, terms)
    student = _entropy(logits.student, labels) if terms.student else None
    teacher = _entropy(logits.teacher, labels) if terms.teacher else None
    agreement = _divergence(*logits, labels, terms) if terms.agreement else None  # type: ignore
    weighted = zip(
        (terms.student, terms.teacher, terms.agreement), (student, teacher, agreement), strict=True
    )
    total = sum(weight * term for weight, term in weighted if term is not None)
    assert isinstance(total, Tensor)
    return Losses(total, student, teacher, agreement)


def _entropy(logits: Tensor | None, labels: Tensor) -> Tensor:
    assert logits is not None
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


def _divergence(student: Tensor, teacher: Tensor, labels: Tensor, terms: Terms) -> Tensor:
    """T^2 times the mean over what counts of sum_c p_T log(p_T / p_S)."""
    t = terms.temperature
    source = teacher if terms.into_teacher else teacher.detach()
    log_s, log_t = (F.log_softmax(logits / t, dim=1) for logits in (student, source))
    each = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)  # [B, ...]
    counted = labels != IGNORE
    return t * t * each[counted].mean()


def _check_logits(logits: Logits, labels: Tensor, terms: Terms) -> None:
    runs = terms.runs_student, terms.runs_teacher
    for name, given, wanted in zip(Logits._fields, logits, runs, strict=True):
        if wanted and given is None:
            raise ValueError(f"the loss reads the {name}'s logits, but there are none: {terms}")
        if given is not None and given.shape[:1] + given.shape[2:] != labels.shape:
            raise ValueError(
                f"the {name}'s logits are {tuple(given.shape)}, the labels {tuple(labels.shape)}"
            )
    if terms.agreement and logits.student.shape != logits.teacher.shape:  # type: ignore
        shapes = [tuple(given.shape) for given in logits]  # type: ignore
        raise ValueError(f"student and teacher disagree on the shape of their logits: {shapes}")


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
                teacher = logits_of(self.teacher, self.teacher_head, images)
        if self.terms.runs_student:
            student = logits_of(self.student, self.student_head, images)
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


def logits_of(model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    """What ``head`` makes of the model's tokens."""
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
    one_of("method", method, METHODS)
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
