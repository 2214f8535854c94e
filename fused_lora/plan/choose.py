"""The time of each plan, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fused_lora.plan import cost_aten, cost_kernels
from fused_lora.plan.problem import Ceilings, Problem, Step
from fused_lora.plan.strategies import (
    ROUNDS_ONCE,
    candidates,
    fuses_activation,
    fuses_activation_grad,
    fuses_residual,
)
from fused_lora.types import Backend, Forward, Keep, Needs, Plan, Span

# What a plan costs: its GEMMs and its passes over memory, against a device's ceilings.
#
# gemm  max(2 m n k / (rate * d / (d + half_rank)), bytes / bandwidth) + call,  d = min(m, n, k)
# move  bytes / bandwidth + call
#
# On a GPU a call costs the device a gap between two launches, and the host the call: a plan takes
# the longer of both sums.
#
# A library's steps are in ``fused_lora.plan.cost_aten``, Triton's in ``cost_kernels``, those of the
# compiled kernels in ``cost_cuda``.


def context_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The passes of a GELU, of its derivative and of a residual, where no epilogue has them."""
    if p.activated and not fuses_activation(plan):
        yield Step("gelu", p.m, p.n)
    if p.joined and not fuses_residual(plan):
        yield Step("residual", p.m, p.n, extra_elements=p.m * p.n)
    if p.input_activated and p.needs.x and plan.dx is Forward.OPEN:
        yield cost_kernels.gelu_grads_step(p)
    elif p.input_activated and p.needs.x and not fuses_activation_grad(plan):
        yield Step("gelu grad", p.m, p.k, extra_elements=p.m * p.k)


def steps(p: Problem, plan: Plan) -> list[Step]:
    """Every call of the plan, in order."""
    by_triton = plan.backend is Backend.TRITON
    forward = cost_kernels.triton_forward_steps if by_triton else cost_aten.forward_steps
    return [*forward(p, plan), *backward_steps(p, plan), *context_steps(p, plan)]


def backward_steps(p: Problem, plan: Plan) -> list[Step]:
    """Those of its backward, without what lies beside its products."""
    by_triton = plan.backend is Backend.TRITON
    backward = cost_kernels.triton_backward_steps if by_triton else cost_aten.backward_steps
    found = [*(backward(p, plan) if p.trains else ())]
    if p.needs.bias and plan.grads_by is None:
        found.append(Step("dbias", 1, p.n, extra_elements=p.m * p.n))
    if plan.grads_by is Backend.CUDA:
        found += cost_kernels.cuda_gradient_steps(p, plan)
    return found


def together_us(
    p: Problem, plan: Plan, previous: Problem, own: Plan, rest: Plan, ceilings: Ceilings
) -> tuple[float, float]:
    """Estimates of two backwards, dx of ``p`` going through GELU's derivative to ``previous``.

    Gradients in passes of their own, ``previous`` by ``own``; and those whose operands lie in the
    tiles of dx formed there, what is left of ``previous`` by ``rest``.
    """
    left = replace(previous, needs=replace(previous.needs, b=False))
    apart = [*backward_steps(p, plan), *backward_steps(previous, own)]
    ranks = previous.rank
    joint = [*cost_kernels.extended_grads_steps(p, plan, ranks), *backward_steps(left, rest)]
    both = [sum(step.time_us(p.itemsize, ceilings) for step in each) for each in (apart, joint)]
    return both[0], both[1]


def context_us(p: Problem, plan: Plan, ceilings: Ceilings) -> float:
    """Estimated time of what lies beside the products, where no epilogue has it."""
    return sum(step.time_us(p.itemsize, ceilings) for step in context_steps(p, plan))


def time_us(p: Problem, plan: Plan, ceilings: Ceilings) -> float:
    """Estimated time of forward and backward together: the device's, or the host's if longer.

    A host that takes longer to queue a step than the device to run it is what the step waits for.
    """
    found = steps(p, plan)
    device_us = sum(step.time_us(p.itemsize, ceilings) for step in found)
    return max(device_us, sum(step.host_us(ceilings) for step in found))


# Question, candidates, cost, best (DESIGN.md section 2), and the two precision rules on top.
#
# In 16 bits the cheapest plan is not simply the best one:
# - MERGE rounds w' and may hide a small adapter from every token alike, so it serves on its own
#   account only where every other plan costs ``MERGE_GAIN`` times as much;
# - BORDERED, EXTENDED and ONE_PASS round y once where SEPARATE rounds it twice, so they are
#   preferred up to ``SIGNAL_PRICE`` times the cost.


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
