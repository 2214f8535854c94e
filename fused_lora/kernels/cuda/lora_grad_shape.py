"""Which compiled kernel serves which sizes of ``lora_grads``: its form, and an example of each.

A form is what a check stands for: one compiled kernel, and how many blocks hold a problem together.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.chip import Chip
from fused_lora.plan.cost_cuda import dh_given
from fused_lora.plan.problem import Problem
from fused_lora.types import Keep, Plan

STEP, WIDEST = 64, 8192  # columns of the examples, a little less than whole steps
RANK_BLOCK = 16
WIDE = ("float32", "tf32")  # dtypes of a problem whose products are of TF32 here


class Form(NamedTuple):
    """A compiled kernel and the size of its cluster."""

    strips: int  # of 16 columns, that a warp holds
    rank_blocks: int  # of 16
    forms: bool  # h or dh on chip
    cluster: int  # blocks that add their parts of h and dh

    def __str__(self) -> str:
        words = f"{self.strips} strips {RANK_BLOCK * self.rank_blocks} ranks"
        if not self.forms:
            return f"{words} given"
        return f"{words} cluster of {self.cluster}" if self.cluster > 1 else words


class GradShape(NamedTuple):
    """The sizes of one problem, and what of it is asked for and given."""

    k: int
    n: int
    ranks: int  # stacked
    h_given: bool = False
    dh_given: bool = False
    needs_a: bool = True
    needs_b: bool = True
    needs_bias: bool = False
    tf32: bool = False  # x, dy, h and dh are fp32, multiplied as TF32; else of 16 bits

    @property
    def forms_dh(self) -> bool:
        """Whether dh is formed on chip."""
        return self.needs_a and not self.dh_given

    @property
    def forms(self) -> bool:
        """Whether h or dh is formed on chip."""
        return (self.needs_b and not self.h_given) or self.forms_dh

    def plan(self, rows: int, chip: Chip) -> Any:
        """fused_lora._native.GradPlan; None where no block or cluster holds the problem."""
        module = native.load()
        return module.plan_lora_grad(
            **self._asdict(), rows=rows, arch=chip.arch, processors=chip.processors
        )

    def form(self, chip: Chip) -> Form | None:
        """What serves it on ``chip``; None where nothing does."""
        plan = self.plan(1, chip)
        if plan is None:
            return None
        cluster = plan.chunks if self.forms else 1
        return Form(plan.most_strips, plan.rank_blocks, self.forms, cluster)


@lru_cache(maxsize=4096)
def fitting(shape: GradShape, chip: Chip) -> GradShape:
    """``shape``, or what fits ``chip`` of it: dbias apart, then h and dh given."""
    apart = shape._replace(needs_bias=False)
    given = shape._replace(h_given=True, dh_given=True)
    both = given._replace(needs_bias=False)
    return next((s for s in (shape, apart, given) if s.form(chip)), both)


def shape_of(p: Problem, plan: Plan) -> GradShape:
    """What ``plan`` leaves to the compiled gradients."""
    needs = p.needs
    given = (plan.keep is Keep.HIDDEN, dh_given(p, plan))
    tf32 = p.dtype in WIDE
    return GradShape(p.k, p.n, p.rank, *given, needs.a, needs.b, needs.bias, tf32)


@lru_cache(maxsize=16)
def examples(chip: Chip, tf32: bool = False) -> dict[Form, GradShape]:
    """A square problem for every form that a chip has, the narrowest that fills its warps.

    Of 16-bit or of TF32 products: other kernels each.
    """
    found: dict[Form, GradShape] = {}
    widths, granule = range(STEP, WIDEST + 1, STEP), 4 if tf32 else 8
    for width, blocks, given in product(widths, range(1, 5), (False, True)):
        size, ranks = width - granule, RANK_BLOCK * blocks - 1
        shape = GradShape(size, size, ranks, given, given, needs_bias=True, tf32=tf32)
        form, plan = shape.form(chip), shape.plan(1, chip)
        if form is None or (form in found and found[form].plan(1, chip).full):
            continue
        if form not in found or plan.full:
            found[form] = shape
    return found
