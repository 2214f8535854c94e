"""What the compiled kernels cost: the gradients db and da from one pass over x and dy, then a sum
of slices; and the Hopper product, which reads h beside x.

    h, dh   formed from the tiles that the gradients read, or read where they are kept; a dh that
            is formed here is written for dx, which then comes second

Slices are those of the kernels' own planner where the module is there. The efficiencies and calls
below are guesses: no time has been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fused_lora.plan.problem import Problem
from fused_lora.plan.step import Step
from fused_lora.types import Backend, Forward, Keep, Plan

CUDA_EFFICIENCY = 0.8  # of its products beside the library's; unmeasured
PRODUCT_EFFICIENCY = 0.9  # of the Hopper product beside the library's; unmeasured
CUDA_LAUNCH_CALLS = 1.0  # cost of a launch in library calls, the queue hiding the rest; unmeasured
CUDA_RANK_BLOCK = 16  # ranks are padded to it on chip
TILE_ROW_BYTES = 32  # a tile has as many rows as elements lie in these
SLICES = 132  # of rows, whose fp32 sums are written and read: one per processor, at most
PACKING_CALLS = 12.0  # library calls that the host's packing of a launch takes: 74 us by 6


def cuda_gradient_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The two launches that make db, da and the gradient of the bias."""
    forms_h = p.needs.b and plan.keep is not Keep.HIDDEN
    forms_dh = p.needs.a and not dh_given(p, plan)
    k = p.k if p.needs.a or forms_h else 0
    n = p.n if p.needs.b or p.needs.bias or forms_dh else 0
    ranks = -(-p.rank // CUDA_RANK_BLOCK) * CUDA_RANK_BLOCK
    slices = plan.slices or min(SLICES, -(-p.m * p.itemsize // TILE_ROW_BYTES))
    sums = slices * ranks * (k + n) * (4 // p.itemsize)
    shrinks = 2 * p.m * ranks * (forms_h * p.k + forms_dh * p.n)
    handed = p.m * p.rank * plan.hands_dh
    how = (False, shrinks, sums + handed, CUDA_EFFICIENCY, CUDA_LAUNCH_CALLS, PACKING_CALLS)
    yield Step("one pass db da", ranks, k + n, p.m, *how)
    again = Step("sums db da", ranks, k + n, extra_elements=sums, calls=CUDA_LAUNCH_CALLS)
    yield replace(again, host_calls=0.0)  # one call of the host's launches both


def cuda_product_step(name: str, p: Problem, columns: int, depth: int, u: bool = False) -> Step:
    """y [M, columns] of x [M, depth] and h in one launch; h and s b are formed before.

    ``u``: it is written beside y.
    """
    width = sum(span.rank * span.width for span in p.spans) // p.n  # ranks of a column of y
    ranks = width if columns == p.n else p.rank
    extra = columns * ranks + (p.m * columns if u else 0)
    rates = (PRODUCT_EFFICIENCY, CUDA_LAUNCH_CALLS, PACKING_CALLS)
    return Step(name, p.m, columns, depth + ranks, False, 0, extra, *rates)


def dh_given(p: Problem, plan: Plan) -> bool:
    """Whether dx forms dh, before the gradients or on its way."""
    return p.needs.x and plan.dx is not Forward.MERGE and not plan.hands_dh


def may_write_dh(p: Problem, plan: Plan) -> bool:
    """Whether the gradients may come first and write the dh that dx reads."""
    reads = plan.dx in (Forward.SEPARATE, Forward.BORDERED, Forward.EXTENDED)
    return plan.grads_by is Backend.CUDA and p.needs.x and p.needs.a and reads
