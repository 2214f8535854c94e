"""The plan counts the calls that the library makes: every one, forward and backward."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.interface import Adapters
from fused_lora.ops.planning import problem, traits_of
from fused_lora.plan import cost_aten
from fused_lora.plan.choose import steps
from fused_lora.plan.strategies import candidates, keeps_x
from fused_lora.types import NO_CONTEXT, Forward, FusionContext, Gradient, Keep, Needs, Plan, Span

K, N = 24, 48
FREE = {"empty", "new_empty", "detach", "promote_types"}
ASKED = (
    Needs(),
    Needs(x=False),
    Needs(True, True, True, True, True),
    Needs(a=False),
    Needs(b=False),
)
CASES = ((True, 1.0, False), (False, 0.5, False), (True, 0.5, True))  # bias, s, x is placed
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32 on bf16": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 on fp32": (torch.float32, torch.bfloat16),
}


class Calls(TorchDispatchMode):
    """Names of the operations that compute or copy: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [part.alias_info for part in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returned)
        name = func.overloadpacket.__name__
        self.names += [] if views or name in FREE else [name]
        return func(*args, **(kwargs or {}))


def made(question, plan, operands, dy, needs):
    """What one pass each way calls."""
    x, w, bias, adapters, buffer = operands
    with Calls() as calls:
        _, kept = aten.forward(x, w, bias, adapters, plan, buffer)
    forward, rows = calls.names, x if keeps_x(needs, plan) else None
    reads_w = needs.x and plan.keep is not Keep.MERGED
    with Calls() as calls:
        if question.trains:
            aten.backward(dy, rows, kept, w if reads_w else None, adapters, needs, plan)
    return forward, calls.names


def names(counted):
    """Of the steps that are calls; w is also copied inside of one."""
    return [step.name for step in counted if step.calls]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("m, rank", [(80, 16), (80, 4), (20, 8)], ids=["many", "thin", "few rows"])
def test_every_plan_calls_what_is_counted(dtypes, groups, m, rank):
    dtype, halves = dtypes
    width = N // groups
    spans = tuple(Span(g * width, (g + 1) * width, rank) for g in range(groups))
    a = [torch.randn(rank, K, dtype=halves) for _ in spans]
    b = [torch.randn(width, rank, dtype=halves) for _ in spans]
    w, dy = torch.randn(N, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    buffer = torch.randn(m, K + rank * groups, dtype=dtype)
    seen = set()
    for needs, (bias, scale, bordered) in product(ASKED, CASES):
        scales = (scale, *[2.0] * (groups - 1))
        given = traits_of(a, scales)
        question = problem(m, K, N, spans, dtype, bias, needs, FusionContext(bordered), given)
        x = buffer[:, :K] if bordered else buffer[:, :K].contiguous()
        operands = (x, w, w[:, 0].contiguous() if bias else None)
        operands += (Adapters(a, b, scales, spans), buffer if bordered else None)
        for plan in candidates(question):
            if bordered and plan.forward is not Forward.BORDERED:
                continue
            counted = names(steps(question, plan))
            ahead = len(names(cost_aten.forward_steps(question, plan)))
            forward, backward = made(question, plan, operands, dy, needs)
            assert len(forward) == ahead, (plan, forward, counted[:ahead])
            assert len(backward) == len(counted) - ahead, (plan, backward, counted[ahead:])
            seen.add((plan.forward, plan.dx, plan.gradient))
    strategies = (Forward.SEPARATE, Forward.BORDERED, Forward.MERGE)
    assert seen >= set(product(strategies, strategies, (Gradient.RANK, Gradient.FULL)))


def test_cuda_widens_without_a_cast():
    """Its GEMM hands back the fp32 accumulator, and lays no thin b out anew."""
    plan = Plan(Forward.SEPARATE, Forward.SEPARATE, Gradient.RANK, Keep.HIDDEN)
    a = [torch.randn(4, K)]
    found = {}
    for device in ("cpu", "cuda"):
        arguments = (80, K, N, (Span(0, N, 4),), torch.bfloat16, True, Needs(), NO_CONTEXT)
        question = problem(*arguments, traits_of(a, [0.5]), torch.device(device))
        found[device] = names(steps(question, plan))
    extra = ["lay out b", "cast db", "cast da"]
    assert [name for name in found["cpu"] if name not in extra] == found["cuda"]
    assert found["cuda"].count("scale db") == 1 and set(extra) < set(found["cpu"])
