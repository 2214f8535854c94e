"""A base in FP8: codes to the bit, products within the yardstick on what was quantised."""

import pytest
import torch

from fused_lora.kernels.triton import lora_linear_fp8, lora_shrink
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.testing.yardstick import in_every_order, judge
from tests.kernels.triton.cases import CASES, IDS, THIN_TILE, TILE, adapters, build, lowered
from tests.kernels.triton.guards import fenced

BF16, FP16 = HALVES = (torch.bfloat16, torch.float16)
SHAPES = [(197, 71), (5, 384), (1, 1), (3, 1025), (0, 16), (4, 0)]  # odd, whole, least, long, empty


def same(ours, theirs):
    """Bit for bit."""
    codes = [found.codes.view(torch.uint8) for found in (ours, theirs)]
    return torch.equal(*codes) and torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("m, k", SHAPES)
def test_codes_are_the_reference_s(m, k, dtype, monkeypatch):
    sizes = torch.logspace(-6, 4, m)[:, None]
    x = (torch.randn(m, k + 3) * sizes).to(dtype)[:, :k]
    with fenced(monkeypatch):
        found = lora_linear_fp8.quantise(x)
    assert same(found, reference.quantise(x))


def test_rows_of_zeros_and_what_is_not_finite():
    x = torch.ones(4, 20, dtype=torch.bfloat16)
    x[0] = 0
    x[1, 3], x[2, 4] = torch.inf, torch.nan
    found = lora_linear_fp8.quantise(x)
    assert not found.codes[0].float().any() and 0 < float(found.scales[0]) < 1e-20
    assert found.widened(torch.float32)[1:3].isnan().any(1).all()
    assert torch.equal(found.widened(torch.float32)[3], x[3].float())


def equation(p):
    return reference.forward(p.x, reference.quantise(p.w), p.bias, p.a, p.b, p.scales, p.spans)


def product(p, w):
    """y by the kernels, in small tiles."""
    h = lora_shrink.shrink(p.x, adapters(p), tile=THIN_TILE)
    return lora_linear_fp8.forward_extended_fp8(
        lora_linear_fp8.quantise(p.x), w, p.bias, adapters(p), h, TILE
    )


@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, torch.float32), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parity(case, adapter_dtype, dtype, monkeypatch):
    p = build(case, dtype, adapter_dtype)
    w = reference.quantise(p.w)
    with fenced(monkeypatch):
        y = product(p, w)
    assert y.dtype is dtype
    plain = in_every_order(lambda: equation(lowered(p, dtype)))
    verdict = judge("y", y, plain, equation(p.double()), dtype)
    assert verdict.passed, str(verdict)


def test_y_is_rounded_once():
    """One accumulator: no further from float64 than its own rounding."""
    p = build(CASES[1], torch.bfloat16, torch.bfloat16)
    y = product(p, reference.quantise(p.w))
    truth = equation(p.double())
    rounding = (truth.to(torch.bfloat16).double() - truth).norm()
    assert (y.double() - truth).norm() < 1.2 * rounding


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scales_of_no_and_of_other_sign(scale):
    p = build(CASES[3], torch.bfloat16, torch.float32)
    p.scales = (scale, 1.0, scale)
    y = product(p, reference.quantise(p.w))
    plain = in_every_order(lambda: equation(lowered(p, torch.bfloat16)))
    verdict = judge("y", y, plain, equation(p.double()), torch.bfloat16)
    assert verdict.passed, str(verdict)
