"""The order of the images: a function of seed, step and process, so that a run can be resumed.

One step takes the next batch_size x accumulate x processes images of the epoch's permutation and
deals them out; the last step of an epoch takes what is left. Nothing is dropped or seen twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fused_lora.distill.data.sets import DataError
from fused_lora.distill.data.views import TransformedImages


@dataclass(frozen=True)
class Batch:
    """One micro-step of one process."""

    images: Tensor  # [b, C, H, W]
    labels: Tensor  # [b], or masks [b, H, W]
    rows: Tensor  # [b] which images of the set these are
    weight: float  # of its mean loss, so that the mean over processes is that of the whole step
    skipped: int = 0  # images that did not decode

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same on a device."""
        images = self.images.to(device, dtype, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return Batch(images, labels, self.rows, self.weight, self.skipped)


@dataclass(frozen=True)
class Order:
    """Which images each micro-step of each process takes."""

    chosen: Sequence[int]
    batch_size: int  # per process and micro-step
    accumulate: int = 1
    processes: int = 1
    seed: int = 0

    @property
    def whole(self) -> int:
        """Images of one step, of all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def effective(self) -> int:
        """Images that a full step really has: fewer than ``whole`` where the set is smaller."""
        return min(self.whole, len(self.chosen))

    @property
    def steps_per_epoch(self) -> int:
        """The last one may be smaller."""
        return -(-len(self.chosen) // self.whole)

    def step(self, step: int, process: int) -> list[tuple[list[tuple[int, int]], float]]:
        """((image, epoch) pairs, weight) of each micro-step of ``process`` in ``step``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(len(self.chosen), self.seed, epoch)
        mine = order[place * self.whole : (place + 1) * self.whole]
        parts = mine.tensor_split(self.accumulate * self.processes)
        dealt = []
        for part in parts[process :: self.processes]:
            weight = len(part) * self.processes / len(mine)
            rows = part.tolist() or mine[:1].tolist()  # a process without images weighs nothing
            dealt.append(([(self.chosen[i], epoch) for i in rows], weight))
        return dealt


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def loaded(
    data: TransformedImages, order: Order, steps: range, process: int = 0, workers: int = 0
) -> Iterator[list[Batch]]:
    """The micro-steps of each of ``steps``."""
    weights = _weights(order, steps, process)
    loader = iter(
        DataLoader(
            data,
            batch_sampler=_Keys(order, steps, process),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collated,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )
    )
    for _ in steps:
        yield [_batch(next(loader), next(weights)) for _ in range(order.accumulate)]


class _Keys:
    """What DataLoader asks for: the keys of one micro-step after the other."""

    def __init__(self, order: Order, steps: range, process: int) -> None:
        self.order, self.steps, self.process = order, steps, process

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for keys, _ in self.order.step(step, self.process):
                yield keys

    def __len__(self) -> int:
        return len(self.steps) * self.order.accumulate


def _weights(order: Order, steps: range, process: int) -> Iterator[float]:
    for step in steps:
        for _, weight in order.step(step, process):
            yield weight


def _collated(items: list[tuple[Tensor, int | Tensor, int] | None]) -> tuple[Any, ...]:
    good = [item for item in items if item is not None]
    if not good:
        raise DataError(f"none of the {len(items)} images of a batch decodes")
    images, labels, rows = zip(*good, strict=True)
    skipped = len(items) - len(good)
    known = torch.stack([torch.as_tensor(label) for label in labels])
    return torch.stack(images), known, torch.tensor(rows), skipped, len(items)


def _batch(loaded: tuple[Any, ...], weight: float) -> Batch:
    images, labels, rows, skipped, asked = loaded
    return Batch(images, labels, rows, weight * (asked - skipped) / asked, skipped)
