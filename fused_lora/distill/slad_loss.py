"""The loss of SLAD, and the phases that its weights make.

loss = a_s CE(S) + a_t CE(T) + a_KL T^2 KL(S, T)     S, T logits; KL(S, T) of softmax(. / T)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

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
        weights = (self.student, self.teacher, self.agreement)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"weights must be finite, not negative and not all 0, got {weights}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")

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
