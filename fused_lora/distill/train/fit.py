"""The loop of a run: the learning rate, steps, looks at the loss, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.data.batches import Batch, Order, loaded
from fused_lora.distill.data.views import TransformedImages, seed
from fused_lora.distill.features import Wanted
from fused_lora.distill.recipe.tables import Train
from fused_lora.distill.train import checkpoint
from fused_lora.distill.train.devices import Precision, World, spread
from fused_lora.distill.train.log import Log, StepProgress, log_of
from fused_lora.ops.operand import is_sharded


@dataclass(frozen=True)
class Cosine:
    """lr = blr x effective batch / 256, up a line in the warm-up, down half a cosine to 0.

    A function of the step alone, so that there is nothing to save of it.
    """

    blr: float
    effective_batch: int
    steps: int
    warmup: float  # share of the steps

    @property
    def peak(self) -> float:
        """The learning rate where the warm-up ends."""
        return self.blr * self.effective_batch / 256

    def at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


LAST = "last.safetensors"
TINY = 1e-6  # a first loss of nothing is no yardstick


class Diverged(RuntimeError):
    """The loss is no number any more, or many times what it was."""


@dataclass
class Fit:
    """Everything one run needs; ``run`` does it.

    Attributes:
        objective: on its device; called with (images, labels, wanted), returns its terms.
        wanted: the teacher's part of each batch.
        data: the images.
        order: which of them when.
        train: the recipe's table.
        folder: of checkpoints and log; None keeps nothing.
        header: the recipe as plain dicts; a checkpoint of another is refused.
        title: of the progress that is shown.
    """

    objective: nn.Module
    wanted: Wanted
    data: TransformedImages
    order: Order
    train: Train
    precision: Precision
    world: World = World()
    folder: Path | None = None
    header: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    title: str = "distill"
    losses: list[float] = field(default_factory=list)  # of every step that was run here
    skipped: int = 0  # images that did not decode

    def __post_init__(self) -> None:
        train = self.train
        self.steps = train.steps or train.epochs * self.order.steps_per_epoch
        self.schedule = Cosine(train.blr, self.order.effective, self.steps, train.warmup)
        self.spread = spread(self.objective, self.world, self.precision.device, train.parallel)
        self.module = self.spread.module
        self.optimizer = adamw(self.objective, train)
        self.scaler = self.precision.scaler()
        self._unseen: list[dict[str, Tensor]] = []  # terms since the last look
        self._first: float | None = None  # mean loss at the first look

    def run(self) -> int:
        """Train to the end, from the last checkpoint where there is one; the steps run here."""
        begun = done = self._resume()
        log = self._log(done)
        images = self.order.effective
        progress = StepProgress(self.steps, done, images, self.title, self.world.first)
        ahead = range(done, self.steps)
        batches = loaded(self.data, self.order, ahead, self.world.rank, self.workers)
        self.module.train()
        try:
            for micro in batches:
                self._step(done, micro)
                done += 1
                progress.update()
                self._after(done, log, progress)
        finally:
            progress.close()
            log.close()
        return done - begun

    def _step(self, step: int, micro: list[Batch]) -> None:
        seed((self.train.seed * 1_000_003 + step) * 1009 + self.world.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(step)
        total: dict[str, Tensor] = {}
        for i, batch in enumerate(micro):
            terms = self._micro_step(batch, last=i == len(micro) - 1)
            for name, value in terms.items():
                total[name] = total.get(name, 0) + value.detach() * batch.weight
            self.skipped += batch.skipped
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._unseen.append(total)

    def _micro_step(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        batch = batch.to(self.precision.device, self.precision.stored)
        wanted = self.wanted(batch)
        with self.spread.unsynced(last):
            with self.precision.autocast():
                terms = self.module(batch.images, batch.labels, wanted)
            self.scaler.scale(terms["loss"] * batch.weight).backward()
        if last:
            self.spread.settle()
        return terms

    def _after(self, done: int, log: Log, progress: StepProgress) -> None:
        ends = done == self.steps
        saves = done % self.train.save_every == 0 or ends
        if done % self.train.log_every == 0 or saves:
            figures = self._look(done)
            progress.show(figures["loss"])
            log.write(done, figures)
        if saves:
            self._save(done)

    def _look(self, done: int) -> dict[str, float]:
        """The mean terms since the last look; raises Diverged where the loss has run away."""
        names = list(self._unseen[0])
        table = torch.stack([torch.stack([terms[n] for n in names]) for terms in self._unseen])
        table = self.world.mean(table.float() if table.dtype.itemsize < 4 else table)  # [steps, n]
        rows = table.tolist()
        losses = [row[names.index("loss")] for row in rows]
        first = done - len(rows)
        self._unseen.clear()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise Diverged(self._last_words(first + i + 1, loss))
        self.losses += losses
        mean = sum(losses) / len(losses)
        self._first = mean if self._first is None else self._first
        if self.train.stop_above and mean > self.train.stop_above * max(self._first, TINY):
            raise Diverged(
                f"the mean loss of steps {first + 1} to {done} is {mean:.4g}, above "
                f"train.stop_above = {self.train.stop_above:g} times the first "
                f"{self._first:.4g}, at lr {self.schedule.at(done - 1):.3g}; {self._last_good()}"
            )
        means = table.mean(0).tolist()
        rate = {"lr": self.schedule.at(done - 1)}
        lost = {"skipped": float(self.skipped)} if self.skipped else {}
        return dict(zip(names, means, strict=True)) | rate | lost

    def _last_words(self, step: int, loss: float) -> str:
        rate = self.schedule.at(step - 1)
        return f"the loss of step {step} is {loss} at lr {rate:.3g}; {self._last_good()}"

    def _last_good(self) -> str:
        path = self.folder / LAST if self.folder else None
        return (
            f"the last good checkpoint is {path}, of step {checkpoint.header_of(path)['step']}"
            if path and path.is_file()
            else "there is no checkpoint yet"
        )

    def _log(self, done: int) -> Log:
        speaks = self.world.first and self.folder is not None
        return log_of(self.train.log, self.folder or Path(), done, speaks)

    def _save(self, done: int) -> None:
        if self.folder:
            tensors = checkpoint.gather(self.objective, self.optimizer, self.world.first)
            header = {"step": done, "scaler": self.scaler.state_dict(), "recipe": self.header}
            header["first_loss"] = self._first
            if self.world.first:
                checkpoint.save(self.folder / LAST, tensors, header)
        self.world.wait()

    def _resume(self) -> int:
        path = self.folder / LAST if self.folder else None
        if path is None or not self.world.agree(path.is_file()):
            return 0
        header = checkpoint.header_of(path)
        if odd := differences(header["recipe"], self.header):
            raise checkpoint.CheckpointError(
                f"{path} is of another recipe ({'; '.join(odd)}): give another folder, or --fresh"
            )
        checkpoint.load(path, self.objective, self.optimizer)
        if header["scaler"]:
            self.scaler.load_state_dict(header["scaler"])
        self._first = header.get("first_loss")
        return int(header["step"])


def adamw(module: nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW on what trains; biases and norms do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the student trains")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in trained:  # one kernel updates a group, and takes shards or whole ones
        groups.setdefault((parameter.ndim > 1, is_sharded(parameter)), []).append(parameter)
    given = [
        {"params": found, "weight_decay": train.weight_decay if decays else 0.0}
        for (decays, _), found in groups.items()
    ]
    return torch.optim.AdamW(given, lr=train.blr, betas=(train.beta1, train.beta2))


def differences(theirs: Any, mine: Any, where: str = "") -> list[str]:
    """What two plain recipes disagree on."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            difference
            for key in sorted({*theirs, *mine})
            for difference in differences(
                theirs.get(key), mine.get(key), f"{where}.{key}".strip(".")
            )
        ]
    return [] if theirs == mine else [f"{where} was {theirs!r} and is {mine!r}"]
