"""A family of backbones: a smaller model that learns its teacher's features, without labels.

For each compared pair of blocks, T and S their tokens after the final norm, P linear:
    loss = mean over pairs of  c_c D(P S_class, T_class) + c_p mean over patches D(P S, T)
    D(s, t) = 1 - cos(s, t), or mean |s - t|
The projections P are left behind: what stays is an ordinary smaller model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.distill import evaluate, features
from fused_lora.distill.blocks import blocks_of, tokens_of
from fused_lora.distill.cka import mapped_cka
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.recipe.tables import Family, RecipeError
from fused_lora.distill.run import Run
from fused_lora.distill.share import MAPPINGS
from fused_lora.distill.train.devices import Precision
from fused_lora.distill.wecolora import Terms


class FeatureObjective(nn.Module):
    """The student, its projections, and their loss.

    Args:
        student: a vision transformer.
        width: d of the teacher's tokens.
        compared: numbers of the student's blocks, as many as ``wanted`` will hold.
        about: distance and weights.
    """

    def __init__(
        self, student: nn.Module, width: int, compared: Sequence[int], about: Family
    ) -> None:
        super().__init__()
        self.student, self.compared, self.about = student, list(compared), about
        own = int(student.num_features)  # type: ignore[arg-type]
        self.projections = nn.ModuleList(nn.Linear(own, width) for _ in self.compared)

    def forward(self, images: Tensor, labels: Tensor, wanted: Sequence[Tensor]) -> Terms:
        """The terms of one batch; ``wanted`` holds T [b, tokens, width] of each pair."""
        tokens = tokens_of(self.student, images)
        found: dict[str, list[Tensor]] = {"class": [], "patches": []}
        for i, projection, theirs in zip(self.compared, self.projections, wanted, strict=True):
            mine = projection(tokens.blocks[i])
            if mine.dtype.itemsize <= 4:
                mine, theirs = mine.float(), theirs.float()
            apart = self._apart(mine, theirs)  # [b, tokens]
            found["class"].append(apart[:, 0].mean())
            found["patches"].append(apart[:, tokens.prefix :].mean())
        terms = {name: torch.stack(values).mean() for name, values in found.items()}
        about = self.about
        loss = about.on_class * terms["class"] + about.on_patches * terms["patches"]
        return terms | {"loss": loss}

    def _apart(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self.about.distance == "cosine":
            return 1 - F.cosine_similarity(mine, theirs, dim=-1)
        return (mine - theirs).abs().mean(-1)


class NormedFeatures(features.LiveFeatures):
    """The teacher's tokens after its final norm; ``numbers`` are those of ``blocks``."""

    def __init__(self, teacher: nn.Module, numbers: Sequence[int], precision: Precision) -> None:
        names = [block.name for block in blocks_of(teacher)]
        super().__init__(teacher, [names[i] for i in numbers], precision)
        self.numbers = list(numbers)

    def __call__(self, batch: Batch) -> list[Tensor]:
        """One forward of the teacher."""
        with torch.no_grad(), self.precision.autocast():
            found = tokens_of(self.teacher, batch.images).blocks
        return [found[i] for i in self.numbers]


class FamilyRun(Run):
    """As ``Run``, with a student that is a model of its own and sees no labels."""

    @property
    def table(self) -> Family:
        """The recipe's."""
        assert self.recipe.family is not None
        return self.recipe.family

    def _student(self) -> nn.Module:
        student, self.about = self._model(self.table, weights=False)
        return student.requires_grad_(True)

    def _objective(self, student: nn.Module) -> nn.Module:
        (batch,) = self.once(self.images, range(1))
        with torch.no_grad():
            theirs, mine = (tokens_of(m, batch.images) for m in (self.teacher, student))
        counts = [(each.prefix, each.blocks[-1].shape[1]) for each in (theirs, mine)]
        if counts[0] != counts[1]:
            raise RecipeError(
                f"family.model has {counts[1]} prefix tokens and tokens, the teacher {counts[0]}: "
                "their patches must be of one size"
            )
        self.pairs = pairs_of(len(mine.blocks), len(theirs.blocks), self.table)
        torch.manual_seed(self.recipe.train.seed + 1)  # of the projections
        width = theirs.blocks[-1].shape[-1]
        objective = FeatureObjective(student, width, [own for own, _ in self.pairs], self.table)
        objective = objective.to(self.precision.device, self.precision.stored)
        self._check_reach(objective)
        return objective

    def _live(self) -> features.LiveFeatures:
        return NormedFeatures(self.teacher, [theirs for _, theirs in self.pairs], self.precision)

    def _predictors(self, student: nn.Module) -> None:
        """None: it has no head."""

    def _accuracies(self, model: nn.Module) -> dict[str, Any]:
        about = replace(self.recipe.evaluate, head=False)
        return dict(evaluate.measure(model, *self._passes(), about))

    def _measured(self, student: nn.Module) -> dict[str, Any]:
        found = super()._measured(student)
        if self.recipe.evaluate.cka:
            test = self.once(self.test)
            found["cka"] = mapped_cka(self.teacher, student, self.table.mapping, test)
        return found


def pairs_of(mine: int, theirs: int, about: Family) -> list[tuple[int, int]]:
    """(student's block, teacher's block) of each comparison, by number."""
    last = (mine - 1, theirs - 1)
    if about.compared == "last":
        return [last]
    mapped = [(i, MAPPINGS[about.mapping](i, mine, theirs)) for i in range(mine)]
    return mapped if last in mapped else [*mapped, last]
