"""Question, candidates, cost, best (DESIGN.md section 2), and the two precision rules on top.

In 16 bits the cheapest plan is not simply the best one:
- MERGE rounds w' and may hide a small adapter from every token alike, so it serves on its own
  account only where every other plan costs ``MERGE_GAIN`` times as much;
- BORDERED, EXTENDED and ONE_PASS round y once where SEPARATE rounds it twice, so they are
  preferred up to ``SIGNAL_PRICE`` times the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fused_lora.plan.cost import time_us
from fused_lora.plan.device import Ceilings
from fused_lora.plan.problem import Problem
from fused_lora.plan.strategies import ROUNDS_ONCE, candidates
from fused_lora.types import Forward, Keep, Needs, Plan, Span

MERGE_GAIN = 1.5
SIGNAL_PRICE = 1.10


@dataclass(frozen=True)
class RankedPlan:
    """One candidate with its estimate, and why it lost if a rule rather than its cost spoke."""

    plan: Plan
    note: str = ""
    estimate_us: float | None = None  # the cost model's, where ``plan.time_us`` was measured


def ranked(
    problem: Problem,
    ceilings: Ceilings,
    keep: Keep | None = None,
    plans: Sequence[Plan] | None = None,
) -> list[RankedPlan]:
    """Every plan (of ``plans``, or that a library serves, and that keeps ``keep``), best first.

    The chosen one comes first, the others by estimated time.
    """
    timed = [
        replace(plan, time_us=time_us(problem, plan, ceilings))
        for plan in (candidates(problem) if plans is None else plans)
        if keep is None or plan.keep is keep
    ]
    return ordered(problem, timed)


def ordered(problem: Problem, timed: Sequence[Plan]) -> list[RankedPlan]:
    """``timed`` plans by their times, but for the precision rules: the chosen one first."""
    plans = sorted(timed, key=lambda plan: plan.time_us)
    return _by_precision(plans) if problem.low_precision else [RankedPlan(plan) for plan in plans]


def _merges(plan: Plan) -> bool:
    return Forward.MERGE in (plan.forward, plan.dx)


def _by_precision(plans: list[Plan]) -> list[RankedPlan]:
    exact = [plan for plan in plans if not _merges(plan)]
    if not exact or plans[0].time_us * MERGE_GAIN < exact[0].time_us:
        return [RankedPlan(plan) for plan in plans]
    once = [plan for plan in exact if plan.forward in ROUNDS_ONCE]
    affordable = once and once[0].time_us <= exact[0].time_us * SIGNAL_PRICE
    best = once[0] if affordable else exact[0]
    notes = {True: "rounds w' to 16 bits", False: "rounds y twice"}
    rest = [
        RankedPlan(plan, notes[_merges(plan)] if plan.time_us < best.time_us else "")
        for plan in plans
        if plan is not best
    ]
    return [RankedPlan(best), *rest]


@lru_cache(maxsize=4096)
def choose(problem: Problem, ceilings: Ceilings, keep: Keep | None = None) -> Plan:
    """The best plan for ``problem`` on the device of ``ceilings``."""
    return ranked(problem, ceilings, keep)[0].plan


def traced_keep(k: int, spans: Sequence[Span], needs: Needs) -> Keep:
    """What to keep where M is not known yet: it depends on K, N and the ranks alone.

    Compilers trace it: torch 2.11 follows no dataclass such as ``Problem``.

    Above R* = KN / (2 (K + N)) FULL wins whatever M is and reads no h; below it h is kept.
    """
    if not needs.b:
        return Keep.NOTHING
    if not needs.a and not needs.w:
        return Keep.HIDDEN
    full = all(2 * span.rank * (k + span.width) > k * span.width for span in spans)
    return Keep.NOTHING if full else Keep.HIDDEN
