"""What the library's plans do, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from fused_lora.plan import cost_kernels
from fused_lora.plan.problem import Problem, Step, cast_steps, finished, full_steps
from fused_lora.types import Forward, Gradient, Keep, Plan, even

# What a library's plan costs: every call that kernels/aten makes, views and allocations aside.
#
# Vectors (one row, one column, rank 1) cost a copy or two more, which nobody counts here.


FEW = 64  # stacked ranks that are copied sooner than a product is launched: kernels/aten
THIN = 16  # ranks below it have b laid out anew on a CPU: kernels/gemm.py


def batched(p: Problem, reduces: bool = False) -> bool:
    """Whether the products of several adapters are one; see kernels/aten/lora_linear.py."""
    slow = reduces and p.device == "cpu" and p.low_precision and p.m >= FEW
    return p.traits.one_scale and even(p.spans, p.n) and not slow


def merge_steps(p: Problem) -> Iterator[Step]:
    """w' = w + s b a; in 16 bits formed in fp32, so w passes twice more."""
    inside = p.wide == p.dtype and p.spans[0].width == p.n  # addmm copies w itself
    wider = p.n * p.k * p.low_precision
    yield Step("copy w", p.n, p.k, extra_elements=wider, calls=0.0 if inside else 1.0)
    yield from cast_steps(p, p.wide)
    for span in p.spans:
        yield Step("merge", span.width, p.k, span.rank, accumulates=True)
    if p.low_precision:
        yield Step("round w'", p.n, p.k, extra_elements=p.n * p.k)


def _stack(p: Problem) -> Iterator[Step]:
    """Copying all a together, where that is shorter than passing over x once per group."""
    if _stacks(p):
        yield Step("stack a", p.rank, p.k)


def _stacks(p: Problem) -> bool:
    return len(p.spans) > 1 and p.rank < max(p.m, FEW)


def _pieces(p: Problem) -> list[int]:
    """The ranks that one GEMM over a takes at a time."""
    return [p.rank] if _stacks(p) else [span.rank for span in p.spans]


def shrink_steps(p: Problem) -> Iterator[Step]:
    """h = x aT."""
    yield from _stack(p)
    for rank in _pieces(p):
        yield Step("shrink", p.m, rank, p.k)


def _hidden_steps(p: Problem) -> Iterator[Step]:
    """h of the forward pass, where it does not come with x."""
    if not p.shrunk:
        yield from shrink_steps(p)


def forward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The calls of the forward pass."""
    if plan.forward is Forward.MERGE:
        yield from merge_steps(p)
        yield Step("base", p.m, p.n, p.k)
        return
    if plan.forward is Forward.EXTENDED:
        yield from _hidden_steps(p)
        beside = p.activated + p.joined
        yield cost_kernels.cuda_product_step("extended", p, p.n, p.k, beside)
        return
    yield from cast_steps(p)
    if plan.forward in (Forward.SEPARATE, Forward.OPEN):
        yield from _hidden_steps(p)
        yield Step("base", p.m, p.n, p.k)
        if plan.forward is Forward.OPEN:
            return
        if batched(p):
            yield Step("stack b", p.n, p.spans[0].rank)
            yield Step("expand", p.m, p.n, p.spans[0].rank, accumulates=True)
            return
        for span in p.spans:
            yield Step("expand", p.m, span.width, span.rank, accumulates=True)
    else:
        yield from _bordered_steps(p, plan)


def _bordered_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """y of [x | h] and [w | s b]."""
    if not p.bordered:
        yield Step("copy x", p.m, p.k)
    yield from _hidden_steps(p)
    # by the library's calls; where Triton's border_weight serves, these of w are one launch
    yield Step("copy w", p.n, p.k)
    if any(span.width < p.n for span in p.spans):
        yield Step("clear border", p.n, p.rank)
    for span in p.spans:
        yield Step("border w", span.width, span.rank)
    yield Step("bordered", p.m, p.n, p.k + p.rank)
    if plan.keep is Keep.HIDDEN:
        yield Step("keep h", p.m, p.rank)


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
    elif plan.dx is Forward.OPEN:
        yield Step("dx base", p.m, p.k, p.n)
    elif plan.dx is Forward.EXTENDED:
        beside = int(p.input_activated)
        yield cost_kernels.cuda_product_step("dx extended", p, p.k, p.n, beside)
    else:
        yield Step("copy dy", p.m, p.n)
        yield Step("border w", p.n + p.rank, p.k)
        yield Step("dx bordered", p.m, p.k, p.n + p.rank)


def needs_dh(p: Problem, plan: Plan) -> bool:
    """Whether backward forms dh = s dy b."""
    if p.hidden_grad:
        return False
    from_dx = p.needs.x and plan.dx is not Forward.MERGE and not plan.writes_dh
    own = plan.gradient is Gradient.RANK and plan.grads_by is None
    return from_dx or (own and p.needs.a)


def backward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The calls of the backward pass."""
    if plan.dx is not Forward.EXTENDED and (p.needs.x or plan.grads_by is None):
        yield from cast_steps(p)
    if needs_dh(p, plan):
        yield from _shrink_grad_steps(p)
    if p.needs.x:
        yield from dx_steps(p, plan)
    if plan.gradient is Gradient.RANK and plan.grads_by is None:
        yield from _rank_steps(p, plan)
    yield from full_steps(p, plan)


def _shrink_grad_steps(p: Problem) -> Iterator[Step]:
    """dh = s dy b."""
    if batched(p, reduces=True):
        yield Step("stack b", p.n, p.spans[0].rank)
        yield Step("dy shrink", p.m, p.spans[0].rank, p.n)
        return
    for span in p.spans:
        if p.device == "cpu" and span.rank < THIN <= p.m:
            yield Step("lay out b", span.width, span.rank)
        yield Step("dy shrink", p.m, span.rank, span.width)


def _rank_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    if p.needs.b and plan.keep is not Keep.HIDDEN:
        yield from shrink_steps(p)
    if p.needs.b and batched(p, reduces=True):
        yield from finished(p, Step("db", p.spans[0].rank, p.n, p.m), p.scaled(0))
    else:
        for g, span in enumerate(p.spans if p.needs.b else ()):
            yield from finished(p, Step("db", span.rank, span.width, p.m), p.scaled(g))
    if p.needs.a:
        yield from finished(p, Step("da", p.rank, p.k, p.m), False)
