"""From the tensors of a call to its plan."""

from __future__ import annotations

from functools import lru_cache

import torch

from fused_lora.ops.ceilings import ceilings, conditions
from fused_lora.plan.choose import choose
from fused_lora.plan.problem import Problem
from fused_lora.types import Keep, Needs, Plan, Span


def problem(
    m: int,
    k: int,
    n: int,
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    bias: bool,
    needs: Needs,
) -> Problem:
    """The plan's question for one call."""
    return Problem(m, k, n, spans, str(dtype).removeprefix("torch."), bias, needs)


def plan_for(
    m: int,
    k: int,
    n: int,
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    bias: bool,
    needs: Needs,
    device: torch.device,
    keep: Keep | None = None,
) -> Plan:
    """The chosen plan; ``keep`` fixes what the forward keeps, where that was settled before."""
    now = conditions(device, dtype)
    return _plan_for(m, k, n, spans, dtype, bias, needs, device, keep, now)


@lru_cache(maxsize=4096)
def _plan_for(
    m: int,
    k: int,
    n: int,
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    bias: bool,
    needs: Needs,
    device: torch.device,
    keep: Keep | None,
    now: tuple[str, int],  # a change of it asks anew
) -> Plan:
    question = problem(m, k, n, spans, dtype, bias, needs)
    return choose(question, ceilings(device, dtype), keep)
