"""One case from start to finish: build, judge against float64, count bytes, time, record."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace

from torch import nn

from fused_lora.bench import gate
from fused_lora.bench.clock import Step, clock_for, host_ms
from fused_lora.bench.graph import recorded
from fused_lora.bench.judge import Judge, install
from fused_lora.bench.phases import Phases
from fused_lora.bench.provenance import Provenance
from fused_lora.bench.registry import Contender
from fused_lora.bench.roofline import Roof
from fused_lora.bench.rows import Case, Refusal, Row
from fused_lora.bench.saved import SavedBytes, WideCopies, step_peak_bytes
from fused_lora.bench.timing import Times, interleave
from fused_lora.bench.workload import Workload, share

Tell = Callable[[str], None]


@dataclass
class Entrant:
    """A contender built for one case, and what is known of it before it is timed."""

    contender: Contender
    model: nn.Module
    step: Callable[..., None]  # what the clock sees
    errors: gate.Errors
    yardstick: gate.Errors
    saved_bytes: int = 0
    saved_bytes_per_block: int | None = None
    block_parts: tuple[int, int] = (0, 0)  # of that: fp32, and copies of weights
    wide_copies: int = 0
    peak_bytes: int | None = None
    host_work: tuple[int | None, int | None] = (None, None)  # Python calls, dispatched operations
    host_ms: float | None = None


def enter(contender: Contender, workload: Workload, judge: Judge, phases: Phases) -> Entrant:
    """Build ``contender``, judge it, and count what it keeps; its step has run once after this."""
    base = workload.base
    with phases.of("build"):
        model = copy.deepcopy(base) if contender.owns_weights else share(base)
        model = install(contender, model, judge.rank)
        step = step_of(workload, model)
    with phases.of("judge"):
        entrant = Entrant(contender, model, step, *judge.errors(contender, model))
    with phases.of("count"):
        count(entrant, workload)
        if workload.counts_host:
            from fused_lora.bench.suites.host import host_work

            trained = [*model.parameters(), *workload.inputs]
            entrant.host_work = host_work(entrant.step, trained)
    return entrant


def count(entrant: Entrant, workload: Workload) -> None:
    """One watched step: what the forward pass keeps and copies, and what the step allocates."""
    sections = list(workload.sections(entrant.model))
    saved = SavedBytes(entrant.model, workload.excluded(), sections)
    wide = WideCopies(workload.activation)
    with ExitStack() as watch:
        if workload.dtype != "fp32":  # there, no copy can widen
            watch.enter_context(wide)
        watch.enter_context(saved)
        entrant.step(watch)
    entrant.saved_bytes, entrant.wide_copies = saved.total, wide.count
    if sections:
        middle = str(len(sections) // 2)
        entrant.saved_bytes_per_block = saved.by_section[middle]
        entrant.block_parts = saved.fp32_by_section[middle], saved.weights_by_section[middle]
    entrant.peak_bytes = step_peak_bytes(entrant.step, workload.device)


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
    phases: Phases,
    budget_s: float,
    origin: Provenance,
    tell: Tell = lambda words: None,
    roof: Roof | None = None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure ``contenders`` in ``case``: rows of those that pass the gate, refusals of others.

    The budget covers everything, but rounds have a minimum; ``phases`` is told where it went.
    """
    begin = phases.clock.now()
    judge, entrants, refusals = Judge(workload, case.rank), {}, []
    for contender in contenders:
        tell(f"{case}: judging {contender.name}")
        try:
            entrant = enter(contender, workload, judge, phases)
        except Exception as error:  # told and counted as a failure; the others still race
            words = f"{type(error).__name__}: {error}"
            refusals.append(Refusal(case, contender.name, words))
            continue
        if wrong := gate.complaints(entrant.errors, entrant.yardstick, case.dtype):
            refusals.append(Refusal(case, contender.name, "; ".join(wrong)))
            continue
        entrants[contender.name] = entrant
    steps: dict[str, Step] = {name: entrant.step for name, entrant in entrants.items()}
    if case.mode == "graph":
        with phases.of("record"):
            steps = _recorded(steps, case, refusals)
    clock = clock_for(workload.device, cold=True) if case.cache == "cold" else phases.clock
    left_s = budget_s - (phases.clock.now() - begin)
    with phases.of("time"):
        times = interleave(steps, clock, left_s, tell=lambda name: tell(f"{case}: timing {name}"))
    if case.mode == "eager" and workload.device.startswith("cuda"):
        for entrant in entrants.values():
            entrant.host_ms = host_ms(entrant.step)
    linears = workload.linears(case.rank)
    least_ms = roof.least_ms(linears, workload.compute.itemsize) if roof and linears else None
    rows = [record(case, entrants[name], times, origin) for name in times]
    return [replace(row, roofline_ms=least_ms) for row in rows], refusals


def _recorded(steps: dict[str, Step], case: Case, refusals: list[Refusal]) -> dict[str, Step]:
    """The replays of those that can be recorded as a graph."""
    replays = {}
    for name, step in steps.items():
        try:
            replays[name] = recorded(step)
        except Exception as error:  # told, as in judging
            refusals.append(Refusal(case, name, f"{type(error).__name__}: {error}"))
    return replays


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
        host_ms=entrant.host_ms,
        python_calls=entrant.host_work[0],
        operations=entrant.host_work[1],
    )
