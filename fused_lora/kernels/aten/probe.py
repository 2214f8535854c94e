"""Times this device's library calls: the figures behind ``plan.device.Ceilings``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fused_lora.plan.device import Ceilings

ROWS, WIDTH, THIN_WIDTH = 2048, 768, 16  # a ViT-B projection of ten images; a usual small rank
HALF_RANKS = (4.0, 64.0)  # what vector and matrix units make plausible
COPY_BYTES = 32 << 20  # larger than most last-level caches' share
BUDGET_S = 0.5
REVISION = 2  # of this file's method: figures of another are measured anew
STEADY = 1.25  # median over minimum of a machine that does nothing else


def measure(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Ceilings, bool]:
    """Ceilings of ``device`` in ``dtype``, in about half a second; and whether to believe them.

    They are not to be believed where times scatter, as beside another busy program.
    """
    full, thin, copy, call = _times_s(_probes(device, dtype), device)
    call_s = min(call)
    rate = 2 * ROWS * WIDTH * WIDTH / min(full) * 1e-9
    thin_rate = 2 * ROWS * WIDTH * THIN_WIDTH / max(min(thin) - call_s, 1e-7) * 1e-9
    half_rank = min(max(THIN_WIDTH * (rate / thin_rate - 1), HALF_RANKS[0]), HALF_RANKS[1])
    bandwidth = 2 * COPY_BYTES / min(copy) * 1e-9
    key = str(dtype).removeprefix("torch.")
    steady = statistics.median(full) <= STEADY * min(full)
    return Ceilings(name, key, rate, half_rank, bandwidth, call_s * 1e6, True), steady


def _probes(device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    """A large GEMM, a thin one, a copy, and a call too small to count."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    x, w, thin, tiny = ones(ROWS, WIDTH), ones(WIDTH, WIDTH), ones(WIDTH, THIN_WIDTH), ones(8, 8)
    block = ones(COPY_BYTES // dtype.itemsize)
    target = torch.empty_like(block)
    return [lambda: x @ w, lambda: x @ thin, lambda: target.copy_(block), lambda: tiny @ tiny]


def _times_s(calls: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """Times of each call, taken in turns until the budget is spent; the first is warm-up."""
    fence = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - began < BUDGET_S:
        for call, taken in zip(calls, times, strict=True):
            fence()
            start = time.perf_counter()
            call()
            fence()
            taken.append(time.perf_counter() - start)
    return [taken[1:] for taken in times]
