"""The compiled gradients in the plan: made-up ceilings, integers alone."""

import dataclasses

import pytest

from fused_lora.kernels.cuda import native
from fused_lora.plan import cost_kernels
from fused_lora.plan.choose import ranked, steps, time_us
from fused_lora.plan.problem import Ceilings, Problem
from fused_lora.plan.strategies import (
    GRADIENT_GROUPS,
    GRADIENT_RANKS,
    STRATEGIES,
    by_library,
    candidates,
    fuses_activation,
    fuses_activation_grad,
    why_not,
    why_not_backend,
    why_not_products,
)
from fused_lora.types import Backend, Forward, Gradient, Keep, Needs, Plan, Span

H200 = Ceilings("an H200", "bfloat16", 790_000, 32.0, 4_300, 4.0, True)
ALL = tuple(Backend)
EXTENDED = Forward.EXTENDED


def problem(rank=16, n=768, dtype="bfloat16", m=25216, k=768, groups=1, **more):
    width = n // groups
    spans = tuple(Span(g * width, g * width + width, rank) for g in range(groups))
    return Problem(m, k, n, spans, dtype, **more)


def compiled(keep=Keep.HIDDEN, dx=Forward.SEPARATE, backend=Backend.ATEN):
    return Plan(dx, dx, Gradient.RANK, keep, backend=backend, grads_by=Backend.CUDA)


def test_they_stand_beside_every_backend_and_only_for_rank_sized_gradients():
    plans = [plan for plan in candidates(problem(), ALL) if plan.grads_by]
    assert {plan.backend for plan in plans} == {Backend.ATEN, Backend.TRITON}
    assert {plan.gradient for plan in plans} == {Gradient.RANK}
    assert all(plan.gradient_backend is Backend.CUDA for plan in plans)
    assert not any(plan.library_alone for plan in plans)
    assert not [p for p in candidates(problem(), (Backend.ATEN, Backend.TRITON)) if p.grads_by]
    full = Plan(*[Forward.SEPARATE] * 2, Gradient.FULL, Keep.NOTHING, grads_by=Backend.CUDA)
    assert "only rank-sized gradients" in why_not(problem(), full)


def test_a_plan_names_them():
    assert str(compiled()) == "separate/separate/cuda:rank/hidden"
    beside = compiled(dx=Forward.EXTENDED, backend=Backend.TRITON)
    assert str(beside) == "triton:extended/extended/cuda:rank/hidden"


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (problem(dtype="float64"), "not float64"),
        (problem(k=770, dtype="float32"), "rows of whole 16 bytes"),
        (problem(needs=Needs(a=False, b=False)), "none is asked for"),
        (problem(k=772), r"rows of whole 16 bytes, and w is [768, 772]"),
        (problem(n=0), "w is [0, 768]"),
        (problem(rank=65), "the ranks sum to 65"),
        (problem(rank=4, groups=6), "this one has 6"),
    ],
)
def test_what_they_cannot_serve_is_said(question, sentence):
    assert sentence in why_not_backend(question, Backend.CUDA)
    assert not [plan for plan in candidates(question, ALL) if plan.grads_by]


def test_the_limits_are_the_kernels():
    if native.why_not_here():
        pytest.skip("the compiled module is not built")
    module = native.load()
    assert (module.grad_most_ranks, module.grad_most_groups) == (GRADIENT_RANKS, GRADIENT_GROUPS)


def test_x_and_dy_are_read_once_and_what_is_not_given_is_formed():
    question = problem()
    formed, given = (
        [*cost_kernels.cuda_gradient_steps(question, plan)]
        for plan in (compiled(Keep.NOTHING, Forward.MERGE), compiled())
    )
    assert [step.name for step in given] == ["one pass db da", "sums db da"]
    assert formed[0].flops == 2 * given[0].flops == 8 * 25216 * 16 * 768
    large = 25216 * (768 + 768)
    assert large < given[0].elements() < 1.5 * large
    names = [step.name for step in steps(question, compiled())]
    assert "db" not in names and "da" not in names and "dy shrink" in names  # for dx
    names = [step.name for step in steps(question, compiled(Keep.NOTHING, Forward.MERGE))]
    assert "dy shrink" not in names and "shrink" not in names


@pytest.mark.parametrize(
    ("backend", "dx"),
    [
        (Backend.ATEN, Forward.SEPARATE),
        (Backend.ATEN, Forward.BORDERED),
        (Backend.TRITON, Forward.EXTENDED),
    ],
)
def test_a_dh_that_the_gradients_form_is_not_formed_for_dx(backend, dx):
    question = problem(n=3072)
    alone = compiled(dx=dx, backend=backend)
    first = dataclasses.replace(alone, writes_dh=True)
    assert cost_kernels.may_write_dh(question, alone) and str(first) == str(alone)
    formed, given = ({step.name: step for step in steps(question, plan)} for plan in (alone, first))
    assert formed.keys() - given.keys() == {"dx shrink" if dx is EXTENDED else "dy shrink"}
    before, after = (sum(s.elements() for s in each.values()) for each in (formed, given))
    assert before - after > question.m * question.n  # dy is read once less
    assert given["one pass db da"].flops > formed["one pass db da"].flops
    assert not by_library(first).writes_dh


def test_who_hands_no_dh_on():
    plan = compiled()
    assert not cost_kernels.may_write_dh(problem(needs=Needs(x=False)), plan)
    assert not cost_kernels.may_write_dh(problem(needs=Needs(a=False)), plan)
    assert not cost_kernels.may_write_dh(problem(), dataclasses.replace(plan, grads_by=None))
    for dx in (Forward.MERGE, Forward.ONE_PASS):  # which form none, or theirs on the way
        assert not cost_kernels.may_write_dh(problem(), dataclasses.replace(plan, dx=dx))


@pytest.mark.parametrize("backend", Backend)
def test_h_that_comes_with_x_costs_no_pass(backend):
    beside = problem(), problem(shrunk=True)
    for forward in {Forward.SEPARATE, Forward.BORDERED, EXTENDED} & {*STRATEGIES[backend]}:
        plan = Plan(forward, forward, Gradient.RANK, Keep.HIDDEN, backend=backend)
        apart, along = ([s.name for s in steps(question, plan)] for question in beside)
        assert [name for name in apart if name != "shrink"] == along
        assert apart.count("shrink") == 1


@pytest.mark.parametrize(("dtype", "slices"), [("bfloat16", 4), ("float32", 8)])
def test_a_slice_is_a_tile_at_least(dtype, slices):
    """Of 16 rows, or of 8 of fp32."""
    question = problem(m=64, dtype=dtype)
    sums = [*cost_kernels.cuda_gradient_steps(question, compiled())][1]
    partial_bytes = slices * 16 * (768 + 768) * 4
    assert sums.extra_elements * question.itemsize == partial_bytes


def test_one_side_reads_one_operand():
    only_b = problem(needs=Needs(a=False))
    step, _ = cost_kernels.cuda_gradient_steps(only_b, compiled())
    assert step.n == only_b.n
    only_a = problem(needs=Needs(b=False))
    step, _ = cost_kernels.cuda_gradient_steps(only_a, compiled(Keep.NOTHING))
    assert step.n == only_a.k


@pytest.mark.parametrize("efficiency", [0.01, 1.0])
def test_a_slow_one_is_not_chosen_and_a_fast_one_is(monkeypatch, efficiency):
    monkeypatch.setattr(cost_kernels, "CUDA_EFFICIENCY", efficiency)
    monkeypatch.setattr(cost_kernels, "SLICES", 16)
    best = ranked(problem(), H200, None, candidates(problem(), ALL))[0].plan
    assert (best.grads_by is Backend.CUDA) == (efficiency == 1.0)


def test_the_library_takes_over_what_they_kept():
    for plan in candidates(problem(), ALL):
        other = by_library(plan)
        assert other.library_alone and why_not(problem(), other) is None
        assert (other.keep, other.gradient) == (plan.keep, plan.gradient)


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (problem(dtype="float32"), "not float32"),
        (problem(k=772), r"rows of whole 16 bytes, and w is [768, 772]"),
        (problem(n=0), "w is [0, 768]"),
        (problem(rank=4, groups=6), "this one has 6"),
        (problem(m=1 << 31), "counts rows in 32 bits"),
    ],
)
def test_what_the_product_cannot_serve_is_said(question, sentence):
    assert sentence in why_not_products(question)
    assert not candidates(question, (), compiled=True)


def test_products_stand_only_where_asked_for_and_take_any_rank():
    assert not [p for p in candidates(problem(), ALL) if p.backend is Backend.CUDA]
    for rank in (16, 512):
        plans = [p for p in candidates(problem(rank), ALL, True) if p.backend is Backend.CUDA]
        assert {plan.forward for plan in plans} == {plan.dx for plan in plans} == {EXTENDED}
        assert any(plan.grads_by for plan in plans) == (rank == 16)


def test_a_product_reads_h_beside_x():
    plan = Plan(EXTENDED, EXTENDED, Gradient.RANK, Keep.HIDDEN, backend=Backend.CUDA)
    found = {step.name: step for step in steps(problem(), plan)}
    assert list(found) == ["shrink", "extended", "dy shrink", "dx extended", "db", "da"]
    assert (found["extended"].k, found["dx extended"].k) == (768 + 16, 768 + 16)
    merged = compiled(dx=EXTENDED, backend=Backend.CUDA)
    assert str(merged) == "cuda:extended/extended/cuda:rank/hidden"
    assert "one pass db da" in {step.name for step in steps(problem(), merged)}


def test_a_product_s_epilogue_moves_u_alone():
    """GELU moves u and y, its derivative dx, u and du, where they are passes of their own."""
    both = problem(), dataclasses.replace(problem(), activated=True, input_activated=True)
    for plan in candidates(problem(), ALL, True):
        alone, along = (steps(question, plan) for question in both)
        moved = sum(s.elements() for s in along) - sum(s.elements() for s in alone)
        fused = plan.backend is not Backend.ATEN
        through = fused and plan.dx is EXTENDED, fused and plan.forward is EXTENDED
        assert (fuses_activation_grad(plan), fuses_activation(plan)) == through
        assert moved == both[0].m * 768 * ((1 if through[0] else 3) + (1 if through[1] else 2))


def test_a_step_takes_the_device_or_the_host_whichever_is_longer():
    gpu = dataclasses.replace(H200, gap_us=1.5, call_us=5.0)
    large, small = problem(m=25216), problem(m=50)
    plan = compiled()
    for question in (large, small):
        device_us = sum(step.time_us(2, gpu) for step in steps(question, plan))
        host_us = sum(step.host_us(gpu) for step in steps(question, plan))
        assert time_us(question, plan, gpu) == max(device_us, host_us)
        assert (device_us > host_us) == (question is large)
    assert not any(step.host_us(H200) for step in steps(large, plan))  # where nothing is queued


def test_the_host_packs_a_launch_of_the_gradients_once():
    gpu = dataclasses.replace(H200, gap_us=1.5, call_us=5.0)
    one, two = (s for s in steps(problem(), compiled()) if "db da" in s.name)
    assert one.host_us(gpu) == 5.0 * cost_kernels.GRADIENT_CALLS and two.host_us(gpu) == 0


def test_slices_are_those_of_the_kernels_planner():
    """On an H200, where fours are a cluster: 132, 64 and 52, the more chunks the fewer."""
    if native.why_not_here():
        pytest.skip("the compiled module is not built")
    from fused_lora.kernels.cuda.lora_grad_shape import fitting, shape_of
    from fused_lora.kernels.cuda.native import Chip

    chip, found = Chip(90, 132), {}
    for k, n in ((768, 768), (768, 2304), (768, 3072)):
        question = problem(k=k, n=n)
        found[n] = fitting(shape_of(question, compiled()), chip).plan(question.m, chip).partials
    assert found == {768: 33, 2304: 16, 3072: 13}
    wide = problem(n=3072)
    few, many = (
        sum(s.elements() for s in steps(wide, dataclasses.replace(compiled(), slices=count)))
        for count in (found[3072], 132)
    )
    assert few < many
