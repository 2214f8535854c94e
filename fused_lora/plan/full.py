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
    for g, span in enumerate(p.spans if full else ()):
        if not p.needs.w:
            yield Step("dw", span.width, p.k, p.m)
        if p.needs.b:
            yield from finished(p, Step("db", span.width, span.rank, p.k), p.scaled(g))
        if p.needs.a:
            yield from finished(p, Step("da", span.rank, p.k, span.width), p.scaled(g))


def cast_steps(p: Problem, dtype: str = "") -> Iterator[Step]:
    """a and b as ``dtype`` or the products have them."""
    for span in p.spans if p.casts(dtype) else ():
        yield Step("cast a", span.rank, p.k)
        yield Step("cast b", span.width, span.rank)


def finished(p: Problem, product: Step, scaled: bool) -> Iterator[Step]:
    """A gradient in its operand's dtype and scale; CUDA's accumulator is fp32 without a cast."""
    yield product
    widens = p.low_precision and p.halves.dtype == "float32" and p.device != "cpu"
    if p.casts() and not widens:
        yield Step(f"cast {product.name}", product.m, product.n)
    if scaled:
        yield Step(f"scale {product.name}", product.m, product.n)
