"""The judge is judged: right results pass in every order of summation, every wrong one fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_lora.testing.yardstick import Comparison, error, in_every_order, judge, worst
from fused_lora.verify.check import (
    ALIGNED,
    SHAPES,
    Named,
    Operands,
    Shape,
    compare_exact,
    equations,
    problems,
)
from tests.testing.mutants import FAINT, MUTANTS, elements, right

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
# bf16 rounds an element by up to 4e-3, twice on the way: there exact problems see a hundredth.
LEAST_SEEN = {FP32: 1e-2, FP16: 1e-2, BF16: 1e-1}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=("odd", "whole blocks"))
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def only(shape: Shape, dtype: torch.dtype, exact: bool = False) -> Operands:
    (operands,) = problems(dtype, CPU, (shape,), exact)
    return operands


def yardstick(p: Operands) -> tuple[list[Named], Named]:
    """Plain torch's results in every order, and the truth."""
    return in_every_order(lambda: right(p)), equations(p.to(torch.float64))


def verdict(name: str, ours: Named, plain: list[Named], truth: Named) -> Comparison:
    dtype = plain[0][name].dtype
    return judge(name, ours[name], [run[name] for run in plain], truth[name], dtype)


@ALL_SHAPES
@ALL_DTYPES
def test_other_orders_pass_beside_one(shape, dtype):
    plain, truth = yardstick(only(shape, dtype))
    for ours in plain:
        for name in truth:
            found = verdict(name, ours, plain[:1], truth)
            assert found.passed, str(found)


@ALL_SHAPES
@ALL_DTYPES
@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_fails_in_every_result_that_it_changes(shape, mutant, dtype):
    p = only(shape, dtype)
    plain, truth = yardstick(p)
    run, changed = MUTANTS[mutant]
    ours = (elements(LEAST_SEEN[dtype]) if mutant == FAINT else run)(p)
    for name in changed:
        found = verdict(name, ours, plain, truth)
        assert not found.passed, str(found)


@pytest.mark.parametrize("shape", dict.fromkeys((*SHAPES, *ALIGNED)), ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_exact_problems_are_exact_in_every_order_and_see_every_mutant(shape, dtype):
    p = only(shape, dtype, exact=True)
    plain, truth = yardstick(p)
    assert not [said for ours in plain for said in compare_exact(ours, truth)]
    for mutant, (run, changed) in MUTANTS.items():
        ours = run(p)
        for name in changed:
            assert list(compare_exact({name: ours[name]}, truth)), (mutant, name)


def test_nan_and_infinity_never_pass():
    truth = torch.randn(8, 8, dtype=torch.float64)
    plain = truth.float()
    for wrong in (torch.nan, torch.inf):
        ours = plain.clone()
        ours[3, 3] = wrong
        assert not judge("y", ours, plain, truth, FP32).passed
        assert judge("y", ours, plain, truth, FP32).share == float("inf")


def test_shapes_must_be_equal_and_may_be_empty():
    empty = torch.zeros(0, 4)
    assert judge("y", empty, empty, empty.double(), FP32).passed
    with pytest.raises(ValueError, match="shapes differ"):
        judge("y", empty, empty, torch.zeros(1, 4), FP32)


def test_what_is_nothing_in_exact_terms_is_compared_with_its_floor():
    """A truth of 1e-17 is the rounding of 0, which ours may find exactly, and plain far from it."""
    truth, plain = torch.full((4,), 1e-17, dtype=torch.float64), torch.full((4,), 1e-9)
    zero = torch.zeros(4)
    assert not judge("dk", zero, truth.float(), truth, FP32).passed
    assert judge("dk", zero, plain, truth, FP32, floor=1.0).passed
    assert not judge("dk", zero + 1e-2, plain, truth, FP32, floor=1.0).passed


def test_the_worst_run_of_plain_torch_makes_the_budget():
    truth = torch.ones(100, dtype=torch.float64)
    lucky, usual = (truth.float() + bits * torch.finfo(FP32).eps for bits in (0, 4))
    ours = truth.float() + 6 * torch.finfo(FP32).eps
    assert not judge("y", ours, lucky, truth, FP32).passed
    assert judge("y", ours, [lucky, usual], truth, FP32).passed


def test_the_worst_of_several_is_the_one_that_takes_most_of_its_budget():
    small, large = Comparison("y", 3.0, 1.0, 2.0), Comparison("y", 4.0, 7.0, 14.0)
    assert worst([small, large]) is small
    nan = Comparison("y", torch.nan, 1.0, 3.0)
    assert worst([small, nan, large]) is nan


@pytest.mark.parametrize("grad", [True, False])
def test_every_order_sums_anew_forward_and_backward_from_the_same_random_numbers(grad):
    linear, x = nn.Linear(301, 40), torch.randn(50, 301)
    truth = linear.double()(x.double()).detach()
    linear.float()

    def compute():
        with torch.inference_mode(not grad):
            y = linear(torch.nn.functional.dropout(x, 0.0)) + 0 * torch.rand(())
            drawn = torch.rand(())
        return y, torch.autograd.grad(y.square().sum(), linear.weight)[0] if grad else y, drawn

    first, *others = in_every_order(compute)
    for y, dw, drawn in others:
        assert not torch.equal(y, first[0]) and not torch.equal(dw, first[1])
        assert error(y.detach(), truth) < 1e-6
        assert torch.equal(drawn, first[2])
