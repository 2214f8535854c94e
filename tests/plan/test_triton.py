"""Triton's strategies in the plan: made-up ceilings, integers alone."""

import dataclasses

import pytest

from fused_lora.plan import choose as choosing
from fused_lora.plan import cost_kernels
from fused_lora.plan.choose import Step, ranked, steps
from fused_lora.plan.problem import Ceilings, Problem
from fused_lora.plan.strategies import (
    ROUNDS_ONCE,
    by_library,
    candidates,
    fuses_activation,
    fuses_activation_grad,
    fuses_residual,
    why_not,
    why_not_backend,
    why_not_strategy,
)
from fused_lora.types import AdapterTraits, Backend, Forward, Gradient, Keep, Needs, Plan, Span

H200 = {  # rates as they may be measured, not the table's
    "bfloat16": Ceilings("an H200", "bfloat16", 790_000, 32.0, 4_300, 4.0, True),
    "float32": Ceilings("an H200", "float32", 50_000, 32.0, 4_300, 4.0, True),
}
BOTH = (Backend.ATEN, Backend.TRITON)
TRITON = (Backend.TRITON,)


def problem(rank=16, n=768, dtype="bfloat16", m=25216, groups=1, **more):
    width = n // groups
    spans = tuple(Span(g * width, g * width + width, rank) for g in range(groups))
    return Problem(m, 768, n, spans, dtype, **more)


def chosen(question, backends=BOTH, keep=None):
    limits = H200[question.dtype]
    return ranked(question, limits, keep, candidates(question, backends))[0].plan


@pytest.mark.parametrize(
    ("rank", "dtype", "expected"),
    [
        (16, "bfloat16", "triton:one_pass/one_pass/rank/hidden"),
        (64, "bfloat16", "triton:extended/extended/rank/hidden"),
        (256, "bfloat16", "separate/separate/rank/hidden"),
        (512, "bfloat16", "triton:merge/merge/full/merged"),
        (16, "float32", "merge/merge/rank/nothing"),
        (64, "float32", "merge/merge/rank/merged"),
        (256, "float32", "merge/merge/full/merged"),
        (512, "float32", "merge/merge/full/merged"),
    ],
)
def test_what_is_chosen_for_a_vit_b_projection(rank, dtype, expected):
    """With the efficiencies as they are guessed today; a measurement will move these."""
    assert str(chosen(problem(rank, dtype=dtype))) == expected


def test_a_slow_kernel_is_not_chosen_and_a_fast_one_is(monkeypatch):

    monkeypatch.setattr(cost_kernels, "TRITON_EFFICIENCY", 0.3)
    assert chosen(problem()).backend is Backend.ATEN
    monkeypatch.setattr(cost_kernels, "TRITON_EFFICIENCY", 1.0)
    assert all(chosen(problem(r)).backend is Backend.TRITON for r in (16, 64))


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_a_gelu_in_the_epilogue_outweighs_a_slower_product(rank):
    """fc1 and fc2 of ViT-B: nothing but what lies beside them is another."""
    fc1, fc2 = problem(rank, 3072), dataclasses.replace(problem(rank), k=3072)
    assert chosen(fc1).forward is not Forward.EXTENDED
    assert fuses_activation(chosen(dataclasses.replace(fc1, activated=True)))
    assert fuses_activation_grad(chosen(dataclasses.replace(fc2, input_activated=True)))


def test_what_is_no_part_of_a_pass_is_one_of_its_own():
    """GELU moves u and y, its slope dx, u and du; an epilogue moves u beside its product."""
    for plan in candidates(problem(activated=True, input_activated=True), BOTH):
        both = (problem(), problem(activated=True, input_activated=True))
        alone, beside = (steps(question, plan) for question in both)
        moved = sum(s.elements() for s in beside) - sum(s.elements() for s in alone)
        own = [s.name for s in beside if "gelu" in s.name]
        assert own == ["gelu"] * (not fuses_activation(plan)) + ["gelu grad"] * (
            not fuses_activation_grad(plan)
        )
        assert moved == 25216 * 768 * (
            (1 if fuses_activation(plan) else 2) + (1 if fuses_activation_grad(plan) else 3)
        )


def test_a_residual_is_a_pass_of_its_own_or_read_by_an_epilogue():
    """Of y, the residual and the sum; beside EXTENDED and ONE_PASS the residual alone."""
    for plan in candidates(problem(joined=True), BOTH):
        alone, beside = (steps(question, plan) for question in (problem(), problem(joined=True)))
        moved = sum(s.elements() for s in beside) - sum(s.elements() for s in alone)
        assert ("residual" in [s.name for s in beside]) != fuses_residual(plan)
        assert moved == 25216 * 768 * (1 if fuses_residual(plan) else 3)
    both = {plan.forward for plan in candidates(problem(), TRITON) if fuses_residual(plan)}
    assert both == {Forward.EXTENDED, Forward.ONE_PASS}


@pytest.mark.parametrize("linears", [1, 2, 3])
def test_linears_that_are_packed_together_share_a_launch(linears):
    """Of one operation: their calls are one, what they move stays."""
    question = problem(traits=AdapterTraits("float32"), packed_with=linears)
    for plan in candidates(question, TRITON):
        packs = [step for step in steps(question, plan) if step.name == "pack"]
        apart = dataclasses.replace(question, packed_with=1)
        whole = [step for step in steps(apart, plan) if step.name == "pack"]
        assert [linears * step.calls for step in packs] == [step.calls for step in whole]
        assert [step.elements() for step in packs] == [step.elements() for step in whole]


def test_without_a_gradient_of_x_there_is_no_slope():
    question = problem(needs=Needs(x=False), input_activated=True)
    for plan in candidates(question, BOTH):
        assert not [s.name for s in steps(question, plan) if "slope" in s.name]


@pytest.mark.parametrize("beside", ["activated", "input_activated"])
def test_the_library_is_chosen_as_it_was_but_for_what_precision_is_worth(beside):
    """Every one of its plans has the same passes beside it; the rules of 16 bits are shares."""
    for rank in (4, 16, 64, 256):
        for question in (problem(rank), problem(rank, dtype="float32")):
            told = dataclasses.replace(question, **{beside: True})
            plan, before = (chosen(q, (Backend.ATEN,)) for q in (told, question))
            finer = question.low_precision and plan.forward in ROUNDS_ONCE
            assert str(plan) == str(before) or finer


def test_one_rounding_is_worth_its_price_whoever_rounds():
    rows = ranked(problem(), H200["bfloat16"], None, candidates(problem(), BOTH))
    for row in rows[1:]:
        if row.plan.time_us < rows[0].plan.time_us:
            assert row.note == "rounds w' to 16 bits"
    assert rows[0].plan.forward in ROUNDS_ONCE


def test_extended_saves_the_passes_that_separate_makes():
    question = problem(groups=3, n=2304)
    both = [
        Plan(f, f, Gradient.RANK, Keep.HIDDEN, backend=b)
        for f, b in ((Forward.SEPARATE, Backend.ATEN), (Forward.EXTENDED, Backend.TRITON))
    ]
    names = [[step.name for step in steps(question, plan)] for plan in both]
    assert names[1] == [
        *("pack", "shrink", "extended", "pack", "dx shrink", "dx extended"),
        *("db", "db sums", "da", "da sums"),
    ]
    moved = [sum(step.elements() for step in steps(question, plan)) for plan in both]
    assert moved[1] < moved[0]


def test_flops_of_a_group_are_its_own():
    """A column of a fused qkv sees the ranks of its own third; every column of dx sees all."""
    question = problem(groups=3, n=2304)
    plan = Plan(Forward.EXTENDED, Forward.EXTENDED, Gradient.RANK, Keep.HIDDEN, 0.0, Backend.TRITON)
    found = {step.name: step for step in steps(question, plan)}
    assert found["extended"].k == 768 + 16
    assert found["dx extended"].k == 2304 + 48
    assert found["shrink"].flops == 2 * 25216 * 768 * 48


def test_one_pass_reads_x_once_and_shrinks_it_again_for_every_tile():
    plan = Plan(Forward.ONE_PASS, Forward.ONE_PASS, Gradient.RANK, Keep.HIDDEN, 0.0, Backend.TRITON)
    step = steps(problem(), plan)[0]
    base = Step("base", 25216, 768, 768)
    assert step.flops == base.flops + 2 * 25216 * 16 * (768 * 6 + 768)
    assert step.elements() == base.elements() + 25216 * 16


@pytest.mark.parametrize(
    "groups, dtype, held, packs",
    [
        *((1, "bfloat16", "float32", 2), (1, "bfloat16", "bfloat16", 0)),
        *((3, "bfloat16", "bfloat16", 2), (3, "float32", "float32", 0), (3, "tf32", "float32", 0)),
    ],
)
def test_adapters_are_packed_once_a_pass_where_products_cannot_read_them(
    groups, dtype, held, packs
):
    question = problem(groups=groups, n=2304, dtype=dtype, traits=AdapterTraits(held))
    for plan in candidates(question, TRITON):
        names = [step.name for step in steps(question, plan)]
        passes = [plan.forward is not Forward.MERGE]
        reads = plan.gradient is Gradient.RANK or plan.dx is not Forward.MERGE
        passes += [reads and not (passes[0] and plan.keep is Keep.NOTHING)]
        assert names.count("pack") == (sum(passes) if packs else 0)


@pytest.mark.parametrize("m, packs", [(3072, 1), (3071, 2)])
def test_what_is_packed_is_kept_where_it_is_no_larger_than_h(m, packs):
    question = problem(m=m, n=2304, traits=AdapterTraits("float32"))  # K + N = 3072
    for forward, most in ((Forward.EXTENDED, packs), (Forward.MERGE, 1)):
        plan = Plan(forward, Forward.EXTENDED, Gradient.RANK, Keep.NOTHING, 0.0, Backend.TRITON)
        names = [step.name for step in steps(question, plan)]
        assert names.count("pack") == most, (forward, names)


def test_a_kept_merge_is_not_made_again():
    question = problem(512)
    kept, anew = (
        Plan(Forward.MERGE, Forward.MERGE, Gradient.FULL, keep, backend=Backend.TRITON)
        for keep in (Keep.MERGED, Keep.NOTHING)
    )
    names = [[step.name for step in steps(question, plan)] for plan in (kept, anew)]
    assert [each.count("merge") for each in names] == [1, 2]


def test_every_combination_of_needs_has_a_plan_of_triton():
    for bits in range(32):
        needs = Needs(*(bool(bits >> i & 1) for i in range(5)))
        for m in (0, 1, 197, 25216):
            for dtype in H200:
                question = problem(m=m, needs=needs, dtype=dtype)
                plan = chosen(question, TRITON)
                assert plan.backend is Backend.TRITON and steps(question, plan)
                for keep in (Keep.NOTHING, Keep.HIDDEN):
                    if any(c.keep is keep for c in candidates(question)):
                        assert chosen(question, TRITON, keep).keep is keep


def test_where_only_merging_is_left_it_is_taken():
    question = problem()
    plans = [p for p in candidates(question, TRITON) if p.forward is p.dx is Forward.MERGE]
    rows = ranked(question, H200["bfloat16"], None, plans)
    assert len(rows) == len(plans) > 0
    assert [row.plan.time_us for row in rows] == sorted(row.plan.time_us for row in rows)


def test_what_cannot_serve_is_said():
    assert "rank 64 in all, and the ranks sum to 192" in why_not_strategy(
        problem(64, groups=3), Backend.TRITON, Forward.ONE_PASS
    )
    separate = Plan(*[Forward.SEPARATE] * 2, Gradient.RANK, Keep.HIDDEN, backend=Backend.TRITON)
    assert why_not(problem(), separate) == "triton has no kernel of separate"
    extended = dataclasses.replace(separate, forward=Forward.EXTENDED, backend=Backend.ATEN)
    assert why_not(problem(), extended) == "aten has no kernel of extended"
    assert "not in float64" in why_not_backend(problem(dtype="float64"), Backend.TRITON)
    assert "count in 32 bits" in why_not_backend(problem(m=1 << 31), Backend.TRITON)
    assert "count in 32 bits" in why_not_backend(problem(rank=50_000), Backend.TRITON)
    assert "nothing to launch" in why_not_backend(problem(n=0), Backend.TRITON)
    assert why_not_backend(problem(512, 3072), Backend.TRITON) is None


def test_the_library_takes_over_what_triton_kept():
    for plan in candidates(problem(512), TRITON):
        other = by_library(plan)
        assert why_not(problem(512), other) is None
        assert (other.keep, other.gradient) == (plan.keep, plan.gradient)
        assert (plan.forward in ROUNDS_ONCE) == (other.forward in ROUNDS_ONCE)


def test_without_triton_nothing_changes():
    for rank in (4, 64, 512):
        question = problem(rank)
        assert chosen(question, (Backend.ATEN,)) == choosing.choose(question, H200["bfloat16"])
