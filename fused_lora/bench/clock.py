"""Time on a CPU or a CUDA device: medians of steps that take turns, and steps as graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
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


@dataclass(frozen=True)
class Times:
    """The durations of one method, one a round, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle duration."""
        return median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and third quartile; the one duration twice when there is only one."""
        if len(self.samples_ms) == 1:
            return self.samples_ms[0], self.samples_ms[0]
        first, _, third = quantiles(self.samples_ms, n=4, method="inclusive")
        return first, third

    def over(self, other: Times) -> float:
        """The median over rounds of this duration divided by the other's in the same round."""
        pairs = zip(self.samples_ms, other.samples_ms, strict=True)
        return median(ours / theirs for ours, theirs in pairs)


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 100,
    warmup: int = 0,
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, Times]:
    """Time every step once a round, the order rotated each round, while the budget lasts.

    Args:
        steps: What to time, by name.
        clock: Measures a step and tells the time.
        budget_s: Seconds for all rounds; no round begins that would overrun it.
        min_rounds: Rounds run whatever the budget.
        max_rounds: Rounds never exceeded.
        warmup: Untimed rounds before the first.
        tell: Called with the name of the step about to be timed.
    """
    names = list(steps)
    for _ in range(warmup):
        for name in names:
            steps[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin, done = clock.now(), 0
    while done < max_rounds and (
        done < min_rounds or (clock.now() - begin) * (done + 1) / done <= budget_s
    ):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            tell(name)
            samples[name].append(clock.measure_ms(steps[name]))
        done += 1
    return {name: Times(tuple(durations)) for name, durations in samples.items()}


WARM_UP = 3  # runs on a side stream before recording, as torch asks for


def recorded(step: Step) -> Step:
    """The replay of ``step``, which must need nothing of the host but its launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
