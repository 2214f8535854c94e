"""What a Triton plan costs: its launches, and the library GEMMs among them.

The efficiencies and calls below are guesses: no time has been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from fused_lora.plan.full import cast_steps, full_steps
from fused_lora.plan.problem import Problem
from fused_lora.plan.step import Step
from fused_lora.types import Forward, Gradient, Keep, Plan

TRITON_EFFICIENCY = 0.8  # of Triton's GEMM beside the library's; unmeasured
GELU_SHARE = 0.93  # of that: its epilogue is exposed, about 14 instructions an element
TRITON_LAUNCH_CALLS = 1.0  # cost of a launch in library calls, the queue hiding the rest; unmeasured
MERGE_EFFICIENCY = 1 / 16  # of fp32 products beside 16-bit ones; unmeasured
TRITON_RANK_BLOCK = 64  # ranks whose thin product reads x once
TILE_COLUMNS = 128  # of y, for each of which ONE_PASS forms h anew
PARTIAL_SUMS = 16  # slices of rows whose fp32 sums a gradient writes and reads; about


def triton_forward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The launches of the forward pass."""
    if plan.forward is not Forward.MERGE:
        yield from _pack(p)
    yield from _product(p, plan.forward, "", p.k, p.n, False, p.activated, p.shrunk)


def triton_backward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The launches of the backward pass, none where nothing is asked for."""
    rank_gradient = plan.gradient is Gradient.RANK and plan.grads_by is None
    reads = rank_gradient or (p.needs.x and plan.dx is not Forward.MERGE)
    if reads and not keeps_packed(p, plan):
        yield from _pack(p)
    if p.needs.x:
        how = (plan.keep is Keep.MERGED, p.sloped, plan.hands_dh)
        yield from _product(p, plan.dx, "dx ", p.n, p.k, *how)
    if rank_gradient and p.needs.b:
        if plan.keep is not Keep.HIDDEN:
            yield _thin(p, "shrink", p.k)
        yield from _gradient(p, "db", p.n)
    if rank_gradient and p.needs.a:
        if not (p.needs.x and plan.dx is not Forward.MERGE):
            yield _thin(p, "dy shrink", p.n)
        yield from _gradient(p, "da", p.k)
    if plan.gradient is Gradient.FULL:
        yield from cast_steps(p)
    yield from full_steps(p, plan)


def _product(
    p: Problem,
    strategy: Forward,
    name: str,
    depth: int,
    columns: int,
    reuse: bool,  # w' is there already
    u: bool,  # EXTENDED writes or reads that too
    given: bool,  # so is h, or dh
) -> Iterator[Step]:
    """y [M, columns] of x [M, depth], or likewise dx."""
    if strategy is Forward.MERGE:
        if not reuse:
            yield _merge(p)
        yield Step(f"{name}base", p.m, columns, depth)
        return
    width = sum(span.rank * span.width for span in p.spans) // p.n  # ranks of a column of y
    ranks = width if columns == p.n else p.rank
    if strategy is Forward.EXTENDED:
        if not given:
            yield _thin(p, f"{name}shrink", depth)
        beside = p.m * columns if u else 0
        share = GELU_SHARE if u else 1.0
        yield _launch(f"{name}extended", p.m, columns, depth + ranks, elements=beside, share=share)
    else:
        shrunk, expanded = p.rank * depth * -(-columns // TILE_COLUMNS), ranks * columns
        flops, hidden = 2 * p.m * (shrunk + expanded), p.m * p.rank
        yield _launch(f"{name}one_pass", p.m, columns, depth, flops, hidden)


def _launch(
    name: str, m: int, n: int, k: int, flops: int = 0, elements: int = 0, share: float = 1.0
) -> Step:
    return Step(name, m, n, k, False, flops, elements, share * TRITON_EFFICIENCY, TRITON_LAUNCH_CALLS)


def keeps_packed(p: Problem, plan: Plan) -> bool:
    """Whether backward has what forward packed: no larger than h, and kept in its stead."""
    columns = sum(-(-columns // 16) * 16 for columns in (p.k, p.n))
    return plan.forward is not Forward.MERGE and plan.keep is Keep.NOTHING and columns <= p.m


def _pack(p: Problem) -> Iterator[Step]:
    """a and b as products read them, both in one launch, where they do not lie so.

    A chain packs those of all its linears at once, which is left out here.
    """
    if p.casts() or (p.low_precision and len(p.spans) > 1):
        yield Step("pack", p.rank, p.k + p.n, calls=TRITON_LAUNCH_CALLS)


def _thin(p: Problem, name: str, depth: int) -> Step:
    """h or dh of every group in one launch, x read once per block of ranks."""
    again = (-(-p.rank // TRITON_RANK_BLOCK) - 1) * p.m * depth
    return _launch(name, p.m, p.rank, depth, elements=again)


def _gradient(p: Problem, name: str, columns: int) -> Iterator[Step]:
    """Partial sums over slices of rows, then their sum in a fixed order."""
    fp32 = 4 // min(4, p.itemsize)  # in elements of the compute dtype
    sums = PARTIAL_SUMS * p.rank * columns * fp32
    again = (-(-p.rank // TRITON_RANK_BLOCK) - 1) * p.m * columns
    yield _launch(name, p.rank, columns, p.m, elements=sums + again)
    yield Step(f"{name} sums", p.rank, columns, extra_elements=sums, calls=TRITON_LAUNCH_CALLS)


def _merge(p: Problem) -> Step:
    """w' in one pass over w; products are fp32 whatever the dtype."""
    efficiency = MERGE_EFFICIENCY if p.low_precision else TRITON_EFFICIENCY
    rank = max(span.rank for span in p.spans)
    return Step("merge", p.n, p.k, rank, True, efficiency=efficiency, calls=TRITON_LAUNCH_CALLS)
