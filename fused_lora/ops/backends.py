"""Which backends may serve a problem here, and a sentence for each that may not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_extended
from fused_lora.kernels.cuda import lora_linear as hopper
from fused_lora.kernels.cuda.lora_extended import ProductTile
from fused_lora.kernels.cuda.lora_grad_shape import fitting, shape_of
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.launches import NO_PRODUCTS, Launch, launches, tile_of
from fused_lora.ops import lora_grad_backends
from fused_lora.ops.ceilings import conditions
from fused_lora.plan.cost_kernels import may_write_dh
from fused_lora.plan.problem import Problem
from fused_lora.plan.strategies import (
    INT32,
    STRATEGIES,
    candidates,
    why_not_backend,
    why_not_products,
    why_not_strategy,
)
from fused_lora.types import Backend, Impl, Plan
from fused_lora.verify.check import CannotVerifyNow, KernelId, Verdict
from fused_lora.verify.kernel_registry import Checked, of_compiled_product, of_launch
from fused_lora.verify.verdicts import announce, is_collecting, known, verdict, why_not_concrete

ASKED: dict[Impl, tuple[Backend, ...]] = {
    Impl.AUTO: tuple(Backend),
    Impl.ATEN: (Backend.ATEN,),
    Impl.REFERENCE: (Backend.ATEN,),
    Impl.TRITON: (Backend.TRITON,),
    Impl.CUDA: tuple(Backend),  # what it has no kernel for is any other's
}

NOT_ASKED = "it serves where impl='cuda' asks for it: no measurement says that it wins"


def why_not(
    problem: Problem, backend: Backend, dtype: torch.dtype, device: torch.device
) -> str | None:
    """One sentence why ``backend`` cannot serve ``problem`` on ``device``; None when it can."""
    if backend is Backend.ATEN:
        return None
    if backend is Backend.CUDA:
        return (
            lora_grad_backends.why_not_on(device)
            or why_not_backend(problem, backend)
            or lora_grad_backends.why_not_dtype(dtype)
        )
    return _triton(device, dtype) or why_not_backend(problem, backend)


def refusals(problem: Problem, dtype: torch.dtype, device: torch.device) -> list[str]:
    """One sentence for every backend, and every strategy of a backend, that cannot serve."""
    refused = {b: why_not(problem, b, dtype, device) for b in Backend}
    backends = [f"{b.value}: {reason}" for b, reason in refused.items() if reason]
    strategies = [
        why_not_strategy(problem, b, strategy)
        for b in Backend
        if refused[b] is None
        for strategy in STRATEGIES[b]
    ]
    if lora_grad_backends.why_not_on(device) is None:
        product = _product(device) or why_not_products(problem) or NOT_ASKED
        strategies.append(f"cuda extended: {product}")
    return [*backends, *(reason for reason in strategies if reason)]


def serving(
    problem: Problem, impl: Impl, dtype: torch.dtype, device: torch.device
) -> list[Backend]:
    """The backends that ``impl`` allows and that serve ``problem`` on ``device``."""
    if impl is Impl.CUDA and lora_grad_backends.why_not_on(device):
        return []
    return [b for b in ASKED[impl] if why_not(problem, b, dtype, device) is None]


def plans(problem: Problem, impl: Impl, dtype: torch.dtype, device: torch.device) -> list[Plan]:
    """Every plan of the backends that serve; under ``cuda``, those with most of its kernels."""
    compiled = impl is Impl.CUDA and _product(device) is None
    found = [
        plan if plan.grads_by is None else _by_planner(problem, plan, dtype, device)
        for plan in candidates(problem, serving(problem, impl, dtype, device), compiled)
        if plan.grads_by is None or _of_gradients(problem, plan, dtype, device)
    ]
    if impl is not Impl.CUDA:
        return found
    most = max((_compiled_parts(plan) for plan in found), default=0)
    if most == 0 and problem.trains_adapters:
        return []
    return [plan for plan in found if _compiled_parts(plan) == most]


def _compiled_parts(plan: Plan) -> int:
    return (plan.backend is Backend.CUDA) + (plan.grads_by is Backend.CUDA)


def kernels(
    problem: Problem, plan: Plan, dtype: torch.dtype, key: str, device: torch.device
) -> list[Checked]:
    """What must be right before ``plan`` serves; ``key`` names what its products round to."""
    needed = [of_launch(one, key) for one in launches(problem, plan, dtype, device)]
    if plan.backend is Backend.CUDA:
        needed += _compiled_products(problem, plan, dtype, device)
    if plan.grads_by and (gradients := _of_gradients(problem, plan, dtype, device)):
        needed.append(gradients)
    return sorted(needed, key=lambda one: str(one.subject))


def _compiled_products(
    problem: Problem, plan: Plan, dtype: torch.dtype, device: torch.device
) -> list[Checked]:
    """What ``plan`` launches; a measured tile that is known to be wrong is passed over for good."""
    tiles = hopper.tiles(problem, plan, dtype, device)
    needed = {t: of_compiled_product(t, str(dtype).removeprefix("torch.")) for t in tiles}
    if any([_passes_over(tile, one, dtype, device) for tile, one in needed.items()]):
        return _compiled_products(problem, plan, dtype, device)
    return list(needed.values())


def _passes_over(
    tile: ProductTile, checked: Checked, dtype: torch.dtype, device: torch.device
) -> bool:
    found = known(checked, device)
    wrong = found is not None and not found.passed
    return wrong and lora_extended.pass_over(tile, dtype, device)


def _of_gradients(
    problem: Problem, plan: Plan, dtype: torch.dtype, device: torch.device
) -> Checked | None:
    return lora_grad_backends.checked(shape_of(problem, plan), dtype, device)


def _by_planner(problem: Problem, plan: Plan, dtype: torch.dtype, device: torch.device) -> Plan:
    """``plan`` as the compiled gradients' own planner has it: dh handed on if formed, sums."""
    chip, first = Chip.of(device), replace(plan, writes_dh=True)
    if may_write_dh(problem, plan) and fitting(shape_of(problem, first), chip).forms_dh:
        plan = first if _of_gradients(problem, first, dtype, device) else plan
    launched = fitting(shape_of(problem, plan), chip).plan(problem.m, chip)
    return replace(plan, slices=launched.partials if launched else 0)


def failures(
    problem: Problem, plan: Plan, dtype: torch.dtype, key: str, device: torch.device
) -> dict[KernelId, Verdict]:
    """The kernels of ``plan`` that this device found wrong; checks those not checked yet.

    A measured tile of the compiled product that is wrong is passed over, and what serves is checked
    in its place.

    Raises:
        CannotVerifyNow: one is not checked, and cannot be at this moment.
    """
    needed = kernels(problem, plan, dtype, key, device)
    announce(needed, device)
    found, later = {}, None
    for one in needed:
        try:
            found[one.subject] = verdict(one, device)
        except CannotVerifyNow as reason:
            if not is_collecting():
                raise
            later = reason
    if later is not None:
        raise later
    wrong = {subject: verdict for subject, verdict in found.items() if not verdict.passed}
    if wrong and plan.backend is Backend.CUDA:
        others = kernels(problem, plan, dtype, key, device)
        if [one.subject for one in others] != [one.subject for one in needed]:
            return failures(problem, plan, dtype, key, device)
    return wrong


def known_failures(
    problem: Problem, plan: Plan, dtype: torch.dtype, key: str, device: torch.device
) -> list[KernelId]:
    """The kernels of ``plan`` that are known to be wrong; nothing is checked for it."""
    needed = kernels(problem, plan, dtype, key, device)
    return [one.subject for one in needed if (found := known(one, device)) and not found.passed]


def matching(plans: Sequence[Plan], right: Callable[[Plan], bool]) -> list[Plan]:
    """The ``plans`` whose kernels are ``right``, without those that cannot be checked now.

    Raises:
        CannotVerifyNow: verdicts are being collected, and one is missing.
    """
    found, later = [], None
    for plan in plans:
        try:
            if right(plan):
                found.append(plan)
        except CannotVerifyNow as reason:
            later = reason
    if later is not None and is_collecting():
        raise later
    return found


_product = lru_cache(maxsize=64)(hopper.why_not)


def why_not_product(device: torch.device) -> str | None:
    """One sentence why no compiled product serves on ``device``; None when one may."""
    return _product(device)


def why_not_product_behind(
    shape: tuple[int, int, int],  # of y: its rows and columns, and how deep its sums are
    ranks: int,
    behind: str,  # gelu, scale
    dtype: torch.dtype,
    device: torch.device,
    right: str = "rows",  # or columns, of dx
) -> str | None:
    """One sentence why the compiled product cannot have this epilogue; None when it can."""
    tile = lora_extended.tile_of(*shape, ranks, dtype, device, right)
    checked = of_compiled_product(tile, str(dtype).removeprefix("torch."), behind)
    reason = distrust(checked, device)
    if reason and _passes_over(tile, checked, dtype, device):
        return why_not_product_behind(shape, ranks, behind, dtype, device, right)
    return reason


def why_not_device(t: Tensor, dtype: torch.dtype) -> str | None:
    """One sentence why Triton serves no product in ``dtype`` where ``t`` is; None when it may."""
    return _triton(t.device, dtype)


def why_not_launch(
    kernel: str,
    rows: int,
    columns: int,
    depth: int,
    t: Tensor,
    dtype: torch.dtype | None = None,  # that it computes in, where it is not t's
    uneven: bool = False,  # of ranks
) -> str | None:
    """One sentence why Triton cannot launch ``kernel`` on ``t``; None when it can.

    The sizes, and which ranks are uneven, are those of ``fused_lora.kernels.triton.launches``.
    """
    dtype = dtype or t.dtype
    if reason := _triton(t.device, dtype) or why_not_concrete(t):
        return reason
    if rows * columns == 0:
        return "there is nothing to launch"
    if max(rows, columns, depth) >= INT32:
        return f"it counts in 32 bits, got {rows:,} x {columns:,} x {depth:,}"
    tile = tile_of(kernel, rows, columns, depth, dtype, t.device, uneven)
    return distrust(_checked(Launch(kernel, tile), _rate(kernel, dtype, t.device)), t.device)


def distrust(checked: Checked, device: torch.device) -> str | None:
    """One sentence why ``checked`` may not serve on ``device``; the first to ask may wait."""
    try:
        found = verdict(checked, device)
    except CannotVerifyNow as reason:
        return f"it is not checked yet, and {reason}"
    return None if found.passed else str(found)


_checked = lru_cache(maxsize=4096)(of_launch)


def _rate(kernel: str, dtype: torch.dtype, device: torch.device) -> str:
    """How products of fp32 are formed where the kernel has any."""
    name = str(dtype).removeprefix("torch.")
    return name if kernel in NO_PRODUCTS else conditions(device, dtype)[0]


@lru_cache(maxsize=64)
def _triton(device: torch.device, dtype: torch.dtype) -> str | None:
    return available.why_not(device, dtype)
