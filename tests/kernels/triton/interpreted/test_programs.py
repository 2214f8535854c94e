"""Programs whose calls are Triton's launches give the bits of the operations they were made of."""

from __future__ import annotations

import pytest
import torch

from fused_lora.kernels.triton import launch, lora_linear, lora_linear_ended
from fused_lora.ops.lora_attention import lora_attention
from fused_lora.ops.lora_linear import lora_linear as op
from fused_lora.ops.lora_mlp import lora_mlp
from fused_lora.programs import run
from fused_lora.programs.describe import name_of
from fused_lora.types import Impl, Span
from tests.kernels.triton.interpreted.serving import serving, small_tiles  # noqa: F401
from tests.ops.block_problems import leaves, matrix, norm

BF16, F32 = torch.bfloat16, torch.float32
D, H = 24, 40


@pytest.fixture
def preferred(serving, small_tiles):  # noqa: F811
    """Triton's EXTENDED wins."""
    for name, value in {"EFFICIENCY": 1e6, "LAUNCH_CALLS": 0.0, "MERGE_EFFICIENCY": 1e-9}.items():
        serving.setattr(f"fused_lora.plan.cost_triton.{name}", value)
    serving.setattr(lora_linear_ended, "tile_of", lora_linear.tile_of)
    return serving


def launches():
    """The kernels of all programs."""
    calls = [call for p in run.programs() for call in (*p.calls, *p.calls_back)]
    return [name_of(c) for c in calls if isinstance(c.target, launch.BoundLaunch)]


def both_ways(monkeypatch, function, operands):
    """Bits of y and every gradient, by programs (twice) and as written."""

    def outcome():
        torch.manual_seed(3)
        y = function()
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves(*operands))]

    run.forget()
    found = [outcome(), outcome()]
    kernels = launches()
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    run.forget()
    for ours in found:
        assert all(map(torch.equal, ours, outcome()))
    return kernels


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("ranks, once", [((3,), False), ((3, 2), False), ((3,), True)])
def test_linear(preferred, dtype, ranks, once):
    if not once:
        preferred.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    width = H // len(ranks)
    spans = [Span(i * width, (i + 1) * width, r) for i, r in enumerate(ranks)]
    x = torch.randn(2, 9, D, dtype=dtype, requires_grad=True)
    w, bias = torch.randn(H, D, dtype=dtype), torch.randn(H, dtype=dtype)
    a = [torch.randn(r, D, requires_grad=True) for r in ranks]
    b = [torch.randn(width, r, requires_grad=True) for r in ranks]
    call = lambda: op(x, w, bias, a, b, [0.5] * len(ranks), spans, impl=Impl.TRITON)  # noqa: E731
    kernels = both_ways(preferred, call, (x, *a, *b))
    expected = {"one_pass"} if once else {"extended", "shrink"}
    assert expected | {"partial_sums", "add_slices"} <= set(kernels), kernels


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_dropout_by_a_seed_that_each_run_is_given(preferred, dtype):
    x = torch.randn(2, 9, D, dtype=dtype, requires_grad=True)
    w, spans = torch.randn(H, D, dtype=dtype), [Span(0, 24, 3), Span(24, H, 2)]
    a = [torch.randn(span.rank, D, requires_grad=True) for span in spans]
    b = [torch.randn(span.width, span.rank, requires_grad=True) for span in spans]
    call = lambda: op(x, w, None, a, b, [0.5, 2.0], spans, dropout=0.3)  # noqa: E731
    kernels = both_ways(preferred, call, (x, *a, *b))
    assert {"shrink", "extended", "partial_sums", "add_slices"} <= set(kernels), kernels
    preferred.delenv("FUSED_LORA_PROGRAMS")
    run.forget()
    first, second = call(), call()
    assert len(run.programs()) == 1 and not torch.equal(first, second)


@pytest.mark.parametrize("recompute", ["none", "elementwise", "gemm"])
def test_mlp_half(preferred, recompute):
    preferred.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    x = torch.randn(2, 9, D, dtype=BF16, requires_grad=True)
    fc1, fc2 = (matrix(n, k, 3, dtype=BF16, w=False, bias=False) for n, k in ((H, D), (D, H)))
    before = norm(D, BF16, trains=False)
    call = lambda: lora_mlp(x, fc1, fc2, norm=before, around=True, recompute=recompute)  # noqa: E731
    kernels = both_ways(preferred, call, (x, fc1, fc2))
    assert {"extended", "shrink", "row_shrink", "layer_norm_grad", "add_slices"} <= set(kernels)
    assert ("layer_norm" in kernels) == (recompute == "elementwise")  # n again, without h


def test_attention_half(preferred):
    preferred.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    x = torch.randn(2, 9, D, dtype=BF16, requires_grad=True)
    qkv = matrix(3 * D, D, 2, groups=3, dtype=BF16, w=False, bias=False)
    proj = matrix(D, D, 2, dtype=BF16, w=False, bias=False)
    before = norm(D, BF16, trains=False)
    call = lambda: lora_attention(x, before, qkv, proj, 2, recompute="elementwise")  # noqa: E731
    kernels = both_ways(preferred, call, (x, qkv, proj))
    assert kernels.count("extended") >= 4 and kernels.count("add_slices") >= 4
