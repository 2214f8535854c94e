"""Times this device's library calls: the figures behind ``plan.device.Ceilings``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from fused_lora.plan.device import Ceilings

ROWS, WIDTH, THIN_WIDTH = 1024, 768, 16  # a ViT-B projection of five images; a usual small rank
COPY_BYTES = 32 << 20  # larger than most last-level caches' share
BUDGET_S = 0.5


def measure(device: torch.device, dtype: torch.dtype, name: str) -> Ceilings:
    """Measured ceilings of ``device`` in ``dtype``, in about half a second."""
    key = str(dtype).removeprefix("torch.")
    x = torch.ones(ROWS, WIDTH, device=device, dtype=dtype)
    w = torch.ones(WIDTH, WIDTH, device=device, dtype=dtype)
    thin = torch.ones(WIDTH, THIN_WIDTH, device=device, dtype=dtype)
    block = torch.ones(COPY_BYTES // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(block)
    tiny = torch.ones(8, 8, device=device, dtype=dtype)
    calls = [lambda: x @ w, lambda: x @ thin, lambda: target.copy_(block), lambda: tiny @ tiny]
    full_s, thin_s, copy_s, call_s = _best_s(calls, device)
    full = 2 * ROWS * WIDTH * WIDTH / full_s * 1e-9
    thin_rate = 2 * ROWS * WIDTH * THIN_WIDTH / max(thin_s - call_s, 1e-7) * 1e-9
    half_rank = min(max(THIN_WIDTH * (full / thin_rate - 1), 1.0), 4.0 * THIN_WIDTH)
    return Ceilings(name, key, full, half_rank, 2 * COPY_BYTES / copy_s * 1e-9, call_s * 1e6, True)


def _best_s(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The fastest of each call, taken in turns until the budget is spent; the first is warm-up.

    In turns and by the minimum, so that another program's load hits all alike, and rarely all.
    """
    fence = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = [float("inf")] * len(calls)
    began = time.perf_counter()
    rounds = 0
    while rounds < 4 or time.perf_counter() - began < BUDGET_S:
        for i, call in enumerate(calls):
            fence()
            start = time.perf_counter()
            call()
            fence()
            if rounds:
                best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best
