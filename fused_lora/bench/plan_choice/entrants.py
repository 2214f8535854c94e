"""Which plans are worth measuring, and which of them may be called best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fused_lora.plan.problem import Problem
from fused_lora.plan.strategies import ROUNDS_ONCE
from fused_lora.types import Forward, Plan

NEAR = 1.5  # estimates up to so many times the chosen one's are measured
LIMIT = 10  # plans near the chosen one, itself included


def entrants(ranked: Sequence[Plan]) -> list[Plan]:
    """The chosen plan (first of ``ranked``), those near it, and the cheapest of every strategy.

    The last are there to show an estimate that is badly wrong.
    """
    chosen, *others = ranked
    near = [plan for plan in others if plan.time_us <= NEAR * chosen.time_us]
    found = [chosen, *near[: LIMIT - 1]]
    strategies: tuple[Callable[[Plan], str], ...] = (
        lambda plan: plan.forward,
        lambda plan: plan.dx,
        lambda plan: f"{plan.gradient_backend}:{plan.gradient}",
    )
    for strategy in strategies:
        for plan in others:
            if strategy(plan) not in map(strategy, found):
                found.append(plan)
    return found


def may_win(question: Problem, chosen: Plan, plan: Plan) -> bool:
    """Whether ``plan`` could have been chosen: in 16 bits, precision goes before speed."""
    if not question.low_precision or _merges(chosen):
        return True
    return not _merges(plan) and plan.forward in (chosen.forward, *ROUNDS_ONCE)


def _merges(plan: Plan) -> bool:
    return Forward.MERGE in (plan.forward, plan.dx)
