"""Outputs that start as NaN between two fences: what is not written or written beside shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

FENCE = 64  # elements before and after
SENTINEL = 104.0  # which e4m3 holds too


class Fenced:
    """Allocations with a fence on either side."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of NaN."""
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * FENCE,), SENTINEL, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[FENCE : FENCE + count].fill_(torch.nan).view(shape)

    def check(self) -> None:
        """Raise AssertionError where a fence was written."""
        for buffer in self.buffers:
            fences = torch.cat((buffer[:FENCE], buffer[-FENCE:]))
            assert (fences.float() == SENTINEL).all(), "written beside an output"


@contextmanager
def fenced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fenced]:
    """Every ``new_empty`` and ``empty_like`` inside is fenced, and checked at the end."""
    fence, plain = Fenced(), torch.Tensor.new_empty

    def new_empty(
        like: Tensor, *shape: object, dtype: torch.dtype | None = None, **others: object
    ) -> Tensor:
        if others:  # the interpreter's own
            return plain(like, *shape, dtype=dtype or like.dtype, **others)
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        return fence.empty(sizes, dtype or like.dtype, like.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda t: fence.empty(t.shape, t.dtype, t.device))
        yield fence
    fence.check()
