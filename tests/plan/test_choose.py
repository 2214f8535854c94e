"""The plan: which strategies win where, and that it needs integers alone."""

import dataclasses
import subprocess
import sys

import pytest

from fused_lora.plan import choose as choosing
from fused_lora.plan.choose import Step, steps, time_us
from fused_lora.plan.problem import Ceilings, Problem, known
from fused_lora.plan.strategies import candidates, keeps_x, why_not
from fused_lora.types import Forward, Gradient, Keep, Needs, Plan, Span

CPU = Ceilings("a small CPU", "float32", 150.0, 8.0, 20.0, 3.0, True)
H200 = known("NVIDIA H200", "bfloat16")


def problem(m=1576, k=768, n=768, rank=16, **more):
    return Problem(m, k, n, (Span(0, n, rank),), **more)


def test_the_plan_room_never_imports_torch():
    code = (
        "import sys, types; package = types.ModuleType('fused_lora');"
        "import importlib.util as u; spec = u.find_spec('fused_lora');"
        "package.__path__ = spec.submodule_search_locations; sys.modules['fused_lora'] = package;"
        "import fused_lora.plan.choose, fused_lora.plan.problem; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("rank", [4, 16, 32])
def test_small_ranks_take_rank_gradients(rank):
    assert choosing.choose(problem(rank=rank), CPU).gradient is Gradient.RANK


@pytest.mark.parametrize(("k", "n", "r_star"), [(384, 384, 96), (768, 768, 192), (768, 3072, 307)])
def test_full_wins_above_r_star_on_many_rows(k, n, r_star):
    """R* = KN / (2 (K + N)), where M is large enough for the merge not to matter."""
    ideal = dataclasses.replace(CPU, half_rank=1e-9, call_us=1e-9, bandwidth_gbs=1e9)
    below = choosing.choose(problem(10**6, k, n, r_star * 2 // 3), ideal)
    above = choosing.choose(problem(10**6, k, n, r_star * 3 // 2), ideal)
    assert below.gradient is Gradient.RANK
    assert above.gradient is Gradient.FULL


def test_a_lora_layer_never_costs_much_more_than_one_and_a_half_frozen_layers():
    ideal = dataclasses.replace(CPU, half_rank=1e-9, call_us=1e-9, bandwidth_gbs=1e9)
    for rank in (4, 64, 192, 512, 768):
        plan = choosing.choose(problem(10**6, rank=rank), ideal)
        frozen = 2 * Step("base", 10**6, 768, 768).time_us(4, ideal)
        assert plan.time_us <= 1.51 * frozen


def test_kept_bytes_never_exceed_those_of_h():
    for m, rank in [(10, 4), (197, 64), (1576, 512), (25216, 512)]:
        question = problem(m, rank=rank)
        for plan in candidates(question):
            if plan.keep is Keep.MERGED:
                assert question.n * question.k <= m * rank


def test_low_precision_merges_only_where_nothing_else_is_affordable():
    for rank in (4, 16, 64):
        plan = choosing.choose(problem(25216, rank=rank, dtype="bfloat16"), H200)
        assert Forward.MERGE not in (plan.forward, plan.dx)
    rows = choosing.ranked(problem(25216, rank=512, dtype="bfloat16"), H200)
    exact = [row.plan for row in rows if Forward.MERGE not in (row.plan.forward, row.plan.dx)]
    merged = rows[0].plan.forward is Forward.MERGE
    cheapest = min(row.plan.time_us for row in rows)
    assert merged == (cheapest * choosing.MERGE_GAIN < exact[0].time_us)


def test_low_precision_prefers_one_rounding_at_a_small_price():
    rows = choosing.ranked(problem(25216, n=2304, dtype="bfloat16"), H200)
    exact = [row.plan for row in rows if Forward.MERGE not in (row.plan.forward, row.plan.dx)]
    cheapest = min(plan.time_us for plan in exact)
    once = min(plan.time_us for plan in exact if plan.forward is Forward.BORDERED)
    expected = once <= cheapest * choosing.SIGNAL_PRICE
    assert (rows[0].plan.forward is Forward.BORDERED) == expected


def test_every_rejection_has_its_sentence():
    question = problem()
    plan = Plan(Forward.MERGE, Forward.MERGE, Gradient.RANK, Keep.HIDDEN)
    assert why_not(question, plan) == "the merged forward never forms h, so it has none to keep"
    plan = Plan(Forward.MERGE, Forward.MERGE, Gradient.FULL, Keep.MERGED)
    assert "[768, 768] is larger than h [1576, 16]" in why_not(question, plan)
    plan = Plan(Forward.SEPARATE, Forward.MERGE, Gradient.FULL, Keep.MERGED)
    assert why_not(question, plan) == "w' is kept only when forward and dx both use it"
    plan = Plan(Forward.SEPARATE, Forward.SEPARATE, Gradient.NONE, Keep.NOTHING)
    assert "exactly when an adapter operand needs one" in why_not(question, plan)
    plan = Plan(Forward.SEPARATE, Forward.SEPARATE, Gradient.FULL, Keep.HIDDEN)
    assert "only the rank-sized gradient of b" in why_not(question, plan)


def test_frozen_a_keeps_h_instead_of_x():
    question = problem(needs=Needs(a=False))
    for plan in candidates(question):
        assert plan.keep is Keep.HIDDEN
        assert not keeps_x(question.needs, plan)


def test_every_combination_of_needs_has_a_plan():
    for bits in range(32):
        needs = Needs(*(bool(bits >> i & 1) for i in range(5)))
        for m in (0, 1, 197, 25216):
            question = problem(m, needs=needs)
            plan = choosing.choose(question, CPU)
            assert plan.time_us == pytest.approx(time_us(question, plan, CPU))
            assert steps(question, plan)


def test_fixing_what_is_kept_narrows_the_choice():
    for keep in (Keep.NOTHING, Keep.HIDDEN):
        assert choosing.choose(problem(rank=64), CPU, keep).keep is keep


def test_traced_keep_depends_on_shapes_but_not_on_rows():
    keep = lambda p: choosing.traced_keep(p.k, p.spans, p.needs)  # noqa: E731
    assert keep(problem(1, rank=16)) is Keep.HIDDEN
    assert keep(problem(1, rank=256)) is Keep.NOTHING
    assert keep(problem(1, needs=Needs(b=False))) is Keep.NOTHING
    assert keep(problem(1, rank=256, needs=Needs(a=False))) is Keep.HIDDEN


def test_an_x_that_its_producer_places_is_not_copied():
    plan = Plan(Forward.BORDERED, Forward.SEPARATE, Gradient.RANK, Keep.HIDDEN)
    placed = {flag: steps(problem(bordered=flag), plan) for flag in (False, True)}
    assert [step for step in placed[False] if step.name != "copy x"] == placed[True]
    assert len(placed[False]) == len(placed[True]) + 1
