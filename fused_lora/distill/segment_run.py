"""A recipe whose images have masks: the same run, measured by the overlap of its segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill import evaluate
from fused_lora.distill.data.mask_views import masked_view_of
from fused_lora.distill.data.masks import IGNORE, MASKED, UNMASKED
from fused_lora.distill.data.sets import TEST, ImageSet, located
from fused_lora.distill.data.views import View
from fused_lora.distill.recipe.checked import RecipeError
from fused_lora.distill.runner import Run
from fused_lora.distill.sliding import MeanIoU
from fused_lora.distill.taps import pairs_of, tokens_of


class SegmentRun(Run):
    """As ``Run``, on pixels; masks are read where the loss or the figures look at them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.recipe.teacher
        if self.method.distills and given.pretrained:
            raise RecipeError(
                f"teacher.pretrained has weights for the encoder of {given.model!r} alone: give "
                "checkpoint or recipe, which have the decoder's too"
            )
        batch = next(self.once(self.images, range(min(8, len(self.images)))))
        with torch.no_grad(), self.precision.autocast():
            logits = self.teacher(batch.images)
        count, _, *size = batch.images.shape
        wanted = (count, len(self.images.classes), *size)
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if seen != wanted:
            raise RecipeError(
                f"teacher.model {self.about['model']!r} puts out {seen}, not the logits of "
                f"{wanted[1]} classes for each pixel, {wanted}"
            )

    def _images(self, split: str) -> ImageSet:
        recipe = self.recipe
        looks = bool(recipe.loss.labels) or not self.method.distills
        needed = recipe.evaluate.head if split == TEST else looks
        sources = MASKED if needed else UNMASKED
        return sources[recipe.data.source](located(recipe.data.path), split)

    def _view(self, augment: str) -> View:
        about = self.recipe.data
        return masked_view_of(self.teacher, about.source, about.image_size, augment)

    def _features(self) -> Tensor:
        """The deepest stage of the encoder, averaged over the image, [n, d]."""
        (pair,) = pairs_of(self.teacher, self.recipe.student.reduction)
        pooled = []
        with torch.no_grad(), self.precision.autocast():
            for batch in self.once(self.images):
                _, (maps,) = tokens_of(self.teacher, batch.images, [pair.teacher], whole=False)
                pooled.append(maps.mean((2, 3)).cpu())
        return torch.cat(pooled)

    def _measured(self, student: nn.Module) -> dict[str, Any]:
        about = self.recipe.evaluate
        found: dict[str, Any] = {}
        if about.head:
            found |= self._overlap(student)
        if self.method.distills and about.teacher and about.head:
            found["teacher"] = self._overlap(self.teacher)
        if self.method.distills and about.cosine:
            reduction = self.recipe.student.reduction
            batches = self.once(self.test)
            found["cosine"] = evaluate.likeness(student, self.teacher, batches, reduction)
        return found

    def _predictors(self, student: nn.Module) -> None:
        """None: what is said of pixels is no confusion of images."""

    def _overlap(self, model: nn.Module) -> dict[str, Any]:
        score = MeanIoU(len(self.test.classes), IGNORE)
        with torch.no_grad():
            for batch in self.once(self.test):
                score.update(model(batch.images), batch.labels)
        each = dict(zip(self.test.classes, score.per_class().tolist(), strict=True))
        occurring = {name: iou for name, iou in each.items() if iou == iou}
        return {"miou": score.mean(), "dice": float(score.dice().nanmean()), "iou": occurring}
