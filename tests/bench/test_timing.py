"""The timing loop under a clock that only moves when a step says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fused_lora.bench.clock import Times, interleave


class FakeClock:
    """Every step costs the seconds it was made with."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.ran: list[str] = []

    def now(self) -> float:
        return self.seconds

    def step(self, name: str, cost_s: float) -> Callable[[], None]:
        def run() -> None:
            self.seconds += cost_s
            self.ran.append(name)

        return run

    def measure_ms(self, step: Callable[[], None]) -> float:
        begin = self.seconds
        step()
        return (self.seconds - begin) * 1e3


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_rounds_interleave_and_rotate(clock: FakeClock) -> None:
    steps = {name: clock.step(name, 1.0) for name in "abc"}
    interleave(steps, clock, budget_s=0.0, min_rounds=3)
    assert "".join(clock.ran) == "abc" + "bca" + "cab"


def test_minimum_holds_without_budget_and_budget_is_not_overrun(clock: FakeClock) -> None:
    steps = {"a": clock.step("a", 1.0), "b": clock.step("b", 2.0)}
    assert len(interleave(steps, clock, 0.0, min_rounds=2)["a"].samples_ms) == 2
    clock.seconds = 0.0
    assert len(interleave(steps, clock, 16.0, min_rounds=2)["a"].samples_ms) == 5
    assert clock.seconds == 15.0


def test_maximum_holds(clock: FakeClock) -> None:
    times = interleave({"a": clock.step("a", 1e-9)}, clock, 1e3, max_rounds=7)
    assert len(times["a"].samples_ms) == 7


def test_warmup_is_not_counted(clock: FakeClock) -> None:
    times = interleave({"a": clock.step("a", 1.0)}, clock, 0.0, min_rounds=1, warmup=2)
    assert len(clock.ran) == 3 and times["a"].samples_ms == (1000.0,)


def test_statistics() -> None:
    times = Times((4.0, 1.0, 2.0, 3.0, 100.0))
    assert times.median_ms == 3.0
    assert times.quartiles_ms == (2.0, 4.0)
    assert Times((5.0,)).quartiles_ms == (5.0, 5.0)


def test_ratio_pairs_the_rounds() -> None:
    slow_machine_in_round_two = Times((2.0, 40.0, 2.0)), Times((1.0, 10.0, 1.0))
    assert Times.over(*slow_machine_in_round_two) == 2.0
