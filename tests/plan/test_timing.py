"""The race of plans: rounds of turns, ratios within a round, and who drops out when."""

from __future__ import annotations

from random import Random

import pytest

from fused_lora.plan.timing import standard_error, time_candidates

PLANS = {"a": ("f1", "b1"), "b": ("f1", "b2"), "c": ("f2", "b1"), "d": ("f2", "b3")}
TRUE = {"f1": 10.0, "f2": 12.0, "f3": 17.0, "b1": 20.0, "b2": 18.0, "b3": 90.0}


class Machine:
    """Parts take their true time, times what the machine does in a round."""

    def __init__(self, pace=lambda call: 1.0):
        self.pace, self.calls = pace, []

    def time_us(self, part):
        self.calls.append(part)
        return TRUE[part] * self.pace(len(self.calls))


def test_a_plan_takes_what_its_parts_take():
    found = time_candidates(PLANS, Machine().time_us, 5)
    assert found == pytest.approx({"a": 30.0, "b": 28.0, "c": 32.0, "d": 102.0})


def test_a_part_that_is_shared_is_timed_once_a_round():
    machine = Machine()
    time_candidates({"a": ("f1", "b1"), "b": ("f1", "b2")}, machine.time_us, 3)
    assert len(machine.calls) == 3 * 3


def test_what_is_far_behind_drops_out_and_its_own_parts_with_it():
    machine = Machine()
    time_candidates(PLANS, machine.time_us, 6)
    assert machine.calls.count("b3") == 2 and machine.calls.count("f2") == 6


def test_the_first_stays_however_slow():
    machine = Machine()
    found = time_candidates({"d": PLANS["d"], "a": PLANS["a"]}, machine.time_us, 4)
    assert found == pytest.approx({"d": 102.0, "a": 30.0})
    assert machine.calls.count("b3") == 4


def test_a_machine_that_slows_down_between_rounds_changes_no_order():
    machine = Machine(lambda call: 2.0 if call > 8 else 1.0)  # after two rounds of four parts
    found = time_candidates({name: PLANS[name] for name in "abc"}, machine.time_us, 6)
    assert min(found, key=found.get) == "b"
    assert found["b"] / found["a"] == pytest.approx(28 / 30)


def test_one_bad_reading_changes_nothing():
    machine = Machine(lambda call: 9.0 if call == 6 else 1.0)
    found = time_candidates({name: PLANS[name] for name in "abc"}, machine.time_us, 5)
    assert found == pytest.approx({"a": 30.0, "b": 28.0, "c": 32.0})


def test_a_close_rival_is_timed_until_the_ratio_is_settled():
    plans = {"a": PLANS["a"], "b": PLANS["b"], "e": ("f3", "b2"), "d": PLANS["d"]}
    draw = Random(0)
    steady, restless = Machine(), Machine(lambda call: draw.uniform(0.9, 1.1))
    time_candidates(plans, steady.time_us, 6, 40)
    time_candidates(plans, restless.time_us, 6, 40)
    assert steady.calls.count("b2") == 6 < restless.calls.count("b2") <= 40
    assert restless.calls.count("f3") == 6  # e is not close: 35 to 28


def test_rounds_have_an_end_however_restless_the_machine():
    machine = Machine(lambda call: 1.0 + call % 2)
    time_candidates({"a": PLANS["a"], "b": PLANS["b"]}, machine.time_us, 6, 10)
    assert machine.calls.count("f1") == 10


def test_the_standard_error_of_a_median_shrinks_with_the_root_of_what_it_is_of():
    values = [1.0, 1.1, 1.2, 1.3]
    assert standard_error(values) == pytest.approx(0.93 * 0.15 / 2)
    assert standard_error(values * 4) < standard_error(values)
