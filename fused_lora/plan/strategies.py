"""The candidates: every consistent way to compute a problem, and a sentence for each that is not.

A plan is consistent when what the forward keeps is used by the backward and is no larger than h
(DESIGN.md section 4).
"""

from __future__ import annotations

from itertools import product

from fused_lora.plan.problem import Problem
from fused_lora.types import Forward, Gradient, Keep, Needs, Plan


def why_not(problem: Problem, plan: Plan) -> str | None:
    """One sentence why ``plan`` cannot serve ``problem``; None when it can."""
    if (plan.gradient is Gradient.NONE) == problem.trains_adapters:
        return "adapter gradients are computed exactly when an adapter operand needs one"
    if not problem.needs.x and plan.dx is not plan.forward:
        return "without a gradient for x the second strategy has nothing to compute"
    only_b = problem.needs.b and not (problem.needs.a or problem.needs.w)
    if only_b and plan.keep is not Keep.HIDDEN:
        return "where only b trains, keeping h instead of x is what saves the memory of x"
    if plan.keep is Keep.HIDDEN:
        if plan.forward is Forward.MERGE:
            return "the merged forward never forms h, so it has none to keep"
        if plan.gradient is not Gradient.RANK or not problem.needs.b:
            return "only the rank-sized gradient of b reads h again"
    if plan.keep is Keep.MERGED:
        if not (plan.forward is Forward.MERGE and plan.dx is Forward.MERGE and problem.needs.x):
            return "w' is kept only when forward and dx both use it"
        if problem.n * problem.k > problem.m * problem.rank:
            return (
                f"w' [{problem.n}, {problem.k}] is larger than h [{problem.m}, {problem.rank}], "
                "and a layer keeps at most the bytes of h"
            )
    return None


def candidates(problem: Problem) -> list[Plan]:
    """Every plan that can serve ``problem``."""
    plans = (Plan(*parts) for parts in product(Forward, Forward, Gradient, Keep))
    return [plan for plan in plans if why_not(problem, plan) is None]


def keeps_x(needs: Needs, plan: Plan) -> bool:
    """Whether backward reads x."""
    return needs.w or needs.a or (needs.b and plan.keep is not Keep.HIDDEN)
