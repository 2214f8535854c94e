"""Which backends may serve a problem here, and a sentence for each that may not."""

from __future__ import annotations

from functools import lru_cache

import torch

from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.launches import Launch, launches
from fused_lora.plan.problem import Problem
from fused_lora.plan.strategies import STRATEGIES, why_not_backend, why_not_strategy
from fused_lora.trust.subjects import of_launch
from fused_lora.trust.verdict import Verdict
from fused_lora.trust.verify import verdict
from fused_lora.types import Backend, Impl, Plan

CUDA = "the compiled module has no kernel of lora_linear: its lora_grad is not in the plan yet"
ASKED: dict[Impl, tuple[Backend, ...]] = {
    Impl.AUTO: tuple(Backend),
    Impl.ATEN: (Backend.ATEN,),
    Impl.REFERENCE: (Backend.ATEN,),
    Impl.TRITON: (Backend.TRITON,),
    Impl.CUDA: tuple(Backend),  # what it has no kernel for is any other's
}


def why_not(
    problem: Problem, backend: Backend, dtype: torch.dtype, device: torch.device
) -> str | None:
    """One sentence why ``backend`` cannot serve ``problem`` on ``device``; None when it can."""
    if backend is Backend.ATEN:
        return None
    if backend is Backend.CUDA:
        return CUDA
    return _triton(device, dtype) or why_not_backend(problem, backend)


def refusals(problem: Problem, dtype: torch.dtype, device: torch.device) -> list[str]:
    """One sentence for every backend, and every strategy of a backend, that cannot serve."""
    said = {b: why_not(problem, b, dtype, device) for b in Backend}
    backends = [f"{b.value}: {reason}" for b, reason in said.items() if reason]
    strategies = [
        why_not_strategy(problem, b, strategy)
        for b in Backend
        if said[b] is None
        for strategy in STRATEGIES[b]
    ]
    return [*backends, *(reason for reason in strategies if reason)]


def serving(
    problem: Problem, impl: Impl, dtype: torch.dtype, device: torch.device
) -> list[Backend]:
    """The backends that ``impl`` allows and that serve ``problem`` on ``device``."""
    if impl is Impl.CUDA and why_not(problem, Backend.CUDA, dtype, device):
        return []
    return [b for b in ASKED[impl] if why_not(problem, b, dtype, device) is None]


def failures(
    problem: Problem, plan: Plan, dtype: torch.dtype, key: str, device: torch.device
) -> dict[Launch, Verdict]:
    """The launches of ``plan`` that this device found wrong; checks those not checked yet.

    Raises:
        NotNow: one is not checked, and cannot be at this moment.
    """
    if plan.backend is Backend.ATEN:
        return {}
    needed = sorted(launches(problem, plan, dtype, device), key=str)
    found = {launch: verdict(of_launch(launch, key), device) for launch in needed}
    return {launch: said for launch, said in found.items() if not said.passed}


@lru_cache(maxsize=64)
def _triton(device: torch.device, dtype: torch.dtype) -> str | None:
    return available.why_not(device, dtype)
