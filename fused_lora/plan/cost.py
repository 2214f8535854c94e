"""What a plan costs: its GEMMs and its passes over memory, against a device's ceilings.

gemm  max(2 m n k / (rate * d / (d + half_rank)), bytes / bandwidth) + call,  d = min(m, n, k)
move  bytes / bandwidth + call

On a GPU a call costs the device a gap between two launches, and the host the call: a plan takes the
longer of both sums.

A library's steps are in ``fused_lora.plan.cost_aten``, Triton's in ``cost_triton``, those of the
compiled kernels in ``cost_cuda``.
"""

from __future__ import annotations

from collections.abc import Iterator

from fused_lora.plan import cost_aten, cost_cuda, cost_triton
from fused_lora.plan.device import Ceilings
from fused_lora.plan.problem import Problem
from fused_lora.plan.step import Step
from fused_lora.plan.strategies import fuses_epilogue, fuses_activation_grad
from fused_lora.types import Backend, Plan


def context_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """The passes of a GELU and of its slope, where no epilogue of the plan's has them."""
    if p.activated and not fuses_epilogue(plan):
        yield Step("gelu", p.m, p.n)
    if p.sloped and p.needs.x and not fuses_activation_grad(plan):
        yield Step("gelu slope", p.m, p.k, extra_elements=p.m * p.k)


def steps(p: Problem, plan: Plan) -> list[Step]:
    """Every call of the plan, in order."""
    room = cost_triton if plan.backend is Backend.TRITON else cost_aten
    found = [*room.forward_steps(p, plan), *(room.backward_steps(p, plan) if p.trains else ())]
    if p.needs.bias and plan.grads_by is None:
        found.append(Step("dbias", 1, p.n, extra_elements=p.m * p.n))
    if plan.grads_by is Backend.CUDA:
        found += cost_cuda.cuda_gradient_steps(p, plan)
    return [*found, *context_steps(p, plan)]


def context_us(p: Problem, plan: Plan, ceilings: Ceilings) -> float:
    """Estimated time of what lies beside the products, where no epilogue has it."""
    return sum(step.time_us(p.itemsize, ceilings) for step in context_steps(p, plan))


def time_us(p: Problem, plan: Plan, ceilings: Ceilings) -> float:
    """Estimated time of forward and backward together: the device's, or the host's if longer.

    A host that takes longer to queue a step than the device to run it is what the step waits for.
    """
    found = steps(p, plan)
    device_us = sum(step.time_us(p.itemsize, ceilings) for step in found)
    return max(device_us, sum(step.host_us(ceilings) for step in found))
