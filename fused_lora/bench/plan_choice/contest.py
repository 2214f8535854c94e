"""Which plan is faster, on a machine whose speed drifts and without the winner's curse.

Every round times all plans in turn, and only ratios within a round are compared. Plans that are
clearly slower drop out early. The best plan is found in one half of the rounds and compared with
the chosen one in the other half, and the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import median, quantiles

from fused_lora.bench.clock import Clock, Step
from fused_lora.bench.timing import Times

DROP = {1: 1.6, 2: 1.3, 4: 1.15}  # after so many rounds, plans never faster than so many times
MIN_ROUNDS, MAX_ROUNDS = 6, 60  # even, so that both halves see every order
SETTLED = 0.01  # standard error of the median ratio that is small enough
RIVAL = 1.10  # ratios below it are worth settling


@dataclass
class Contest:
    """The durations of every step, one a round, for as long as it was in the race."""

    chosen: str
    samples_ms: dict[str, list[float]]
    alive: list[str]

    @property
    def rounds(self) -> int:
        """Rounds of those that stayed."""
        return len(self.samples_ms[self.chosen])

    def ratios(self, name: str, half: int | None = None) -> list[float]:
        """Time of ``name`` over that of the chosen plan, round by round; of every second round."""
        pairs = zip(self.samples_ms[name], self.samples_ms[self.chosen], strict=False)
        found = [mine / theirs for mine, theirs in pairs]
        return found if half is None else found[half::2]

    def ratio(self, name: str) -> float:
        """The median of them."""
        return median(self.ratios(name))

    def times(self, name: str) -> Times:
        """The durations of ``name``."""
        return Times(tuple(self.samples_ms[name]))

    def best(self, eligible: Collection[str], half: int | None = None) -> str:
        """The eligible step with the smallest median ratio."""
        stayed = [name for name in self.alive if name in eligible]
        return min(stayed, key=lambda name: median(self.ratios(name, half)))

    def over_best(self, eligible: Collection[str]) -> float:
        """The chosen plan's time over the best one's, the best found in the other half."""
        halves = [1 / median(self.ratios(self.best(eligible, half), 1 - half)) for half in (0, 1)]
        return sqrt(halves[0] * halves[1])

    def settled(self, eligible: Collection[str]) -> bool:
        """Whether the ratio of every close rival is known well enough."""
        rivals = [name for name in self.alive if name in eligible and name != self.chosen]
        close = [self.ratios(name) for name in rivals if self.ratio(name) < RIVAL]
        return all(standard_error(ratios) < SETTLED for ratios in close)

    def drop_slow(self, eligible: Collection[str]) -> None:
        """Send home the plans that were never within reach of the best so far."""
        limit = DROP.get(self.rounds)
        if limit is None:
            return
        reach = limit * min(self.ratio(name) for name in self.alive if name in eligible)
        slow = {name for name in self.alive if min(self.ratios(name)) > reach}
        self.alive = [name for name in self.alive if name not in slow or name == self.chosen]


def standard_error(values: list[float]) -> float:
    """Of the median, from the quartiles as of a normal distribution."""
    first, _, third = quantiles(values, n=4, method="inclusive")
    return 0.93 * (third - first) / sqrt(len(values))


def contest(
    steps: Mapping[str, Step],
    chosen: str,
    eligible: Collection[str],
    clock: Clock,
    budget_s: float,
) -> Contest:
    """Time ``steps``, until every close ratio to ``chosen`` is settled or the budget is spent."""
    held = Contest(chosen, {name: [] for name in steps}, list(steps))
    begin = clock.now()
    while held.rounds < MAX_ROUNDS:
        spent = clock.now() - begin
        even = held.rounds >= MIN_ROUNDS and held.rounds % 2 == 0
        if even and (spent >= budget_s or held.settled(eligible)):
            break
        turn = held.rounds // 2 % len(held.alive)
        for name in held.alive[turn:] + held.alive[:turn]:
            held.samples_ms[name].append(clock.measure_ms(steps[name]))
        held.drop_slow(eligible)
    return held
