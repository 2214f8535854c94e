"""What a plan costs: its GEMMs and its passes over memory, against a device's ceilings.

gemm  max(2 m n k / (rate * d / (d + half_rank)), bytes / bandwidth) + call,  d = min(m, n, k)
move  bytes / bandwidth + call

The steps of this file are a library's; ``fused_lora.plan.cost_triton`` has Triton's,
``fused_lora.plan.cost_cuda`` those of the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

from fused_lora.plan import cost_cuda, cost_triton
from fused_lora.plan.device import Ceilings
from fused_lora.plan.full import full_steps
from fused_lora.plan.problem import Problem
from fused_lora.plan.step import Step
from fused_lora.plan.strategies import ends, slopes
from fused_lora.types import Backend, Forward, Gradient, Keep, Plan


def merge_steps(p: Problem) -> Iterator[Step]:
    """w' = w + s b a; in 16 bits formed in fp32, so w passes twice more."""
    passes = 3 if p.low_precision else 1
    yield Step("copy w", p.n * passes, p.k)
    for span in p.spans:
        yield Step("merge", span.width, p.k, span.rank, accumulates=True)


def _stack(p: Problem) -> Iterator[Step]:
    """Copying all a together, where that is shorter than passing over x once per group."""
    if _stacks(p):
        yield Step("stack a", p.rank, p.k)


def _stacks(p: Problem) -> bool:
    return len(p.spans) > 1 and p.rank < p.m


def _pieces(p: Problem) -> list[int]:
    """The ranks that one GEMM over a takes at a time."""
    return [p.rank] if _stacks(p) else [span.rank for span in p.spans]


def shrink_steps(p: Problem) -> Iterator[Step]:
    """h = x aT."""
    yield from _stack(p)
    for rank in _pieces(p):
        yield Step("shrink", p.m, rank, p.k)


def forward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The calls of the forward pass."""
    if plan.forward is Forward.MERGE:
        yield from merge_steps(p)
        yield Step("base", p.m, p.n, p.k)
        return
    yield from shrink_steps(p)
    if plan.forward is Forward.SEPARATE:
        yield Step("base", p.m, p.n, p.k)
        for span in p.spans:
            yield Step("expand", p.m, span.width, span.rank, accumulates=True)
    elif plan.forward is Forward.EXTENDED:
        yield cost_cuda.product_step("extended", p, p.n, p.k, p.activated)
    else:
        if not p.bordered:
            yield Step("copy x", p.m, p.k)
        yield Step("border w", p.n, p.k + p.rank)
        yield Step("bordered", p.m, p.n, p.k + p.rank)


def dx_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The calls that form dx, given dh where they need it."""
    if plan.dx is Forward.MERGE:
        if plan.keep is not Keep.MERGED:
            yield from merge_steps(p)
        yield Step("dx base", p.m, p.k, p.n)
    elif plan.dx is Forward.SEPARATE:
        yield Step("dx base", p.m, p.k, p.n)
        yield from _stack(p)
        for rank in _pieces(p):
            yield Step("dx expand", p.m, p.k, rank, accumulates=True)
    elif plan.dx is Forward.EXTENDED:
        yield cost_cuda.product_step("dx extended", p, p.k, p.n)
    else:
        yield Step("copy dy", p.m, p.n)
        yield Step("border w", p.n + p.rank, p.k)
        yield Step("dx bordered", p.m, p.k, p.n + p.rank)


def needs_dh(p: Problem, plan: Plan) -> bool:
    """Whether backward forms dh = s dy b."""
    from_dx = p.needs.x and plan.dx is not Forward.MERGE
    own = plan.gradient is Gradient.RANK and plan.grads_by is None
    return from_dx or (own and p.needs.a)


def backward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The calls of the backward pass."""
    if needs_dh(p, plan):
        for span in p.spans:
            yield Step("dy shrink", p.m, span.rank, span.width)
    if p.needs.x:
        yield from dx_steps(p, plan)
    if plan.gradient is Gradient.RANK and plan.grads_by is None:
        yield from _rank_steps(p, plan)
    yield from full_steps(p, plan)


def _rank_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    if p.needs.b and plan.keep is not Keep.HIDDEN:
        yield from shrink_steps(p)
    for span in p.spans if p.needs.b else ():
        yield Step("db", span.rank, span.width, p.m)
    if p.needs.a:
        yield Step("da", p.rank, p.k, p.m)


def beside_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The passes of a GELU and of its slope, where no epilogue of the plan's has them."""
    if p.activated and not ends(plan):
        yield Step("gelu", p.m, p.n)
    if p.sloped and p.needs.x and not slopes(plan):
        yield Step("gelu slope", p.m, p.k, extra_elements=p.m * p.k)


def steps(p: Problem, plan: Plan) -> list[Step]:
    """Every call of the plan, in order."""
    if plan.backend is Backend.TRITON:
        found = [*cost_triton.forward_steps(p, plan), *cost_triton.backward_steps(p, plan)]
    else:
        found = [*forward_steps(p, plan), *(backward_steps(p, plan) if p.trains else ())]
    if plan.grads_by is Backend.CUDA:
        found += cost_cuda.gradient_steps(p, plan)
    return [*found, *beside_steps(p, plan)]


def time_us(p: Problem, plan: Plan, ceilings: Ceilings) -> float:
    """Estimated time of forward and backward together."""
    return sum(step.time_us(p.itemsize, ceilings) for step in steps(p, plan))
