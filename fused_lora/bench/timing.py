"""The one timing loop: interleaved rounds, so that a slow minute is slow for everyone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from fused_lora.bench.clock import Clock, Step


@dataclass(frozen=True)
class Times:
    """The durations of one contender, one a round, in milliseconds."""

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
