"""The candidates: every consistent way to compute a problem, and a sentence for each that is not.

A plan is consistent when what the forward keeps is used by the backward and is no larger than h
(DESIGN.md section 4), and when its backend has the strategies it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from fused_lora.plan.problem import Problem
from fused_lora.types import Backend, Forward, Gradient, Keep, Needs, Plan

LIBRARY = (Backend.ATEN,)
STRATEGIES: dict[Backend, tuple[Forward, ...]] = {
    Backend.ATEN: (Forward.SEPARATE, Forward.BORDERED, Forward.MERGE, Forward.OPEN),
    Backend.TRITON: (Forward.EXTENDED, Forward.ONE_PASS, Forward.MERGE),
    Backend.CUDA: (Forward.EXTENDED,),  # where it is asked for by name
}
ROUNDS_ONCE = (Forward.BORDERED, Forward.EXTENDED, Forward.ONE_PASS, Forward.OPEN)
ONE_PASS_RANKS = 64  # sum R whose h stands in registers beside the accumulator
INT32 = 1 << 31  # kernels count rows, columns and the elements of a and b in 32 bits
GRADIENT_RANKS = 64  # sum R whose gradients the one pass over x and dy holds in registers
GRADIENT_GROUPS = 4  # adapters of one layer that it serves
PRODUCT_GROUPS = 4  # and that the compiled product serves
MOST_SLICES = 64  # of rows, whose fp32 partial sums of a gradient stand side by side


def why_not_backend(problem: Problem, backend: Backend) -> str | None:
    """One sentence why ``backend`` has nothing for ``problem``; None when it has."""
    if backend is Backend.ATEN:
        return None
    if backend is Backend.CUDA:
        return why_not_gradients(problem)
    if problem.dtype == "float64":
        return "Triton's kernels compute in float32, bfloat16 and float16, not in float64"
    if min(problem.k, problem.n) == 0:
        return f"there is nothing to launch for w [{problem.n}, {problem.k}]"
    largest = max(problem.m, MOST_SLICES * problem.rank * max(problem.k, problem.n))
    if largest >= INT32 - 4096:  # a block past the last row is still counted
        return f"Triton's kernels count in 32 bits, and this problem has {largest:,} of something"
    return None


def why_not_gradients(problem: Problem) -> str | None:
    """One sentence why no compiled pass over x and dy has the gradients of ``problem``."""
    if not problem.trains_adapters:
        return "the compiled kernels compute adapter gradients, and none is asked for"
    if problem.dtype == "float64":
        return "the compiled gradients multiply TF32, bfloat16 and float16, not float64"
    if (problem.k | problem.n) * problem.itemsize % 16 or min(problem.k, problem.n) == 0:
        return (
            "the compiled gradients read rows of whole 16 bytes, and w is "
            f"[{problem.n}, {problem.k}]"
        )
    if problem.rank > GRADIENT_RANKS:
        return (
            f"the compiled gradients stay in registers up to rank {GRADIENT_RANKS} in all, "
            f"and the ranks sum to {problem.rank}"
        )
    if len(problem.spans) > GRADIENT_GROUPS:
        return (
            f"the compiled gradients take up to {GRADIENT_GROUPS} adapters of a layer, "
            f"and this one has {len(problem.spans)}"
        )
    return None


def why_not_products(problem: Problem) -> str | None:
    """One sentence why the compiled product has nothing for ``problem``; None when it has."""
    if not problem.low_precision:
        return f"the compiled product takes bfloat16 and float16 x and w, not {problem.dtype}"
    if problem.k % 8 or problem.n % 8 or min(problem.k, problem.n) == 0:
        return (
            "the compiled product moves rows of whole 16 bytes, and w is "
            f"[{problem.n}, {problem.k}]"
        )
    if len(problem.spans) > PRODUCT_GROUPS:
        return (
            f"the compiled product takes up to {PRODUCT_GROUPS} adapters of a layer, "
            f"and this one has {len(problem.spans)}"
        )
    if problem.m >= INT32 - 4096:
        return f"the compiled product counts rows in 32 bits, and this problem has {problem.m:,}"
    return None


def why_not(problem: Problem, plan: Plan) -> str | None:
    """One sentence why ``plan`` cannot serve ``problem``; None when it can."""
    return (
        _why_not_gradients_by(problem, plan)
        or _why_not_products_by(problem, plan.backend)
        or why_not_strategy(problem, plan.backend, plan.forward)
        or why_not_strategy(problem, plan.backend, plan.dx)
        or _inconsistent(problem, plan)
    )


def why_not_strategy(problem: Problem, backend: Backend, strategy: Forward) -> str | None:
    """One sentence why ``backend`` cannot compute ``problem`` by ``strategy``."""
    if strategy not in STRATEGIES[backend]:
        return f"{backend.value} has no kernel of {strategy.value}"
    if strategy is Forward.ONE_PASS and problem.rank > ONE_PASS_RANKS:
        return (
            f"one_pass holds h of a tile in registers, up to rank {ONE_PASS_RANKS} in all, "
            f"and the ranks sum to {problem.rank}"
        )
    return None


def _why_not_products_by(problem: Problem, backend: Backend) -> str | None:
    compiled = backend is Backend.CUDA
    return why_not_products(problem) if compiled else why_not_backend(problem, backend)


def _why_not_gradients_by(problem: Problem, plan: Plan) -> str | None:
    if plan.grads_by is None:
        return None
    if plan.gradient is not Gradient.RANK:
        return "only rank-sized gradients are computed by another backend than dx"
    return why_not_backend(problem, plan.grads_by)


def _inconsistent(problem: Problem, plan: Plan) -> str | None:
    if plan.forward is Forward.OPEN and not problem.expanded:
        return "nobody behind y adds the low-rank term that open leaves out"
    if problem.needs.x and plan.dx is Forward.OPEN and not problem.input_expanded:
        return "nobody before x adds the low-rank term that open leaves out"
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


def candidates(
    problem: Problem, backends: Sequence[Backend] = LIBRARY, compiled: bool = False
) -> list[Plan]:
    """Every plan that can serve ``problem`` on one of ``backends``.

    CUDA among them brings its gradients, beside any other's products; ``compiled`` its products.
    """
    products = [b for b in backends if b is not Backend.CUDA] + [Backend.CUDA] * compiled
    gradients = (None, *(b for b in backends if b is Backend.CUDA))
    plans = (
        Plan(*parts, backend=backend, grads_by=grads_by)
        for backend in products
        for grads_by in gradients
        for parts in product(STRATEGIES[backend], STRATEGIES[backend], Gradient, Keep)
    )
    return [plan for plan in plans if why_not(problem, plan) is None]


def fuses_activation(plan: Plan) -> bool:
    """Whether its forward may write GELU(u) beside u in one pass."""
    return plan.backend is not Backend.ATEN and plan.forward is Forward.EXTENDED


def fuses_residual(plan: Plan) -> bool:
    """Whether its forward may add residual + factor y in the pass that forms y."""
    one_pass = plan.backend is Backend.TRITON and plan.forward is Forward.ONE_PASS
    return one_pass or fuses_activation(plan)


def fuses_activation_grad(plan: Plan) -> bool:
    """Whether its dx may go on through a GELU's derivative in one pass."""
    return plan.backend is not Backend.ATEN and plan.dx is Forward.EXTENDED


def by_library(plan: Plan) -> Plan:
    """``plan`` where no kernel of its backend may run: as precise, and it keeps the same."""
    here = STRATEGIES[Backend.ATEN]
    forward, dx = (p if p in here else Forward.BORDERED for p in (plan.forward, plan.dx))
    plain = replace(plan, grads_by=None, slices=0, writes_dh=False)
    return replace(plain, forward=forward, dx=dx, backend=Backend.ATEN)


def keeps_x(needs: Needs, plan: Plan) -> bool:
    """Whether backward reads x."""
    return needs.w or needs.a or (needs.b and plan.keep is not Keep.HIDDEN)
