"""Which dtype a run computes in: full, or 16 bits by autocast, fp16 with a scaled loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A name of ``train.precision`` on a device."""

    name: str
    device: torch.device

    @property
    def stored(self) -> torch.dtype:
        """Of parameters and images."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """What forward passes run in."""
        dtype = AUTOCAST.get(self.name)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Does nothing but in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """``train.device``; raises ValueError for one that is not there."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device = {name!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device = {name!r}: torch sees no CUDA device")
    return device
