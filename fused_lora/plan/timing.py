"""Which of several plans is faster, where a machine's speed drifts: rounds of turns, and ratios.

Every round times each part of a plan once, and only times of one round are compared. Plans that
were never within reach of the best drop out, and what nobody needs any more is timed no more. Where
the best has a close rival, rounds go on until their ratio is known to a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from statistics import median, quantiles
from typing import TypeVar

REACH = {2: 1.6, 4: 1.3, 8: 1.15}  # after so many rounds, those never faster than this drop out
CLOSE = 1.10  # times the best: who is timed on after the rounds asked for
SETTLED = 0.01  # standard error of a ratio that is small enough
Part = TypeVar("Part")


def time_candidates(
    plans: Mapping[str, Sequence[Part]],  # the parts that make up each
    time_us: Callable[[Part], float],  # one run of a part
    rounds: int,
    most: int | None = None,  # rounds, where a close rival is not settled before; ``rounds``
) -> dict[str, float]:
    """Microseconds of each plan: the sum of its parts' medians, each over the first plan's time.

    Two plans that share a part differ by the other parts alone.
    """
    first, *_ = plans
    seen: dict[Part, list[float]] = {}  # by round, over the time of the first plan in it
    base: list[float] = []
    alive = list(plans)
    for done in range(1, (most or rounds) + 1):
        if done > rounds:
            if _settled(plans, alive, seen):
                break
            best = min(_over_first(plans[name], seen) for name in alive)
            alive = [
                name
                for name in alive
                if name == first or _over_first(plans[name], seen) <= CLOSE * best
            ]
        parts = list(dict.fromkeys(part for name in alive for part in plans[name]))
        turn = done % len(parts)
        times = {part: time_us(part) for part in parts[turn:] + parts[:turn]}
        base.append(sum(times[part] for part in plans[first]))
        for part, taken in times.items():
            seen.setdefault(part, []).append(taken / base[-1])
        if limit := REACH.get(done):
            fastest = {name: sum(min(seen[part]) for part in plans[name]) for name in alive}
            reach = limit * min(_over_first(plans[name], seen) for name in alive)
            alive = [name for name in alive if name == first or fastest[name] <= reach]
    scale = median(base)
    return {name: scale * _over_first(parts, seen) for name, parts in plans.items()}


def _over_first(parts: Sequence[Part], seen: Mapping[Part, list[float]]) -> float:
    return sum(median(seen[part]) for part in parts)


def _settled(
    plans: Mapping[str, Sequence[Part]], alive: Sequence[str], seen: Mapping[Part, list[float]]
) -> bool:
    """Whether the best of ``alive`` is known to be so, or as good, beside each close rival."""
    ordered = sorted(alive, key=lambda name: _over_first(plans[name], seen))
    best, *rivals = (_by_round(plans[name], seen) for name in ordered)
    ratios = [[mine / its for mine, its in zip(one, best, strict=True)] for one in rivals]
    return all(standard_error(each) < SETTLED for each in ratios if median(each) < CLOSE)


def _by_round(parts: Sequence[Part], seen: Mapping[Part, list[float]]) -> list[float]:
    return [sum(times) for times in zip(*(seen[part] for part in parts), strict=True)]


def standard_error(values: Sequence[float]) -> float:
    """Of the median, from the quartiles as of a normal distribution."""
    first, _, third = quantiles(values, n=4, method="inclusive")
    return 0.93 * (third - first) / sqrt(len(values))
