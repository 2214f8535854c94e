"""From the tensors of a call to its plan, made of kernels that this device has checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora import env
from fused_lora.ops import backends, measured
from fused_lora.ops.ceilings import ceilings, conditions
from fused_lora.ops.measured import TimingMode, Together
from fused_lora.plan.choose import RankedPlan, context_us, ordered, ranked, together_us
from fused_lora.plan.problem import Problem
from fused_lora.types import (
    DEFAULT_TRAITS,
    NO_CONTEXT,
    AdapterTraits,
    Backend,
    FusionContext,
    Impl,
    Keep,
    Needs,
    Plan,
    Span,
)
from fused_lora.verify.check import CannotVerifyNow
from fused_lora.verify.verdicts import holds

CPU = torch.device("cpu")


def problem(
    m: int,
    k: int,
    n: int,
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    bias: bool,
    needs: Needs,
    context: FusionContext = NO_CONTEXT,
    traits: AdapterTraits = DEFAULT_TRAITS,
    device: torch.device = CPU,
) -> Problem:
    """The plan's question for one call."""
    name = str(dtype).removeprefix("torch.")
    return Problem(m, k, n, spans, name, bias, needs, *context, traits, device.type)


def traits_of(ab: Sequence[Tensor], scales: Sequence[float]) -> AdapterTraits:
    """What the plan asks of adapters beside their shapes; the first a speaks for all dtypes."""
    return _traits(ab[0].dtype if ab else None, tuple(scales))


@lru_cache(maxsize=1024)
def _traits(dtype: torch.dtype | None, scales: tuple[float, ...]) -> AdapterTraits:
    name = "" if dtype is None else str(dtype).removeprefix("torch.")
    return AdapterTraits(name, tuple(scale != 1.0 for scale in scales), len(set(scales)) <= 1)


def packed_with(linears: int) -> int:
    """Of an operation's ``linears``, how many have their adapters packed in one launch."""
    return linears if env.flag("FUSED_LORA_PROGRAMS", default=True) else 1


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
    impl: Impl = Impl.AUTO,
    context: FusionContext = NO_CONTEXT,
    traits: AdapterTraits = DEFAULT_TRAITS,
    times: TimingMode | None = None,
) -> Plan:
    """The chosen plan; ``keep`` fixes what the forward keeps, where that was settled before.

    ``times`` says whether it is chosen by time; None for what FUSED_LORA_PLAN and the moment allow.

    Raises:
        RuntimeError: ``impl`` names a backend that cannot serve, with the reason.
    """
    now = (*conditions(device, dtype), holds())
    try:
        asked = (m, k, n, spans, dtype, bias, needs, device, keep, impl, context, traits)
        return _plan_for(*asked, now, measured.timing_mode(device) if times is None else times)
    except CannotVerifyNow as reason:
        question = problem(m, k, n, spans, dtype, bias, needs, context, traits, device)
        return _unchecked(question, dtype, device, keep, impl, reason).rows[0].plan


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
    impl: Impl,
    context: FusionContext,
    traits: AdapterTraits,
    now: tuple[str, int, bool],  # a change of it asks anew
    times: TimingMode,
) -> Plan:
    question = problem(m, k, n, spans, dtype, bias, needs, context, traits, device)
    return settled(question, dtype, device, keep, impl, times).rows[0].plan


def together_wins(
    question: Problem, both: Together, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether gradients formed in the tiles of dx, through GELU's derivative, take less time."""
    plan, _, before, own, rest = both
    found = measured.together(question, both, device)
    limits = ceilings(device, dtype)
    apart, joint = found or together_us(question, plan, before, own, rest, limits)
    return joint < apart


class Settled(NamedTuple):
    """The plans of checked kernels, and what was dropped on the way to them."""

    rows: list[RankedPlan]  # the chosen plan first
    wrong: list[str]  # one sentence for each kernel that failed its check


def settled(
    question: Problem,
    dtype: torch.dtype,
    device: torch.device,
    keep: Keep | None = None,
    impl: Impl = Impl.AUTO,
    times: TimingMode = TimingMode.MODEL,
) -> Settled:
    """The plans that ``impl`` allows, ranked; the kernels of the first are checked.

    By ``times`` those that were measured come first, by their times.

    Raises:
        CannotVerifyNow: the best plan has a kernel that is not checked and cannot be now.
        RuntimeError: none is left of what ``impl`` allows.
    """
    limits, key = ceilings(device, dtype), conditions(device, dtype)[0]
    plans = backends.plans(question, impl, dtype, device)
    reasons: list[str] = []
    while rows := ranked(question, limits, keep, plans):
        wrong = backends.failures(question, rows[0].plan, dtype, key, device)
        if not wrong:
            if times is not TimingMode.MODEL:
                rows = _by_time(question, rows, dtype, device, (key, keep, impl), times)
            return Settled(rows, reasons)
        reasons += [f"{subject.kernel}: {verdict}" for subject, verdict in wrong.items()]
        plans = [
            plan
            for plan in plans
            if wrong.keys().isdisjoint(
                one.subject for one in backends.kernels(question, plan, dtype, key, device)
            )
        ]
    reasons = reasons or _reasons(question, dtype, device, impl)
    raise RuntimeError(f"impl={impl.value!r} cannot serve: {'; '.join(reasons)}")


def _by_time(
    question: Problem,
    rows: list[RankedPlan],
    dtype: torch.dtype,
    device: torch.device,
    asked: tuple[str, Keep | None, Impl],
    times: TimingMode,
    failures: Callable[..., Any] = backends.failures,
) -> list[RankedPlan]:
    """The plans of ``rows`` that were timed, by their times, then the others by their estimates."""
    plans = [row.plan for row in rows]
    failing = partial(failures, question, dtype=dtype, key=asked[0], device=device)
    by_name = measured.load(question, plans, device, asked)
    if not by_name and times in (TimingMode.MEASURE, TimingMode.LOOK):
        right = backends.matching(measured.likely(plans), lambda plan: not failing(plan))
        if times is TimingMode.MEASURE:
            by_name = measured.times(question, right, device, asked)
        else:
            measured.collect(question, right, device)
    limits, estimates = ceilings(device, dtype), {str(plan): plan.time_us for plan in plans}
    timed = [
        replace(plan, time_us=by_name[str(plan)] + context_us(question, plan, limits))
        for plan in plans
        if str(plan) in by_name
    ]
    first = [replace(row, estimate_us=estimates[str(row.plan)]) for row in ordered(question, timed)]
    while first and failing(first[0].plan):
        del first[0]
    return [*first, *(row for row in rows if str(row.plan) not in by_name)] if first else rows


def expected(
    question: Problem, dtype: torch.dtype, device: torch.device, keep: Keep | None = None
) -> Plan:
    """The plan that will serve unless a kernel that is not checked yet is found wrong."""
    key = conditions(device, dtype)[0]
    plans = backends.plans(question, Impl.AUTO, dtype, device)
    rows = ranked(question, ceilings(device, dtype), keep, plans)
    if (times := measured.timing_mode(device, anew=False)) is not TimingMode.MODEL:
        asked = (key, keep, Impl.AUTO)
        rows = _by_time(question, rows, dtype, device, asked, times, backends.known_failures)
    wrong = partial(backends.known_failures, question, dtype=dtype, key=key, device=device)
    return next(row.plan for row in rows if not wrong(row.plan))


def explained(question: Problem, dtype: torch.dtype, device: torch.device) -> Settled:
    """As ``settled``, of the library's plans alone where nothing can be checked."""
    try:
        return settled(question, dtype, device, times=measured.timing_mode(device, anew=False))
    except CannotVerifyNow as reason:
        return _unchecked(question, dtype, device, None, Impl.AUTO, reason)


def checked_plans(question: Problem, device: torch.device | str) -> list[Plan]:
    """Every plan of kernels that ``device`` finds right, the chosen one first; checks them all."""
    device, dtype = torch.device(device), getattr(torch, question.dtype)
    key = conditions(device, dtype)[0]
    rows = settled(question, dtype, device, times=measured.timing_mode(device)).rows
    plans = [row.plan for row in rows]
    return [plan for plan in plans if not backends.failures(question, plan, dtype, key, device)]


def _reasons(question: Problem, dtype: torch.dtype, device: torch.device, impl: Impl) -> list[str]:
    named = [Backend.CUDA] if impl is Impl.CUDA else backends.ASKED[impl]
    asked = (backends.why_not(question, b, dtype, device) for b in named)
    return [reason for reason in asked if reason] or [f"it has no plan for {question}"]


def _unchecked(
    question: Problem,
    dtype: torch.dtype,
    device: torch.device,
    keep: Keep | None,
    impl: Impl,
    reason: CannotVerifyNow,
) -> Settled:
    """The library's plans, for this once; nothing of it is remembered."""
    text = f"not checked yet, and {reason}"
    if impl is not Impl.AUTO:
        raise RuntimeError(f"impl={impl.value!r} cannot serve: {text}")
    rows = settled(question, dtype, device, keep, Impl.ATEN).rows
    return Settled(rows, [f"triton, cuda: {text}"])
