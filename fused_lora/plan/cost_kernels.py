"""What plans by Triton's and the compiled kernels do, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fused_lora.plan.problem import Problem, Step, cast_steps, full_steps
from fused_lora.types import Backend, Forward, Gradient, Keep, Plan

# What the compiled kernels cost: the gradients db and da from one pass over x and dy, then a sum
# of slices; and the Hopper product, which reads h beside x.
#
#     h, dh   formed from the tiles that the gradients read, or read where they are kept; a dh that
#             is formed here is written for dx, which then comes second
#
# Slices are those of the kernels' own planner where the module is there: a cluster of them, whose
# blocks add their sums on chip, counts once. The efficiencies and calls
# below are guesses: no time has been measured on a GPU yet.


CUDA_EFFICIENCY = 0.8  # of its products beside the library's; unmeasured
PRODUCT_EFFICIENCY = 0.9  # of the Hopper product beside the library's; unmeasured
CUDA_LAUNCH_CALLS = 1.0  # cost of a launch in library calls, the queue hiding the rest; unmeasured
CUDA_RANK_BLOCK = 16  # ranks are padded to it on chip
TILE_ROW_BYTES = 32  # a tile has as many rows as elements lie in these
SLICES = 132  # of rows, whose fp32 sums are written and read: one per processor, at most
GRADIENT_CALLS = 2.0  # library calls of the host's time: 4 us of Python and two launches
PRODUCT_CALLS = 1.0  # likewise: 3 us of Python and one launch


def cuda_gradient_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The two launches that make db, da and the gradient of the bias."""
    forms_h = p.needs.b and plan.keep is not Keep.HIDDEN
    forms_dh = (p.needs.a or plan.writes_dh) and not dh_given(p, plan)
    k = p.k if p.needs.a or forms_h else 0
    n = p.n if p.needs.b or p.needs.bias or forms_dh else 0
    ranks = -(-p.rank // CUDA_RANK_BLOCK) * CUDA_RANK_BLOCK
    slices = plan.slices or min(SLICES, -(-p.m * p.itemsize // TILE_ROW_BYTES))
    sums = slices * ranks * (k + n) * (4 // p.itemsize)
    shrinks = 2 * p.m * ranks * (forms_h * p.k + forms_dh * p.n)
    handed = p.m * p.rank * plan.writes_dh
    how = (False, shrinks, sums + handed, CUDA_EFFICIENCY, CUDA_LAUNCH_CALLS, GRADIENT_CALLS)
    yield Step("one pass db da", ranks, k + n, p.m, *how)
    again = Step("sums db da", ranks, k + n, extra_elements=sums, calls=CUDA_LAUNCH_CALLS)
    yield replace(again, host_calls=0.0)  # which is counted above


def cuda_product_step(name: str, p: Problem, columns: int, depth: int, beside: int = 0) -> Step:
    """y [M, columns] of x [M, depth] and h in one launch; h and s b are formed before.

    ``beside``: matrices as large as y that its epilogue reads or writes: u, a residual. Likewise of
    dx, whose epilogue may read u.
    """
    width = sum(span.rank * span.width for span in p.spans) // p.n  # ranks of a column of y
    ranks = width if columns == p.n else p.rank
    extra = columns * ranks + p.m * columns * beside
    rates = (PRODUCT_EFFICIENCY, CUDA_LAUNCH_CALLS, PRODUCT_CALLS)
    return Step(name, p.m, columns, depth + ranks, False, 0, extra, *rates)


def dh_given(p: Problem, plan: Plan) -> bool:
    """Whether dh is there before the gradients: formed with dy, or by dx on its way."""
    return p.hidden_grad or (p.needs.x and plan.dx is not Forward.MERGE and not plan.writes_dh)


def may_write_dh(p: Problem, plan: Plan) -> bool:
    """Whether the gradients may come first and write the dh that dx reads."""
    reads = plan.dx in (Forward.SEPARATE, Forward.BORDERED, Forward.EXTENDED, Forward.OPEN)
    wanted = p.needs.x and p.needs.a and not p.hidden_grad
    return plan.grads_by is Backend.CUDA and wanted and reads


# What a Triton plan costs: its launches, and the library GEMMs among them.
#
# The efficiencies and calls below are guesses: no time has been measured on a GPU yet.


TRITON_EFFICIENCY = 0.8  # of Triton's GEMM beside the library's; unmeasured
GELU_SHARE = 0.93  # of that: its epilogue is exposed, about 14 instructions an element
GRADS_SHARE = 0.8  # likewise: GELU beside it, and one block a processor; unmeasured
GELU_GRADS_COLUMNS = 256  # of its blocks
GRADS_SLICES = 16  # of rows, whose fp32 sums are written and read; about
TRITON_LAUNCH_CALLS = (
    1.0  # cost of a launch in library calls, the queue hiding the rest; unmeasured
)
MERGE_EFFICIENCY = 1 / 16  # of fp32 products beside 16-bit ones; unmeasured
TRITON_RANK_BLOCK = 64  # ranks whose thin product reads x once
TILE_COLUMNS = 128  # of y, for each of which ONE_PASS forms h anew
PARTIAL_SUMS = 16  # slices of rows whose fp32 sums a gradient writes and reads; about


def triton_forward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The launches of the forward pass."""
    if plan.forward is not Forward.MERGE:
        yield from _pack(p)
    how = (False, p.activated, p.shrunk, p.joined)
    yield from _product(p, plan.forward, "", p.k, p.n, *how)


def triton_backward_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The launches of the backward pass, none where nothing is asked for."""
    rank_gradient = plan.gradient is Gradient.RANK and plan.grads_by is None
    reads = rank_gradient or (p.needs.x and plan.dx is not Forward.MERGE)
    if reads and not keeps_packed(p, plan):
        yield from _pack(p)
    if p.needs.x:
        given = plan.writes_dh or p.hidden_grad
        how = (plan.keep is Keep.MERGED, p.input_activated, given)
        yield from _product(p, plan.dx, "dx ", p.n, p.k, *how)
    if rank_gradient and p.needs.b:
        if plan.keep is not Keep.HIDDEN:
            yield _thin(p, "shrink", p.k)
        yield from _gradient(p, "db", p.n)
    if rank_gradient and p.needs.a:
        if not (p.hidden_grad or (p.needs.x and plan.dx is not Forward.MERGE)):
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
    joined: bool = False,  # a residual is read and added
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
        beside = p.m * columns * (u + joined)
        share = GELU_SHARE if u else 1.0
        yield _launch(f"{name}extended", p.m, columns, depth + ranks, elements=beside, share=share)
    else:
        shrunk, expanded = p.rank * depth * -(-columns // TILE_COLUMNS), ranks * columns
        flops, hidden = 2 * p.m * (shrunk + expanded), p.m * (p.rank + columns * joined)
        yield _launch(f"{name}one_pass", p.m, columns, depth, flops, hidden)


def _launch(
    name: str, m: int, n: int, k: int, flops: int = 0, elements: int = 0, share: float = 1.0
) -> Step:
    return Step(
        name, m, n, k, False, flops, elements, share * TRITON_EFFICIENCY, TRITON_LAUNCH_CALLS
    )


def extended_grads_steps(p: Problem, plan: Plan, ranks_before: int) -> Iterator[Step]:
    """A backward whose dx goes through GELU's derivative, da and the db before it formed there.

    ``ranks_before``: of the linear that made u. db and dh come of dy alone, before.
    """
    yield from cuda_gradient_steps(replace(p, needs=replace(p.needs, a=False)), plan)
    ranks = sum(-(-r // CUDA_RANK_BLOCK) * CUDA_RANK_BLOCK for r in (p.rank, ranks_before))
    sums = GRADS_SLICES * ranks * p.k * (4 // p.itemsize)
    beside = p.m * (p.k + p.rank + ranks_before) + sums
    sizes = (p.m, p.k, p.n + p.rank, 2 * p.m * p.k * ranks, beside)
    yield _launch("dx extended grads", *sizes, share=GRADS_SHARE)
    again = Step("sums da db", ranks, p.k, extra_elements=sums, calls=TRITON_LAUNCH_CALLS)
    yield replace(again, host_calls=0.0)  # one launch with the other sums


def gelu_grads_step(p: Problem) -> Step:
    """GELU's derivative behind an open dx, less two passes that it spares the compiled gradients.

    They read neither u for da of ``p`` nor du for db of the linear before. It leaves fp32 sums of
    dh' of each block of its columns, written and read; ranks of that linear are taken for those of
    ``p``.
    """
    ranks = -(-p.rank // CUDA_RANK_BLOCK) * CUDA_RANK_BLOCK
    sums = -(-p.k // GELU_GRADS_COLUMNS) * p.m * ranks * 2 * (4 // p.itemsize)
    beside = p.m * p.k - 2 * p.m * p.k + sums
    return Step("gelu grads", p.m, p.k, extra_elements=beside, calls=2 * TRITON_LAUNCH_CALLS)


def keeps_packed(p: Problem, plan: Plan) -> bool:
    """Whether backward has what forward packed: no larger than h, and kept in its stead."""
    columns = sum(-(-columns // 16) * 16 for columns in (p.k, p.n))
    return plan.forward is not Forward.MERGE and plan.keep is Keep.NOTHING and columns <= p.m


def _pack(p: Problem) -> Iterator[Step]:
    """a and b as products read them, where they do not lie so.

    In one launch for all linears of an operation (programs/once): each has its share of it.
    """
    if p.casts() or (p.low_precision and len(p.spans) > 1):
        yield Step("pack", p.rank, p.k + p.n, calls=TRITON_LAUNCH_CALLS / p.packed_with)


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
