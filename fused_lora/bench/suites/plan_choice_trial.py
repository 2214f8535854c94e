"""One case of plan_choice: the plans that may win, compared with float64, timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil, sqrt
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fused_lora.bench.clock import Clock, Step, Times
from fused_lora.bench.provenance import Provenance
from fused_lora.bench.rows import JsonRow, read_as
from fused_lora.bench.rows import newest as latest
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.ops import measured
from fused_lora.ops.lora_linear import backward, forward
from fused_lora.ops.planning import checked_plans
from fused_lora.plan.problem import Ceilings, Problem
from fused_lora.plan.strategies import ROUNDS_ONCE
from fused_lora.plan.timing import standard_error
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import Comparison, in_every_order, judge
from fused_lora.types import Forward, Impl, Keep, Plan

SUITE = "plan_choice"


@dataclass(frozen=True)
class PlanCase:
    """One linear and its adapters."""

    suite: str
    m: int
    k: int
    n: int
    groups: int  # adapters on equal column ranges
    rank: int  # of each
    dtype: str

    def __str__(self) -> str:
        grouped = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.m} x {self.k} -> {self.n}{grouped}, rank {self.rank}, {self.dtype}"


@dataclass(frozen=True)
class Candidate:
    """One plan, measured."""

    plan: str  # forward/dx/gradient/keep
    estimate_us: float  # the cost model's
    rounds: int  # fewer than the case's where it was dropped as clearly slower
    median_ms: float
    q1_ms: float
    q3_ms: float
    ratio: float  # median over rounds of its time over the chosen plan's in the same round
    margin: float  # its worst error over the limit of that error; at most 1
    may_win: bool  # False where the plan's precision rules forbid it


@dataclass(frozen=True)
class PlanRow(JsonRow):
    """One case, measured."""

    case: PlanCase
    chosen: str
    best: str  # by the median ratio, among those that may win
    ratio: float  # chosen over best; the best found in half the rounds, the ratio in the others
    over_frozen: float  # chosen over the frozen layer's forward and dx
    rounds: int
    candidates: list[Candidate]
    ceilings: Ceilings  # what the estimates were made with
    provenance: Provenance
    by: str = "model"  # how it was chosen: model, or measure (FUSED_LORA_PLAN)

    def of(self, plan: str) -> Candidate:
        """The candidate called ``plan``."""
        return next(each for each in self.candidates if each.plan == plan)


def read(folder: Path) -> Iterator[PlanRow]:
    """Every row of this suite below ``folder``."""
    return read_as(folder, [SUITE], PlanRow)


def newest(rows: Iterable[PlanRow]) -> list[PlanRow]:
    """The latest row of each device, way to choose, and case."""
    return latest(rows, lambda row: (row.provenance.device, row.by, row.case))


Outcome = Mapping[str, Tensor]  # y, dx, and da, db of all adapters end to end


class CheckedLinear:
    """Random operands of ``question``, seeded, and its truth in float64."""

    def __init__(self, question: Problem, device: str) -> None:
        self.question, self.dtype = question, getattr(torch, question.dtype)
        self.device, self._generator = device, torch.Generator().manual_seed(0)
        m, k, n = question.m, question.k, question.n
        self.x, self.dy = self._draw(m, k), self._draw(m, n)
        self.w, self.bias = self._draw(n, k, std=k**-0.5), self._draw(n)
        a = [self._draw(span.rank, k, std=k**-0.5, dtype=torch.float32) for span in question.spans]
        b = [
            self._draw(span.width, span.rank, std=0.1 * span.rank**-0.5, dtype=torch.float32)
            for span in question.spans
        ]
        self.adapters = Adapters(a, b, [1.0] * len(a), question.spans)
        self.truth = self._by_equations(torch.float64)
        self.plain = in_every_order(lambda: self._by_equations(self.dtype))

    def _draw(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) * std
        return drawn.bfloat16().to(self.device, dtype or self.dtype)  # exact in every dtype

    def _by_equations(self, dtype: torch.dtype) -> Outcome:
        w, x, bias = (tensor.to(dtype) for tensor in (self.w, self.x, self.bias))
        adapters = self.adapters.to(dtype)
        y = reference.forward(x, w, bias, *adapters)
        grads = reference.backward(self.dy.to(dtype), x, w, *adapters, self.question.needs)
        return _outcome(y, grads)

    def run(self, plan: Plan) -> tuple[Tensor, Grads]:
        """Forward and backward by ``plan``; what the clock sees."""
        y, kept = forward(self.x, self.w, self.bias, self.adapters, plan, Impl.AUTO)
        w = None if plan.keep is Keep.MERGED else self.w
        needs = self.question.needs
        return y, backward(self.dy, self.x, kept, w, self.adapters, needs, plan, Impl.AUTO)

    def run_frozen(self) -> tuple[Tensor, Tensor]:
        """The frozen layer's y and dx: the floor."""
        return torch.addmm(self.bias, self.x, self.w.t()), self.dy @ self.w

    def judge(self, plan: Plan) -> list[Comparison]:
        """The verdict on every result of ``plan``; it has run once after this."""
        found = _outcome(*self.run(plan))
        return [
            judge(name, found[name], [run[name] for run in self.plain], true, self.dtype)
            for name, true in self.truth.items()
        ]


def _outcome(y: Tensor, grads: Grads) -> Outcome:
    assert grads.x is not None
    a, b = ([each.flatten() for each in part if each is not None] for part in (grads.a, grads.b))
    return {"y": y, "dx": grads.x, "da": torch.cat(a), "db": torch.cat(b)}


NEAR = 1.5  # estimates up to so many times the chosen one's are measured
LIMIT = 10  # plans near the chosen one, itself included


def candidates(ranked: Sequence[Plan]) -> list[Plan]:
    """The chosen plan (first of ``ranked``), those near it, and the cheapest of every strategy.

    The last are there to show an estimate that is badly wrong.
    """
    chosen, *others = ranked
    near = [plan for plan in others if plan.time_us <= NEAR * chosen.time_us]
    found = [chosen, *near[: LIMIT - 1]]
    strategies: tuple[Callable[[Plan], str], ...] = (
        lambda plan: plan.forward,
        lambda plan: plan.dx,
        lambda plan: f"{plan.gradient_backend}:{plan.gradient}",
    )
    for strategy in strategies:
        for plan in others:
            if strategy(plan) not in map(strategy, found):
                found.append(plan)
    return found


def may_win(question: Problem, chosen: Plan, plan: Plan) -> bool:
    """Whether ``plan`` could have been chosen: in 16 bits, precision goes before speed."""
    if not question.low_precision or _merges(chosen):
        return True
    return not _merges(plan) and plan.forward in (chosen.forward, *ROUNDS_ONCE)


def _merges(plan: Plan) -> bool:
    return Forward.MERGE in (plan.forward, plan.dx)


# Which plan is faster, on a machine whose speed drifts and without the winner's curse.
#
# Every round times all plans in turn, and only ratios within a round are compared. Plans that are
# clearly slower drop out early. The best plan is found in one half of the rounds and compared with
# the chosen one in the other half, and the other way round.


DROP = {1: 1.6, 2: 1.3, 4: 1.15}  # after so many rounds, plans never faster than so many times
MIN_ROUNDS, MAX_ROUNDS = 6, 60  # even, so that both halves see every order
SETTLED = 0.01  # standard error of the median ratio that is small enough
RIVAL = 1.10  # ratios below it are worth settling


@dataclass
class Sweep:
    """The durations of every step, one a round, for as long as it was timed."""

    chosen: str
    samples_ms: dict[str, list[float]]
    alive: list[str]

    @property
    def rounds(self) -> int:
        """Rounds of those that stayed."""
        return len(self.samples_ms[self.chosen])

    def ratios(self, name: str, half: int | None = None) -> list[float]:
        """Time of ``name`` over that of the chosen plan, round by round; of every second round."""
        pairs = zip(self.samples_ms[name], self.samples_ms[self.chosen], strict=False)
        found = [mine / theirs for mine, theirs in pairs]
        return found if half is None else found[half::2]

    def ratio(self, name: str) -> float:
        """The median of them."""
        return median(self.ratios(name))

    def times(self, name: str) -> Times:
        """The durations of ``name``."""
        return Times(tuple(self.samples_ms[name]))

    def best(self, eligible: Collection[str], half: int | None = None) -> str:
        """The eligible step with the smallest median ratio."""
        stayed = [name for name in self.alive if name in eligible]
        return min(stayed, key=lambda name: median(self.ratios(name, half)))

    def over_best(self, eligible: Collection[str]) -> float:
        """The chosen plan's time over the best one's, the best found in the other half."""
        halves = [1 / median(self.ratios(self.best(eligible, half), 1 - half)) for half in (0, 1)]
        return sqrt(halves[0] * halves[1])

    def settled(self, eligible: Collection[str]) -> bool:
        """Whether the ratio of every close rival is known well enough."""
        rivals = [name for name in self.alive if name in eligible and name != self.chosen]
        close = [self.ratios(name) for name in rivals if self.ratio(name) < RIVAL]
        return all(standard_error(ratios) < SETTLED for ratios in close)

    def drop_slow(self, eligible: Collection[str]) -> None:
        """Drop the plans that were never within reach of the best so far."""
        limit = DROP.get(self.rounds)
        if limit is None:
            return
        reach = limit * min(self.ratio(name) for name in self.alive if name in eligible)
        slow = {name for name in self.alive if min(self.ratios(name)) > reach}
        self.alive = [name for name in self.alive if name not in slow or name == self.chosen]


def sweep(
    steps: Mapping[str, Step],
    chosen: str,
    eligible: Collection[str],
    clock: Clock,
    budget_s: float,
) -> Sweep:
    """Time ``steps``, until every close ratio to ``chosen`` is settled or the budget is spent."""
    held = Sweep(chosen, {name: [] for name in steps}, list(steps))
    begin = clock.now()
    while held.rounds < MAX_ROUNDS:
        spent = clock.now() - begin
        even = held.rounds >= MIN_ROUNDS and held.rounds % 2 == 0
        if even and (spent >= budget_s or held.settled(eligible)):
            break
        turn = held.rounds // 2 % len(held.alive)
        for name in held.alive[turn:] + held.alive[:turn]:
            held.samples_ms[name].append(clock.measure_ms(steps[name]))
        held.drop_slow(eligible)
    return held


FROZEN = "frozen"  # timed among the plans, as the floor
SAMPLE_MS = 3.0  # a step that is shorter is repeated within a sample


class Trial:
    """One case; ``row`` measures it."""

    def __init__(self, case: PlanCase, question: Problem, ceilings: Ceilings, device: str) -> None:
        self.case, self.question, self.ceilings, self.device = case, question, ceilings, device

    @cached_property
    def plans(self) -> list[Plan]:
        """The plans to measure, the chosen one first."""
        return candidates(checked_plans(self.question, self.device))

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
        subject = CheckedLinear(self.question, self.device)
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
        held = sweep(repeated, str(self.chosen), eligible, clock, left_s)
        gc.collect()
        return self._record(held, repeats, eligible, margins, origin), wrong

    def _may_win(self, plan: Plan) -> bool:
        return may_win(self.question, self.chosen, plan)

    def _judge(self, subject: CheckedLinear) -> tuple[dict[str, float], list[str]]:
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
        held: Sweep,
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
            by="measure" if measured.times_plans(torch.device(self.device)) else "model",
        )


def _candidate(held: Sweep, plan: Plan, repeats: int, margin: float, eligible: bool) -> Candidate:
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
