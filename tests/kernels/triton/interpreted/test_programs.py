"""Programs whose calls are Triton's launches give the bits of the operations they were made of."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lora.kernels.triton import launch
from fused_lora.ops import backends
from fused_lora.ops.lora_block import lora_attention, lora_mlp
from fused_lora.ops.lora_linear import lora_linear as op
from fused_lora.programs import run
from fused_lora.programs.describe import name_of
from fused_lora.types import Impl, Keep, Span
from tests.kernels.triton.interpreted.serving import serving, small_tiles  # noqa: F401
from tests.ops.block_problems import leaves, matrix, norm

BF16, F32 = torch.bfloat16, torch.float32
D, H = 24, 40


@pytest.fixture
def preferred(serving, small_tiles):  # noqa: F811
    """Triton's EXTENDED wins."""
    for name, value in {
        "TRITON_EFFICIENCY": 1e6,
        "TRITON_LAUNCH_CALLS": 0.0,
        "MERGE_EFFICIENCY": 1e-9,
    }.items():
        serving.setattr(f"fused_lora.plan.cost_kernels.{name}", value)
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


def packs():
    """Launches that pack, forward and backward."""
    (program,) = run.programs()
    found = (program.calls, program.calls_back)
    return [sum("pack" in name_of(call) for call in calls) for calls in found]


def half(preferred, images=2, rank=3):
    """An MLP's half on x [images, 9, D], and every leaf."""
    preferred.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    x = torch.randn(images, 9, D, dtype=BF16, requires_grad=True)
    fc1, fc2 = (matrix(n, k, rank, dtype=BF16, w=False, bias=False) for n, k in ((H, D), (D, H)))
    return lambda: lora_mlp(x, fc1, fc2), (x, fc1, fc2)


@pytest.mark.parametrize("images, again", [(2, 1), (9, 0)])  # M = 18 and 81, K + N = 80 with pads
def test_adapters_of_a_chain_are_packed_once(preferred, images, again):
    """And again in backward where that is larger than an h."""
    keep_nothing(preferred)
    call, operands = half(preferred, images)
    both_ways(preferred, call, operands)
    preferred.delenv("FUSED_LORA_PROGRAMS")
    run.forget()
    call()
    assert packs() == [1, again]


def keep_nothing(monkeypatch):
    every = backends.plans
    kept = lambda *given: [plan for plan in every(*given) if plan.keep is Keep.NOTHING]  # noqa: E731
    monkeypatch.setattr(backends, "plans", kept)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_write_to_packed_adapters_is_seen(preferred, name):
    """Between forward and backward by torch, between two steps by the next pack."""
    keep_nothing(preferred)
    call, operands = half(preferred, images=9)
    (adapter,) = getattr(operands[1], name)
    before = call()
    with torch.no_grad():
        adapter.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()
    after = call()
    assert packs() == [1, 0] and not torch.equal(before, after)
    preferred.setenv("FUSED_LORA_PROGRAMS", "0")
    assert torch.equal(after, call())


def test_adapters_that_serve_twice_are_packed_once(preferred):
    """One adapter of two linears of a chain; a step through checkpoints packs in each forward."""
    keep_nothing(preferred)
    call, (x, fc1, fc2) = half(preferred, images=9)
    same = fc2._replace(a=[fc1.b[0].t()], b=[fc1.a[0].t()])
    again = lambda: checkpoint(lambda: lora_mlp(x, fc1, same), use_reentrant=False)  # noqa: E731
    both_ways(preferred, again, (x, fc1))
    both_ways(preferred, lambda: lora_mlp(x, fc1, same), (x, fc1))


@pytest.mark.parametrize("recompute", ["none", "elementwise", "gemm"])
def test_mlp_half(preferred, recompute):
    preferred.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    x = torch.randn(2, 9, D, dtype=BF16, requires_grad=True)
    fc1, fc2 = (matrix(n, k, 3, dtype=BF16, w=False, bias=False) for n, k in ((H, D), (D, H)))
    before = norm(D, BF16, trains=False)
    call = lambda: lora_mlp(x, fc1, fc2, norm=before, around=True, recompute=recompute)  # noqa: E731
    kernels = both_ways(preferred, call, (x, fc1, fc2))
    assert {"extended", "shrink", "row_shrink_and_pack", "layer_norm_grad", "add_slices"} <= set(
        kernels
    )
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
