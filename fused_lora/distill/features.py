"""What the teacher gives for each image: computed on the way, or once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fused_lora.distill.data.batches import Batch
from fused_lora.distill.data.sets import DataError
from fused_lora.distill.stack import tokens_of
from fused_lora.distill.train.devices import Precision


class Wanted(Protocol):
    """T of each compared block for a batch on the device."""

    def __call__(self, batch: Batch) -> list[Tensor]:
        """One [b, tokens, d] for each block."""


class LiveFeatures:
    """The teacher itself, in eval mode and without gradients."""

    def __init__(self, teacher: nn.Module, blocks: Sequence[str], precision: Precision) -> None:
        self.teacher, self.blocks, self.precision = teacher.eval(), list(blocks), precision

    def __call__(self, batch: Batch) -> list[Tensor]:
        """One forward of the teacher."""
        with torch.no_grad(), self.precision.autocast():
            if not self.blocks:
                return []
            return tokens_of(self.teacher, batch.images, self.blocks, whole=False)[1]


class CachedFeatures:
    """T of every chosen image, looked up by row."""

    def __init__(self, rows: Sequence[int], tokens: list[Tensor], device: torch.device) -> None:
        self.place = {row: i for i, row in enumerate(rows)}
        self.tokens, self.device = tokens, device

    def __call__(self, batch: Batch) -> list[Tensor]:
        """The rows of the batch."""
        places = torch.tensor([self.place[row] for row in batch.rows.tolist()])
        return [each[places].to(self.device, non_blocking=True) for each in self.tokens]


def in_memory(live: LiveFeatures, batches: Iterator[Batch], rows: Sequence[int]) -> CachedFeatures:
    """Run the teacher once over ``batches``, which hold ``rows``, and keep what it gives."""
    kept: list[Tensor] = []
    place = {row: i for i, row in enumerate(rows)}
    for batch in batches:
        found = live(batch)
        kept = kept or [_room(len(rows), each, torch.empty) for each in found]
        for whole, part in zip(kept, found, strict=True):
            whole[[place[row] for row in batch.rows.tolist()]] = part.cpu()
    return CachedFeatures(rows, kept, live.precision.device)


def on_disk(
    live: LiveFeatures, batches: Iterator[Batch], rows: Sequence[int], folder: Path, about: str
) -> CachedFeatures:
    """The same in files of ``folder``, found again where teacher, images and views are the same.

    Args:
        live: the teacher.
        batches: not touched where the files are there.
        rows: of the chosen images.
        folder: where the files go.
        about: names images, views and precision.
    """
    identity = [fingerprint(live.teacher), live.blocks, about, list(rows)]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()
    note = folder / f"{key}.json"
    if not note.is_file():
        _fill(live, batches, rows, folder, key)
    described = json.loads(note.read_text(encoding="utf-8"))
    tokens = [
        _mapped(folder / f"{key}.{i}.bin", tuple(shape), getattr(torch, dtype))
        for i, (shape, dtype) in enumerate(described)
    ]
    return CachedFeatures(rows, tokens, live.precision.device)


def fingerprint(model: nn.Module) -> str:
    """Of every weight and buffer, and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fill(
    live: LiveFeatures, batches: Iterator[Batch], rows: Sequence[int], folder: Path, key: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    place = {row: i for i, row in enumerate(rows)}
    files: list[Tensor] = []
    for batch in batches:
        found = live(batch)
        for i, part in enumerate(found):
            if len(files) == i:
                path = folder / f"{key}.{i}.bin"
                files.append(_room(len(rows), part, lambda *a, p=path, **k: _mapped(p, *a, **k)))
            files[i][[place[row] for row in batch.rows.tolist()]] = part.cpu()
    described = [[list(each.shape), str(each.dtype).removeprefix("torch.")] for each in files]
    unfinished = folder / f"{key}.json.part"
    unfinished.write_text(json.dumps(described), encoding="utf-8")
    os.replace(unfinished, folder / f"{key}.json")  # last, so that half a cache is none


def _room(count: int, like: Tensor, make: Callable[..., Tensor]) -> Tensor:
    return make((count, *like.shape[1:]), dtype=like.dtype)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel()
    if path.is_file() and path.stat().st_size not in (0, size * dtype.itemsize):
        raise DataError(f"{path} holds {path.stat().st_size} bytes, not {size * dtype.itemsize}")
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
