"""Where the seconds of a run go, phase by phase, and how many each case may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fused_lora.bench.clock import Clock


class Phases:
    """Seconds by phase, in the order first entered.

    Attributes:
        spent_s: Seconds by name.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spent_s: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what happens inside to ``name``."""
        begin = self.clock.now()
        try:
            yield
        finally:
            self.spent_s[name] = self.spent_s.get(name, 0.0) + self.clock.now() - begin

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.spent_s.items())


class Shares:
    """Gives each case its share of what is left of a budget, in proportion to its weight."""

    def __init__(self, weights: Sequence[float], budget_s: float, clock: Clock) -> None:
        self.weights, self.clock = list(weights), clock
        self.end_s = clock.now() + budget_s

    def next_s(self) -> float:
        """The seconds of the next case; never negative."""
        left_s = max(self.end_s - self.clock.now(), 0.0)
        share_s = left_s * self.weights[0] / sum(self.weights)
        del self.weights[0]
        return share_s
