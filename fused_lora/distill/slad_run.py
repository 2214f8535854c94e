"""A recipe of SLAD: teacher and student learn the labels together, then both are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.evaluate import measure
from fused_lora.distill.heads import ClassificationHead
from fused_lora.distill.objective import Terms
from fused_lora.distill.recipe.tables import Slad as Table
from fused_lora.distill.runner import Run
from fused_lora.distill.slad import Slad, prepare
from fused_lora.distill.slad_loss import Terms as Weights
from fused_lora.distill.tokens import tokens_of
from fused_lora.distill.train.checkpoint import write
from fused_lora.patching.patch import unpatch

HEADS = "heads.safetensors"  # beside the student: its head, and the teacher's


class JointObjective(nn.Module):
    """SLAD's step as the loop calls it."""

    def __init__(self, both: Slad) -> None:
        super().__init__()
        self.both = both

    def forward(self, images: Tensor, labels: Tensor, wanted: Sequence[Tensor]) -> Terms:
        """The joint loss and its terms; nothing is ``wanted``."""
        found = self.both.losses(self.both(images), labels)
        terms = found._asdict()
        loss = terms.pop("total")
        return {name: term for name, term in terms.items() if term is not None} | {"loss": loss}


class SladRun(Run):
    """As ``Run``, with two models that share their adapters."""

    def _student(self) -> nn.Module:
        table = self.recipe.slad
        assert table is not None
        student, self.about = self._model(table)
        classes = len(self.images.classes)
        torch.manual_seed(self.recipe.train.seed)
        theirs, mine = (
            ClassificationHead(model.num_features, classes, table.head_blocks)  # type: ignore
            for model in (self.teacher, student)
        )
        self.both, _ = prepare(
            self.teacher,
            student,
            theirs,
            mine,
            rank=self.recipe.student.rank,
            targets=self.recipe.student.targets or ("q", "k", "v"),
            mapping=table.mapping,
            seed=self.recipe.train.seed,
        )
        self.both.begin(_weights(table))
        self.both.to(self.precision.device, self.precision.stored)
        return student

    def _objective(self, student: nn.Module) -> nn.Module:
        return JointObjective(self.both)

    def _wanted(self, chosen: Sequence[int]) -> Any:
        return lambda batch: []

    def _finish(self, student: nn.Module) -> None:
        unpatch(student, merge=True)
        unpatch(self.teacher, merge=True)
        self.both.eval()
        if self.world.first:
            sides = {"student": self.both.student_head, "teacher": self.both.teacher_head}
            tensors = {
                f"{side}.{name}": value.detach().cpu().contiguous()
                for side, head in sides.items()
                for name, value in head.state_dict().items()
            }
            write(self.folder / HEADS, tensors, {})

    def _measured(self, student: nn.Module) -> dict[str, Any]:
        about = self.recipe.evaluate
        passes = (lambda: self.once(self.images)), (lambda: self.once(self.test))
        found: dict[str, Any] = dict(measure(student, *passes, replace(about, head=False)))
        found["head"] = self._accuracy(student, self.both.student_head)
        found["teacher"] = {"head": self._accuracy(self.teacher, self.both.teacher_head)}
        return found

    def _accuracy(self, model: nn.Module, head: nn.Module) -> float:
        right = count = 0
        with torch.no_grad():
            for batch in self.once(self.test):
                logits = head(tokens_of(model, batch.images, head.blocks))  # type: ignore
                right += int((logits.argmax(1) == batch.labels).sum())
                count += len(batch.labels)
        return right / count


def _weights(table: Table) -> Weights:
    return Weights(table.on_student, table.on_teacher, table.agreement, table.temperature)
