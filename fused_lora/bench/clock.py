"""Two clocks with one face: wall time for the CPU, device events for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch

Step = Callable[[], None]
FLOOD_BYTES = 256 << 20  # twice the largest L2 there is


class Clock(Protocol):
    """What the timing loop needs."""

    def now(self) -> float:
        """Seconds since some fixed moment; what budgets are counted in."""

    def measure_ms(self, step: Step) -> float:
        """Run ``step`` once; its duration in milliseconds."""


class CpuClock:
    """``time.perf_counter`` around the call."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter()

    def measure_ms(self, step: Step) -> float:
        """Wall time of one call."""
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3


class CudaClock(CpuClock):
    """Device time between two events, each run begun on an idle device.

    With a cold cache, what L2 holds is overwritten first.
    """

    def __init__(self, cold: bool = False) -> None:
        self._flood = torch.empty(FLOOD_BYTES, dtype=torch.int8, device="cuda") if cold else None

    def measure_ms(self, step: Step) -> float:
        """Time from the first kernel of one call to its last."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flood is not None:
            self._flood.zero_()
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def host_ms(step: Step, runs: int = 5) -> float:
    """What the host takes to queue ``step`` on an idle GPU; the median of ``runs``."""
    taken = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        taken.append((time.perf_counter() - begin) * 1e3)
    torch.cuda.synchronize()
    return median(taken)


def clock_for(device: str, cold: bool = False) -> Clock:
    """The clock that ``device`` is timed with; ``cold`` is for a GPU's L2."""
    return CudaClock(cold) if device.startswith("cuda") else CpuClock()
