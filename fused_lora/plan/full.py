"""FULL gradients, which every backend leaves to the library: dw, and the small products with it."""

from __future__ import annotations

from collections.abc import Iterator

from fused_lora.plan.problem import Problem
from fused_lora.plan.step import Step
from fused_lora.types import Gradient, Plan


def full_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """dw where it is asked for or FULL wants it, then db and da from it."""
    full = plan.gradient is Gradient.FULL
    if p.needs.w:
        yield Step("dw", p.n, p.k, p.m)
    for span in p.spans if full else ():
        if not p.needs.w:
            yield Step("dw", span.width, p.k, p.m)
        if p.needs.b:
            yield Step("db", span.width, span.rank, p.k)
        if p.needs.a:
            yield Step("da", span.rank, p.k, span.width)
