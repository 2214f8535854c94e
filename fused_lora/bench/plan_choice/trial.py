"""One case from question to row: the plans, their correctness, their times."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cached_property, partial
from math import ceil

from fused_lora.bench.clock import Clock, Step
from fused_lora.bench.plan_choice.contest import Contest, contest
from fused_lora.bench.plan_choice.entrants import entrants, may_win
from fused_lora.bench.plan_choice.rows import Candidate, PlanCase, PlanRow
from fused_lora.bench.plan_choice.subject import Subject
from fused_lora.bench.provenance import Provenance
from fused_lora.ops.planning import checked_plans
from fused_lora.plan.device import Ceilings
from fused_lora.plan.problem import Problem
from fused_lora.types import Plan

FROZEN = "frozen"  # timed among the plans, as the floor
SAMPLE_MS = 3.0  # a step that is shorter is repeated within a sample


class Trial:
    """One case; ``row`` measures it."""

    def __init__(self, case: PlanCase, question: Problem, ceilings: Ceilings, device: str) -> None:
        self.case, self.question, self.ceilings, self.device = case, question, ceilings, device

    @cached_property
    def plans(self) -> list[Plan]:
        """The plans to measure, the chosen one first."""
        return entrants(checked_plans(self.question, self.device))

    @property
    def chosen(self) -> Plan:
        """The plan that the library would take."""
        return self.plans[0]

    def row(self, clock: Clock, budget_s: float, origin: Provenance) -> tuple[PlanRow, list[str]]:
        """The measured case, and a sentence for each plan that was refused.

        Raises:
            RuntimeError: the chosen plan itself is wrong.
        """
        begin = clock.now()
        subject = Subject(self.question, self.device)
        margins, wrong = self._judge(subject)
        steps = {
            str(plan): _freed(partial(subject.run, plan))
            for plan in self.plans
            if str(plan) in margins
        }
        steps[FROZEN] = _freed(subject.run_frozen)
        repeats = self._repeats(steps, clock)
        repeated = {name: _repeated(step, repeats) for name, step in steps.items()}
        eligible = [str(plan) for plan in self.plans if self._may_win(plan)]
        left_s = budget_s - (clock.now() - begin)
        held = contest(repeated, str(self.chosen), eligible, clock, left_s)
        gc.collect()
        return self._record(held, repeats, eligible, margins, origin), wrong

    def _may_win(self, plan: Plan) -> bool:
        return may_win(self.question, self.chosen, plan)

    def _judge(self, subject: Subject) -> tuple[dict[str, float], list[str]]:
        margins, wrong = {}, []
        for plan in self.plans:
            verdicts = subject.judge(plan)
            if all(verdict.passed for verdict in verdicts):
                margins[str(plan)] = max(v.ours / v.budget for v in verdicts)
            else:
                wrong.append(f"{plan} refused: {'; '.join(map(str, verdicts))}")
        if str(self.chosen) not in margins:
            raise RuntimeError(f"{self.case}: the chosen plan is wrong: {wrong[0]}")
        return margins, wrong

    def _repeats(self, steps: dict[str, Step], clock: Clock) -> int:
        return ceil(SAMPLE_MS / max(clock.measure_ms(steps[str(self.chosen)]), 1e-3))

    def _record(
        self,
        held: Contest,
        repeats: int,
        eligible: list[str],
        margins: dict[str, float],
        origin: Provenance,
    ) -> PlanRow:
        candidates = [
            _candidate(held, plan, repeats, margins[str(plan)], str(plan) in eligible)
            for plan in self.plans
            if str(plan) in margins
        ]
        return PlanRow(
            case=self.case,
            chosen=str(self.chosen),
            best=held.best(eligible),
            ratio=held.over_best(eligible),
            over_frozen=1 / held.ratio(FROZEN),
            rounds=held.rounds,
            candidates=candidates,
            ceilings=self.ceilings,
            provenance=origin,
        )


def _candidate(held: Contest, plan: Plan, repeats: int, margin: float, eligible: bool) -> Candidate:
    name = str(plan)
    times = held.times(name)
    first, third = times.quartiles_ms
    return Candidate(
        plan=name,
        estimate_us=plan.time_us,
        rounds=len(times.samples_ms),
        median_ms=times.median_ms / repeats,
        q1_ms=first / repeats,
        q3_ms=third / repeats,
        ratio=held.ratio(name),
        margin=margin,
        may_win=eligible,
    )


def _freed(call: Callable[[], object]) -> Step:
    def run() -> None:
        call()  # what it made is freed within its time

    return run


def _repeated(step: Step, times: int) -> Step:
    def run() -> None:
        for _ in range(times):
            step()

    return run
