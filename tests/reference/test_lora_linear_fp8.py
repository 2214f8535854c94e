"""Codes and scales of rows, and how far they may be from what they stand for."""

import pytest
import torch

from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.reference.lora_linear_fp8 import ABSOLUTE, CODES, LARGEST, RELATIVE, quantise
from fused_lora.types import Needs, Span

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_element_moves_further_than_e4m3_rounds(dtype):
    t = (torch.randn(37, 53) * torch.logspace(-3, 3, 37)[:, None]).to(dtype)
    found = quantise(t)
    assert found.codes.dtype is CODES and found.scales.dtype is torch.float32
    moved = (found.widened(torch.float64) - t.double()).abs()
    bound = torch.maximum(RELATIVE * t.double().abs(), ABSOLUTE * found.scales.double()[:, None])
    assert (moved <= bound * (1 + 1e-6)).all()
    assert (found.codes.float().abs().amax(1) == LARGEST).all()


def test_what_is_on_the_grid_stays():
    grid = torch.arange(256, dtype=torch.uint8).view(CODES).float()
    grid = grid[grid.isfinite()][None]
    assert torch.equal(quantise(grid).widened(torch.float32), grid)


def test_rows_of_zeros_and_of_nothing():
    codes, scales = quantise(torch.zeros(3, 5))
    assert not codes.float().any() and (scales > 0).all() and (1 / scales).isfinite().all()
    assert quantise(torch.zeros(0, 5)).codes.shape == (0, 5)
    assert quantise(torch.zeros(3, 0)).widened(torch.float32).shape == (3, 0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(wrong):
    t = torch.ones(2, 4)
    t[1, 2] = wrong
    back = quantise(t).widened(torch.float32)
    assert back[1].isnan().any() and torch.equal(back[0], t[0])


def test_gradients_are_those_of_what_the_forward_multiplied_by():
    """Autograd of the equation with x^ in x's place, straight through."""
    torch.manual_seed(0)
    x, dy = torch.randn(7, 12).double(), torch.randn(7, 20).double()
    w, spans = quantise(torch.randn(20, 12)), (Span(0, 8, 3), Span(10, 16, 2))
    a = [torch.randn(s.rank, 12).double() for s in spans]
    b = [torch.randn(s.width, s.rank).double() for s in spans]
    for t in (x, *a, *b):
        t.requires_grad_()
    rounded = x + (quantise(x).widened(torch.float64) - x).detach()
    y = rounded @ w.widened(torch.float64).T
    for g, (span, s) in enumerate(zip(spans, (0.5, 2.0), strict=True)):
        low = s * (x @ a[g].T) @ b[g].T
        y = y + torch.nn.functional.pad(low, (span.start, 20 - span.stop))
    operands = (a, b, (0.5, 2.0), spans)
    torch.testing.assert_close(reference.forward(x, w, None, *operands), y)
    found = reference.backward(dy, x, w, *operands, Needs())
    expected = torch.autograd.grad(y, (x, *a, *b), dy)
    for ours, theirs in zip((found.x, *found.a, *found.b), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
