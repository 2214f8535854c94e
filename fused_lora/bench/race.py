"""One case from start to finish: build, judge against float64, count bytes, time, record."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_lora.bench import gate
from fused_lora.bench.adapters import copy_adapters, initial_values
from fused_lora.bench.clock import Clock, Step
from fused_lora.bench.provenance import Provenance
from fused_lora.bench.registry import CONTENDERS, Contender
from fused_lora.bench.rows import Case, Refusal, Row
from fused_lora.bench.saved import SavedBytes, WideCopies, step_peak_bytes
from fused_lora.bench.timing import Times, interleave
from fused_lora.bench.workload import Workload, share

GATE_BATCH = 1  # images the float64 run is given: its cost is twice that of everything judged
YARDSTICKS = {"separate": "naive", "joint": "naive_joint"}

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


class Judge:
    """The float64 truth and naive LoRA's own error, computed once for each form."""

    def __init__(self, workload: Workload, rank: int) -> None:
        self.workload, self.rank = workload, rank
        self._known: dict[str, tuple[gate.Outcome, gate.Errors]] = {}

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The first images of the workload, as leaves of their own."""
        parts = [x[:GATE_BATCH].detach() for x in self.workload.inputs]
        return [part.to(dtype or part.dtype, copy=True) for part in parts]

    def of(self, form: str) -> tuple[gate.Outcome, gate.Errors]:
        """Truth and yardstick of ``form``."""
        if form not in self._known:
            naive = CONTENDERS[YARDSTICKS[form]]
            exact = install(naive, share(self.workload.exact), self.rank)
            truth = self.workload.outcome(exact, self.inputs(torch.float64), exact=True)
            plain = install(naive, share(self.workload.base), self.rank)
            found = self.workload.outcome(plain, self.inputs())
            self._known[form] = truth, gate.errors(found, truth)
        return self._known[form]

    def errors(self, contender: Contender, model: nn.Module) -> tuple[gate.Errors, gate.Errors]:
        """The errors of ``model`` and their yardstick; empty for one without adapters."""
        if contender.form not in YARDSTICKS:
            return {}, {}
        truth, yardstick = self.of(contender.form)
        return gate.errors(self.workload.outcome(model, self.inputs()), truth), yardstick

    def wide_copies(self, model: nn.Module) -> int:
        """fp32 copies of x in one forward pass; none can be in fp32."""
        if self.workload.dtype == "fp32":
            return 0
        shape = self.workload.shape
        with WideCopies(GATE_BATCH * shape.tokens * shape.width) as wide, self.workload.precision():
            self.workload.forward(model, self.inputs())
        return wide.count


def install(contender: Contender, model: nn.Module, rank: int) -> nn.Module:
    """Adapt ``model``, with the values every contender begins from."""
    if contender.form not in YARDSTICKS:
        return contender.install(model, rank)
    values = initial_values(model, rank, joint=contender.form == "joint")
    adapted = contender.install(model, rank)
    copy_adapters(values, adapted)
    return adapted


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
