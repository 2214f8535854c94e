"""A recipe from its teacher to its figures, in one folder: models, images, training, measures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill import evaluate, features, report
from fused_lora.distill.data.batches import Batch, Order, loaded
from fused_lora.distill.data.sets import (
    SOURCES,
    TEST,
    TRAIN,
    ImageSet,
    balanced,
    located,
    only,
    spread,
    uniform,
)
from fused_lora.distill.data.views import TransformedImages, View, view_of
from fused_lora.distill.models import build
from fused_lora.distill.recipe.read import plain, read
from fused_lora.distill.recipe.tables import SEGMENTED, Recipe, RecipeError, Teacher
from fused_lora.distill.report import RESULT, TEACHER, finished, read_result, write_result
from fused_lora.distill.student import ABOUT, export_student, load_student, save_student
from fused_lora.distill.train import checkpoint
from fused_lora.distill.train.devices import Precision, World, device_of, shard, world
from fused_lora.distill.train.fit import LAST, Fit
from fused_lora.distill.wecolora import METHODS, finish, objective_of, unreached, wanted_of

KEPT_BYTES = 1 << 30  # views of at most so many bytes stay in memory


@dataclass
class Run:
    """One run in one process of its world."""

    recipe: Recipe
    folder: Path
    world: World

    def __post_init__(self) -> None:
        self.begun_s = time.perf_counter()
        recipe, self.folder = self.recipe, Path(self.folder)
        train = recipe.train
        self.precision = Precision(train.precision, device_of(train.device, self.world.local_rank))
        self.method = METHODS[recipe.method]
        self.images, self.test = self._images(TRAIN), self._images(TEST)
        self.teacher, self.about = self._model(recipe.teacher)
        self.plain_view = self._view("none")

    def result(self) -> dict[str, Any]:
        """Train, merge, save, measure."""
        chosen = self.chosen()
        student = self._student()
        figures: dict[str, Any] = {"images": len(chosen)}
        if self.method.learns:
            figures |= self._train(student, chosen)
        if self.world.first:
            student = self._restored() if self.shards and self.method.learns else student
            merges = self.recipe.method in ("wecolora", "slad")
            before = self._costs(student, "student, before merging") if merges else []
            self._finish(student)
            figures |= self._measured(student)
            self._write(student, figures, before)
        return self.world.agree(read_result(self.folder) if self.world.first else None)

    @property
    def copies(self) -> bool:
        """Whether the student has some of its teacher's blocks."""
        return self.method.distills and not (self.recipe.slad or self.recipe.family)

    @property
    def shards(self) -> bool:
        """Whether training leaves the models in shards."""
        return self.recipe.train.parallel == "fsdp2" and self.world.size > 1

    def _train(self, student: nn.Module, chosen: Sequence[int]) -> dict[str, Any]:
        fit = self._fit(self._objective(student), chosen, self.folder)
        fit.run()
        return {"steps": fit.steps, "skipped": fit.skipped}

    def _restored(self) -> nn.Module:
        """The student as training left it, made anew: a module in shards stays in shards."""
        self.teacher, _ = self._model(self.recipe.teacher)
        student = self._student()
        checkpoint.load(self.folder / LAST, self._objective(student))
        return student

    def _images(self, split: str) -> ImageSet:
        about = self.recipe.data
        every = SOURCES[about.source](located(about.path), split)
        return only(every, about.classes) if about.classes else every

    def _student(self) -> nn.Module:
        student = self.method.student(self.teacher, self.recipe)
        return student.to(self.precision.device, self.precision.stored)

    def _objective(self, student: nn.Module) -> nn.Module:
        objective = objective_of(student, self.teacher, self.recipe)
        self._check_reach(objective)
        return objective

    def _finish(self, student: nn.Module) -> None:
        finish(student, self.recipe)

    def _model(self, given: Teacher, weights: bool = True) -> tuple[nn.Module, dict[str, Any]]:
        """The model, and how it is built again; without ``weights`` it may begin from none."""
        if given.recipe:
            trained = Path(given.recipe).with_suffix("")
            folder = self.folder.parent / trained.name
            inner = read(given.recipe)
            if inner.method not in ("finetune", "family"):
                raise RecipeError(
                    f"{given.TITLE}.recipe {given.recipe}: its method is {inner.method!r}"
                )
            if not finished(folder, inner):
                run_of(inner, folder, self.world).result()
            model = load_student(folder)
            given = inner.family or inner.teacher
        else:
            torch.manual_seed(self.recipe.train.seed)  # where there are no weights to take
            model = build(given, len(self.images.classes))
            bare = not (given.pretrained or given.checkpoint)
            if weights and self.method.distills and bare:
                raise RecipeError(
                    f"{given.TITLE}.model {given.model!r} has no weights: give pretrained, "
                    "checkpoint or recipe beside it"
                )
        classes = getattr(model, "num_classes", None)
        options = given.options | ({"num_classes": classes} if classes is not None else {})
        model = model.to(self.precision.device, self.precision.stored).eval()
        return model, {"model": given.model, "options": options}

    def chosen(self) -> list[int]:
        """The training images that the student sees."""
        about = self.recipe.data
        if about.fraction == 1:
            return list(range(len(self.images)))
        if about.choice == "balanced":
            return balanced(self.images.labels, about.fraction, about.seed)
        if about.choice == "random":
            return uniform(len(self.images), about.fraction, about.seed)
        return spread(self._features(), about.fraction, about.seed)

    def _features(self) -> Tensor:
        """The teacher's of every training image, [n, d]."""
        return evaluate.features_of(self.teacher, self.once(self.images))[0]

    def _fit(
        self, objective: nn.Module, chosen: Sequence[int], folder: Path, rate: float = 1.0
    ) -> Fit:
        recipe, train = self.recipe, self.recipe.train
        order = Order(chosen, train.batch_size, train.accumulate, self.world.size, train.seed)
        header = {k: v for k, v in plain(recipe).items() if k != "evaluate"}
        # other ways to the same weights:
        for key in ("parallel", "batch_size", "accumulate", "stop_above"):
            del header["train"][key]
        header["images_per_step"] = order.whole
        view = self._view(recipe.data.augment)
        return Fit(
            objective,
            self._wanted(chosen),
            self._transformed(self.images, view, keep=recipe.data.augment == "none"),
            order,
            replace(train, blr=rate * train.blr),
            self.precision,
            self.world,
            folder,
            json.loads(json.dumps(header)),
            recipe.data.workers,
        )

    def _check_reach(self, objective: nn.Module) -> None:
        """What the loss never reaches does not train: an error where it was asked for by name."""
        batch = next(self.once(self.images, range(min(8, len(self.images)))))
        wanted = self._live()(batch)
        with self.precision.autocast():
            lost = unreached(objective, batch, wanted)
        if lost and not self.method.everything:
            labels = self.recipe.loss.labels
            raise RecipeError(
                f"{lost[:3]} cannot train: loss.labels is {labels:g}, and the loss "
                "on tokens does not reach them"
            )
        for name in lost:
            objective.get_parameter(name).requires_grad_(False)

    def _live(self) -> features.LiveFeatures:
        """What the loss compares with, of the teacher."""
        return features.LiveFeatures(
            self.teacher, wanted_of(self.teacher, self.recipe), self.precision
        )

    def _wanted(self, chosen: Sequence[int]) -> features.Wanted:
        live = self._live()
        if self.recipe.loss.cache == "off" or not live.blocks:
            if self.shards and live.blocks:
                shard(self.teacher, self.world, self.precision.device)
            return live
        batches = self.once(self.images, chosen)
        if self.recipe.loss.cache == "memory":
            return features.in_memory(live, batches, chosen)
        folder = self.folder / "features"
        about = f"{self.images.name} {self.recipe.data.image_size} {self.precision.name}"
        if self.world.first:
            features.on_disk(live, batches, chosen, folder, about)
        self.world.wait()
        return features.on_disk(live, batches, chosen, folder, about)

    def _view(self, augment: str) -> View:
        about = self.recipe.data
        return view_of(self.teacher, about.source, about.image_size, augment)

    def _transformed(self, images: ImageSet, view: View, keep: bool = False) -> TransformedImages:
        about = self.recipe.data
        bytes_each = next(self.once(images, range(min(8, len(images))))).images[0].nbytes
        keep = keep and bytes_each * len(images) <= KEPT_BYTES
        return TransformedImages(images, view, self.recipe.train.seed, about.bad_images, keep)

    def once(self, images: ImageSet, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Each of ``rows`` once, without augmentation."""
        about, train = self.recipe.data, self.recipe.train
        rows = range(len(images)) if rows is None else rows
        transformed = TransformedImages(images, self.plain_view, 0, about.bad_images)
        order = Order(rows, max(train.batch_size, 64))
        for (batch,) in loaded(transformed, order, range(order.steps_per_epoch), 0, about.workers):
            yield batch.to(self.precision.device, self.precision.stored)

    def _passes(self) -> tuple[evaluate.Pass, evaluate.Pass]:
        """What a probe learns from, and the test images."""
        share, rows = self.recipe.evaluate.seen, None
        if share < 1:
            rows = balanced(self.images.labels, share, 0)
        return (lambda: self.once(self.images, rows)), (lambda: self.once(self.test))

    def _accuracies(self, model: nn.Module) -> dict[str, Any]:
        return dict(evaluate.measure(model, *self._passes(), self.recipe.evaluate))

    def _measured(self, student: nn.Module) -> dict[str, Any]:
        about = self.recipe.evaluate
        found = self._accuracies(student)
        if self.method.distills and about.teacher and (theirs := self._accuracies(self.teacher)):
            found["teacher"] = theirs
        if self.copies and about.cosine:
            reduction = self.recipe.student.reduction
            batches = self.once(self.test)
            found["cosine"] = evaluate.likeness(student, self.teacher, batches, reduction)
        return found

    def _write(self, student: nn.Module, figures: dict[str, Any], costs: list[report.Cost]) -> None:
        reduction = self.recipe.student.reduction if self.copies else 1
        about = self.about | {"reduction": reduction}
        save_student(student, self.folder, about)
        seconds = round(time.perf_counter() - self.begun_s, 2)
        result = {"recipe": plain(self.recipe), "figures": figures, "seconds": seconds}
        write_result(self.folder, result)
        if self.recipe.evaluate.report:
            self._report(student, result, costs, about)

    def _report(
        self,
        student: nn.Module,
        result: dict[str, Any],
        costs: list[report.Cost],
        about: dict[str, Any],
    ) -> None:
        """``report.html`` and the export; ``costs`` are of the student before merging."""
        costs += self._costs(student, "student, merged" if costs else "student")
        heats: list[report.Heat] = []
        if self.method.distills:
            costs = self._costs(self.teacher, "teacher") + costs
            few = balanced_or_all(self.test, report.MOST_IMAGES)
            heat = report.likeness_of(self.teacher, student, self.once(self.test, few))
            heats += [heat] if heat else []
            if both := self._predictors(student):
                batches = self.once(self.test, few)
                heats.append(report.confusion_of(*both, batches, self.test.classes))
        export = export_student(student, self.folder, about, self.images.classes)
        report.write(self.folder, result, costs, heats, export)

    def _costs(self, model: nn.Module, name: str) -> list[report.Cost]:
        if not self.recipe.evaluate.report:
            return []
        batch = next(self.once(self.test, range(min(32, len(self.test)))))
        return [report.cost_of(name, model, batch.images)]

    def _predictors(self, student: nn.Module) -> tuple[report.Predict, report.Predict] | None:
        """Images to logits of the test classes, of teacher and student."""
        if not self.recipe.evaluate.head:
            return None
        counts = {getattr(model, "num_classes", None) for model in (self.teacher, student)}
        return (self.teacher, student) if counts == {len(self.test.classes)} else None


def balanced_or_all(images: ImageSet, most: int) -> list[int]:
    """Rows of at most about ``most`` images, as many of each class."""
    if len(images) <= most:
        return list(range(len(images)))
    return balanced(images.labels, most / len(images), 0)


def distill(recipe: Recipe, folder: str | Path, fresh: bool = False) -> dict[str, Any]:
    """Run ``recipe``: teacher, student, training, merge, figures.

    A run that was killed goes on from its last checkpoint; a finished one is not run again. The
    folder then holds ``student.safetensors`` with ``student.json`` (see ``load_student``),
    ``last.safetensors``, ``log.jsonl`` and ``result.json``.

    Args:
        recipe: what ``fused_lora.distill.recipe.read`` returned.
        folder: of this run alone; made if it is not there.
        fresh: begin anew, whatever the folder holds.

    Returns:
        What ``result.json`` says: recipe, figures, seconds.

    Raises:
        RecipeError, DataError, WeightsError, CheckpointError: all of them ValueError or
            RuntimeError, with what is wrong and the values seen.
        Diverged: the loss is no number any more; the last good checkpoint is kept.
    """
    folder = Path(folder)
    with world() as here:
        if fresh and here.first:
            for name in (LAST, RESULT, ABOUT, "log.jsonl"):
                (folder / name).unlink(missing_ok=True)
                (folder / TEACHER / name).unlink(missing_ok=True)
        here.wait()
        if done := here.agree(finished(folder, recipe)):
            return done
        return run_of(recipe, folder, here).result()


def run_of(recipe: Recipe, folder: Path, here: World) -> Run:
    """The run of the recipe's method."""
    if recipe.data.source in SEGMENTED:
        from fused_lora.distill.segmentation import SegmentRun

        return SegmentRun(recipe, folder, here)
    if recipe.method == "family":
        from fused_lora.distill.family import FamilyRun

        return FamilyRun(recipe, folder, here)
    if recipe.method != "slad":
        return Run(recipe, folder, here)
    from fused_lora.distill.slad_run import SladRun

    return SladRun(recipe, folder, here)
