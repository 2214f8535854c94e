"""Plans against plans: what is measured, who wins, and that luck does not."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

from fused_lora.bench import main
from fused_lora.bench.clock import Step
from fused_lora.bench.shapes import SHAPES, ModelShape, grid
from fused_lora.bench.suites import plan_choice_trial
from fused_lora.bench.suites.plan_choice import cases, summary
from fused_lora.bench.suites.plan_choice_trial import (
    LIMIT,
    MIN_ROUNDS,
    NEAR,
    candidates,
    may_win,
    sweep,
)
from fused_lora.plan.choose import ranked
from fused_lora.plan.problem import Problem, known, unmeasured
from fused_lora.plan.strategies import STRATEGIES
from fused_lora.types import Backend, Forward, Gradient, Span


class NoisyClock:
    """Costs by name, on a machine whose speed drifts by a factor of two and scatters by 10 %."""

    def __init__(self, costs_ms: dict[str, float]) -> None:
        self.costs_ms, self.seconds, self.random = costs_ms, 0.0, random.Random(0)
        self.ran = ""

    def now(self) -> float:
        return self.seconds

    def measure_ms(self, step: Step) -> float:
        step()
        drift = 1 + (self.seconds % 1.0)
        took = self.costs_ms[self.ran] * drift * self.random.gauss(1, 0.1)
        self.seconds += took / 1e3
        return took

    def steps(self) -> dict[str, Step]:
        def step(name: str) -> Step:
            return lambda: setattr(self, "ran", name)

        return {name: step(name) for name in self.costs_ms}


def question(m: int = 1576, rank: int = 64, dtype: str = "float32") -> Problem:
    return Problem(m, 768, 768, (Span(0, 768, rank),), dtype)


def test_the_grid_is_that_of_vit_s_and_vit_b() -> None:
    found = list(cases(grid("plan_choice", "cpu")))
    assert len(found) == 8 * 2 * 6
    shapes = {(case.k, case.n, case.groups) for case in found}
    for width in (384, 768):
        assert {(width, width, 1), (width, 3 * width, 3)} <= shapes
        assert {(width, 4 * width, 1), (4 * width, width, 1)} <= shapes
    assert {case.m for case in found} == {197, 1576}


@pytest.mark.parametrize(("m", "rank"), list(product((197, 1576), (4, 128, 512))))
def test_every_strategy_is_measured(m: int, rank: int) -> None:
    plans = [row.plan for row in ranked(question(m, rank), unmeasured("cpu", "float32"))]
    found = candidates(plans)
    assert found[0] is plans[0] and len(set(found)) == len(found) <= LIMIT + 5
    every = set(STRATEGIES[Backend.ATEN]) - {Forward.OPEN}  # which is of chains
    assert {plan.forward for plan in found} == {plan.dx for plan in found} == every
    assert {plan.gradient for plan in found} == {Gradient.RANK, Gradient.FULL}
    near = [plan for plan in plans if plan.time_us <= NEAR * plans[0].time_us]
    assert set(near[:LIMIT]) <= set(found)


def test_precision_goes_before_speed_in_16_bits() -> None:
    limits = known("NVIDIA H200", "bfloat16")
    assert limits
    low = question(25216, 16, "bfloat16")
    chosen, *others = (row.plan for row in ranked(low, limits))
    for plan in others:
        merges = Forward.MERGE in (plan.forward, plan.dx)
        twice = plan.forward is Forward.SEPARATE and chosen.forward is Forward.BORDERED
        assert may_win(low, chosen, plan) == (not merges and not twice)
        assert may_win(question(), chosen, plan)


def test_a_tie_is_no_win() -> None:
    """Ten equal plans in noise: the luckiest must not look faster than the chosen one."""
    clock = NoisyClock({f"plan {i}": 10.0 for i in range(10)})
    held = sweep(clock.steps(), "plan 0", list(clock.costs_ms), clock, budget_s=8.0)
    assert 0.95 < held.over_best(list(clock.costs_ms)) < 1.05


def test_a_faster_plan_is_found_and_slow_ones_drop_out() -> None:
    clock = NoisyClock({"chosen": 12.0, "best": 10.0, "slow": 40.0, "floor": 5.0})
    eligible = ["chosen", "best", "slow"]
    held = sweep(clock.steps(), "chosen", eligible, clock, budget_s=4.0)
    assert held.best(eligible) == "best"
    assert held.over_best(eligible) == pytest.approx(1.2, rel=0.06)
    assert held.ratio("floor") == pytest.approx(5 / 12, rel=0.06)
    assert len(held.ratios("slow")) == 1 and held.rounds >= MIN_ROUNDS
    assert held.rounds % 2 == 0


def test_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "vit_small_patch16_224", ModelShape("tiny", 24, 5))
    argv = ["--suite", "plan_choice", "--models", "vit_small_patch16_224", "--ranks", "2,8"]
    argv += ["--batch", "2", "--budget-seconds", "0.1", "--device", "cpu"]
    assert main([*argv, "--rows", str(tmp_path)]) == 0
    found = list(plan_choice_trial.read(tmp_path))
    assert len(found) == 8 and plan_choice_trial.newest(found + found) == found
    assert all(0 < each.margin <= 1 for row in found for each in row.candidates)
    assert summary(found) in capsys.readouterr().out
