"""A recipe of SLAD: teacher and student learn the labels, together or in turns; both are measured.

The methods two_step and probe have a phase of the teacher's own before the student's, each of as
many steps as the recipe says; its checkpoint and log lie in ``teacher/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.cka import mapped_cka
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.evaluate import measure
from fused_lora.distill.heads import ClassificationHead
from fused_lora.distill.recipe.tables import SladTable as Table
from fused_lora.distill.report import TEACHER, Predict
from fused_lora.distill.run import Run
from fused_lora.distill.slad import TEACHER_ONLY, Slad, logits_of, prepare
from fused_lora.distill.slad import Terms as Weights
from fused_lora.distill.train import checkpoint
from fused_lora.distill.train.fit import LAST
from fused_lora.distill.wecolora import Terms
from fused_lora.nn import AdaptedLinear
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
            table.method,
            rank=self.recipe.student.rank,
            targets=self.recipe.student.targets or ("q", "k", "v"),
            mapping=table.mapping,
            seed=self.recipe.train.seed,
        )
        self.phases = phases_of(table)
        self.both.to(self.precision.device, self.precision.stored)
        self.trains = [p for p in self.both.parameters() if p.requires_grad]  # in any phase
        return student

    def _train(self, student: nn.Module, chosen: Sequence[int]) -> dict[str, Any]:
        found = {"steps": 0, "skipped": 0}
        before = self._likeness("cka_before") if self.world.first else {}
        for i in range(len(self.phases)):
            if i and self.shards:
                self._restore(i)
            own = self.recipe.slad.teacher_rate if i + 1 < len(self.phases) else 1.0  # type: ignore
            fit = self._fit(self._entered(i), chosen, self._home(i), own)
            fit.run()
            found = {name: count + getattr(fit, name) for name, count in found.items()}
        return found | before

    def _restored(self) -> nn.Module:
        self._restore(len(self.phases))
        return self.both.student

    def _restore(self, phases: int) -> None:
        """Both models as so many phases left them, made anew."""
        self.teacher, _ = self._model(self.recipe.teacher)
        self._student()
        for i in range(phases):
            checkpoint.load(self._home(i) / LAST, self._entered(i))

    def _entered(self, phase: int) -> nn.Module:
        """What the loop calls in ``phase``; nothing else trains from here on."""
        self.both.requires_grad_(False)
        for parameter in self.trains:
            parameter.requires_grad_(True)
        self.both.begin(self.phases[phase])
        wanted = {id(parameter) for parameter in self.both.trained()}
        for parameter in self.trains:
            parameter.requires_grad_(id(parameter) in wanted)
        self.both.train(self.both.training)
        return JointObjective(self.both)

    def _home(self, phase: int) -> Path:
        return self.folder if phase == len(self.phases) - 1 else self.folder / TEACHER

    def _wanted(self, chosen: Sequence[int]) -> Any:
        return lambda batch: []

    def _finish(self, student: nn.Module) -> None:
        unpatch(student, merge=True)
        if any(isinstance(module, AdaptedLinear) for module in self.teacher.modules()):
            unpatch(self.teacher, merge=True)
        self.both.eval()
        sides = {"student": self.both.student_head, "teacher": self.both.teacher_head}
        tensors = {
            f"{side}.{name}": value.detach().cpu().contiguous()
            for side, head in sides.items()
            for name, value in head.state_dict().items()
        }
        checkpoint.write(self.folder / HEADS, tensors, {})

    def _measured(self, student: nn.Module) -> dict[str, Any]:
        about, (train, test) = self.recipe.evaluate, self._passes()
        found: dict[str, Any] = dict(measure(student, train, test, replace(about, head=False)))
        found["head"] = accuracy(student, self.both.student_head, test())
        found["teacher"] = {"head": accuracy(self.teacher, self.both.teacher_head, test())}
        return found | self._likeness("cka")

    def _predictors(self, student: nn.Module) -> tuple[Predict, Predict]:
        both = self.both
        theirs = partial(logits_of, self.teacher, both.teacher_head)
        return theirs, partial(logits_of, student, both.student_head)

    def _likeness(self, name: str) -> dict[str, Any]:
        """CKA of mapped blocks on the test images, where the recipe asks for it."""
        table = self.recipe.slad
        if not self.recipe.evaluate.cka or table is None:
            return {}
        self.both.eval()
        test = self.once(self.test)
        return {name: mapped_cka(self.teacher, self.both.student, table.mapping, test)}


def accuracy(model: nn.Module, head: nn.Module, batches: Iterator[Batch]) -> float:
    """The share of the images in ``batches`` that ``model`` and ``head`` get right."""
    right = count = 0
    with torch.no_grad():
        for batch in batches:
            right += int((logits_of(model, head, batch.images).argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    return right / count


def phases_of(table: Table) -> tuple[Weights, ...]:
    """The loss of each phase."""
    if table.method == "joint":
        return (Weights(table.on_student, table.on_teacher, table.agreement, table.temperature),)
    return TEACHER_ONLY, Weights(table.on_student, 0, table.agreement, table.temperature)
