"""One case from start to finish: build, judge against float64, count bytes, time, record."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from fused_lora.bench import gate
from fused_lora.bench.clock import Clock, Step
from fused_lora.bench.judge import Judge, install
from fused_lora.bench.provenance import Provenance
from fused_lora.bench.registry import Contender
from fused_lora.bench.rows import Case, Refusal, Row
from fused_lora.bench.saved import SavedBytes, step_peak_bytes
from fused_lora.bench.timing import Times, interleave
from fused_lora.bench.workload import Workload, share

Tell = Callable[[str], None]


@dataclass
class Entrant:
    """A contender built for one case, and what is known of it before it is timed."""

    contender: Contender
    model: nn.Module
    step: Step
    errors: gate.Errors
    yardstick: gate.Errors
    saved_bytes: int = 0
    saved_bytes_per_block: int | None = None
    wide_copies: int = 0
    peak_bytes: int | None = None


def enter(contender: Contender, workload: Workload, judge: Judge) -> Entrant:
    """Build ``contender``, judge it, and count what it keeps; its step has run once after this."""
    base = workload.base
    model = copy.deepcopy(base) if contender.owns_weights else share(base)
    model = install(contender, model, judge.rank)
    step = step_of(workload, model)
    entrant = Entrant(contender, model, step, *judge.errors(contender, model))
    sections = list(workload.sections(model))
    saved = SavedBytes(model, workload.excluded(), sections)
    step(saved)
    entrant.saved_bytes = saved.total
    if sections:
        entrant.saved_bytes_per_block = saved.by_section.get(str(len(sections) // 2), 0)
    entrant.wide_copies = judge.wide_copies(model)
    entrant.peak_bytes = step_peak_bytes(step, workload.device)
    return entrant


def step_of(workload: Workload, model: nn.Module) -> Callable[..., None]:
    """One whole step of ``model``: what the clock sees; ``watch`` is entered for its forward."""
    optimizer = workload.optimizer(model)

    def step(watch: AbstractContextManager | None = None) -> None:
        with watch or nullcontext(), workload.precision():
            outputs = workload.forward(model, workload.inputs)
        workload.backward(outputs)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def race(
    workload: Workload,
    case: Case,
    contenders: Sequence[Contender],
    clock: Clock,
    budget_s: float,
    origin: Provenance,
    tell: Tell = lambda words: None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure ``contenders`` in ``case``: rows of those that pass the gate, refusals of others."""
    judge, entrants, refusals = Judge(workload, case.rank), {}, []
    for contender in contenders:
        tell(f"{case}: judging {contender.name}")
        try:
            entrant = enter(contender, workload, judge)
        except Exception as error:  # told and counted as a failure; the others still race
            words = f"{type(error).__name__}: {error}"
            refusals.append(Refusal(case, contender.name, words))
            continue
        if wrong := gate.complaints(entrant.errors, entrant.yardstick, case.dtype):
            refusals.append(Refusal(case, contender.name, "; ".join(wrong)))
            continue
        entrants[contender.name] = entrant
    steps = {name: entrant.step for name, entrant in entrants.items()}
    times = interleave(steps, clock, budget_s, tell=lambda name: tell(f"{case}: timing {name}"))
    return [record(case, entrants[name], times, origin) for name in times], refusals


def record(case: Case, entrant: Entrant, times: dict[str, Times], origin: Provenance) -> Row:
    """The row of one entrant."""
    name = entrant.contender.name
    mine = times[name]

    def ratio(other: str) -> float | None:
        return mine.over(times[other]) if other in times else None

    first, third = mine.quartiles_ms
    return Row(
        case=case,
        contender=name,
        form=entrant.contender.form,
        rounds=len(mine.samples_ms),
        median_ms=mine.median_ms,
        q1_ms=first,
        q3_ms=third,
        ratio_frozen=ratio("frozen"),
        ratio_naive=ratio("naive"),
        ratio_peft=ratio("peft"),
        errors=entrant.errors,
        yardstick=entrant.yardstick,
        saved_bytes=entrant.saved_bytes,
        saved_bytes_per_block=entrant.saved_bytes_per_block,
        wide_copies=entrant.wide_copies,
        peak_bytes=entrant.peak_bytes,
        provenance=origin,
    )
