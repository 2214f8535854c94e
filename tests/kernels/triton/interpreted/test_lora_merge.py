"""MERGE: within the yardstick to nearest; the reference's bits under stochastic rounding."""

import pytest
import torch

from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.tiles import MergeTile
from fused_lora.reference import philox
from fused_lora.testing.yardstick import judge
from fused_lora.types import Span
from tests.kernels.triton.cases import CASES, DTYPES, IDS, adapters, build
from tests.kernels.triton.guards import fenced

TILE = MergeTile(32, 32)
SEEDS = [(0, 0), (7, 3), (2**63 + 5, 2**40 + 1)]  # small, plain, both words of both


def expected(w, group):
    """w' in float64."""
    merged = w.double()
    for a, b, s, span in zip(*group, strict=True):
        merged[span.start : span.stop] += s * b.double() @ a.double()
    return merged


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest(case, dtype, monkeypatch):
    p = build(case, dtype, torch.float32)
    truth = expected(p.w, adapters(p))
    with fenced(monkeypatch):
        ours = lora_merge(p.w, *adapters(p), tile=TILE)
    verdict = judge(case.why, ours, truth.float().to(dtype), truth, dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("k", [43, 48])  # one at a time, and by eights
@pytest.mark.parametrize("noise", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_has_the_references_bits(dtype, noise, k):
    """b a is exact in fp32: eighths. w is zero, small, ordinary, beyond the largest, inf, NaN."""
    n, r = 37, 5
    w = torch.randn(n, k).to(dtype) * 2.0 ** torch.randint(-24, 15, (n, k)).to(dtype)
    w[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max])
    a, b = (torch.randint(-8, 9, shape) / 8 for shape in ((r, k), (n, r)))
    spans = (Span(0, n, r),)
    ours = lora_merge(w, [a], [b], (2.0**-9,), spans, noise, tile=TILE)
    merged = w.float() + 2.0**-9 * (b @ a)
    truth = philox.stochastic_round(merged, dtype, *noise)
    torch.testing.assert_close(ours, truth, rtol=0, atol=0, equal_nan=True)


def test_in_place_and_the_same_twice():
    p = build(CASES[3], torch.bfloat16, torch.float32)
    once = lora_merge(p.w, *adapters(p), noise=(1, 2), tile=TILE)
    w = p.w.clone()
    assert lora_merge(w, *adapters(p), noise=(1, 2), out=w, tile=TILE) is w
    assert torch.equal(w, once)
