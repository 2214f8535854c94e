"""LayerNorm and GELU that form h as well: the yardstick, both ends of a bordered buffer, bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fused_lora.kernels.triton import border, elementwise, lora_shrink
from fused_lora.testing.yardstick import judge_all
from tests.kernels.triton.cases import CASES, THIN_TILE, Case, adapters, build, lowered
from tests.kernels.triton.guards import fenced

EPS = 1e-6
LOW = (torch.bfloat16, torch.float16)
KINDS = {"erf": "none", "tanh": "tanh"}
FEW = [case for case in CASES if sum(span.rank for span in case.spans) <= 32]
DTYPE = pytest.mark.parametrize("dtype", LOW, ids=str)
EACH = pytest.mark.parametrize("case", FEW, ids=[case.why for case in FEW])


def problem(case: Case, dtype: torch.dtype):
    p = build(case, dtype, torch.float32)
    return p, torch.randn(case.k), torch.randn(case.k)


def ends(p, dtype: torch.dtype):
    """The left and the right of a bordered buffer, with a fence behind."""
    (m, k), rank = p.x.shape, adapters(p).rank
    buffer = torch.full((m, k + rank + 3), 7.0, dtype=dtype)
    return buffer, buffer[:, :k], buffer[:, k:-3]


@DTYPE
@EACH
@pytest.mark.parametrize("wide", [False, True])  # z in fp32, as autocast has it
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(case, dtype, wide, affine, monkeypatch):
    p, weight, bias = problem(case, dtype)
    z = 3 * (p.x.float() if wide else p.x) + 1
    vectors = (weight, bias) if affine else (None, None)
    buffer, left, right = ends(p, dtype)
    with fenced(monkeypatch):
        made = lora_shrink.layer_norm_shrink(z, *vectors, EPS, adapters(p), left, right, THIN_TILE)
    assert made.x is left and made.h is right and (buffer[:, -3:] == 7).all()

    def named(to: torch.dtype, half):
        own = [None if t is None else t.to(to) for t in vectors]
        n = F.layer_norm(z.to(to), (case.k,), *own, EPS)
        return {"n": n, "h": n @ torch.cat(half.a).to(to).T}

    plain, truth = named(dtype, lowered(p, dtype)), named(torch.float64, p.double())
    verdict = judge_all({"n": made.x, "h": made.h}, [plain], truth, dtype)
    assert verdict.passed, str(verdict)
    again = elementwise.layer_norm_rebuild(
        z, *vectors, made.mean, made.rstd, torch.empty_like(left)
    )
    assert torch.equal(again, made.x)


@DTYPE
@EACH
@pytest.mark.parametrize("kind", KINDS)
def test_gelu(case, dtype, kind, monkeypatch):
    p, _, _ = problem(case, dtype)
    buffer, left, right = ends(p, dtype)
    with fenced(monkeypatch):
        g, h = lora_shrink.gelu_shrink(2 * p.x, kind, adapters(p), left, right, THIN_TILE)
    assert g is left and h is right and (buffer[:, -3:] == 7).all()

    def named(to: torch.dtype, half):
        g = F.gelu(2 * p.x.to(to), approximate=KINDS[kind])
        return {"g": g, "h": g @ torch.cat(half.a).to(to).T}

    plain, truth = named(dtype, lowered(p, dtype)), named(torch.float64, p.double())
    verdict = judge_all({"g": g, "h": h}, [plain], truth, dtype)
    assert verdict.passed, str(verdict)


def test_a_mean_far_from_zero_is_no_loss():
    """Blocks of columns are combined by their own means: no difference of large sums."""
    p, _, _ = problem(FEW[1], torch.bfloat16)
    z = torch.randn(p.x.shape) + 1000
    made = lora_shrink.layer_norm_shrink(z, None, None, EPS, adapters(p), torch.empty_like(p.x))
    truth = (z.double().var(1, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(made.rstd.double(), truth, rtol=1e-4, atol=0)
    torch.testing.assert_close(made.mean.double(), z.double().mean(1), rtol=1e-6, atol=0)


def test_the_same_bits_whatever_the_rows():
    """A row is summed in one order, alone or among others."""
    p, weight, bias = problem(FEW[3], torch.bfloat16)
    runs = [
        lora_shrink.layer_norm_shrink(z, weight, bias, EPS, adapters(p), torch.empty_like(z))
        for z in (p.x, p.x, p.x[5:9])
    ]
    for whole, again, part in zip(*runs, strict=True):
        assert torch.equal(whole, again) and torch.equal(whole[5:9], part)


@DTYPE
def test_adapters_are_packed_in_the_same_launch(dtype):
    """As by a launch of their own, those of several linears; x and h are the same bits."""
    p, weight, bias = problem(FEW[3], dtype)
    every = [adapters(p), adapters(problem(FEW[1], dtype)[0])]
    both, pieces = border.packing(every, dtype)
    assert pieces is not None and len(pieces.outs) == 4
    for out in pieces.outs:
        out.fill_(torch.nan)
    runs = [
        lora_shrink.layer_norm_shrink(
            p.x, weight, bias, EPS, every[0], torch.empty_like(p.x), None, THIN_TILE, beside
        )
        for beside in (None, pieces)
    ]
    assert all(map(torch.equal, *runs))
    for one, other in zip(both, border.packed_together(every, dtype), strict=True):
        assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
