"""Adapters with dropout: their programs are given a seed, and keep nothing else of the mask."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from fused_lora.kernels.aten.lora_linear_cases import inverse, kept
from fused_lora.nn import FusedLoRALinear
from fused_lora.ops.lora_dropout import drawn
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.programs.run import forget, programs
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Span

P = 0.4
SPANS = (Span(0, 5, 3), Span(9, 20, 2))
SCALES = (0.5, 2.0)


@pytest.fixture(autouse=True)
def fresh():
    forget()
    yield
    forget()


def operands(dtype=torch.float64, m=(2, 7), k=12, n=20, needs=(True,) * 7):
    """x, w, bias, both a, both b."""
    shapes = [
        (*m, k),
        (n, k),
        (n,),
        *((s.rank, k) for s in SPANS),
        *((s.width, s.rank) for s in SPANS),
    ]
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [t.requires_grad_(need) for t, need in zip(made, needs, strict=True)]


def fused(x, w, bias, *ab, seed=3, **options):
    torch.manual_seed(seed)
    return lora_linear(x, w, bias, ab[:2], ab[2:], SCALES, SPANS, dropout=P, **options)


def spelled(x, w, bias, *ab, seed=3):
    """The equation, by the mask of the same seed."""
    torch.manual_seed(seed)
    rows = x.reshape(-1, x.shape[-1])
    mask = kept(rows.detach().contiguous(), P, drawn()).view(x.shape)
    low, y = x * mask * inverse(P), F.linear(x, w, bias)
    for a, b, scale, span in zip(ab[:2], ab[2:], SCALES, SPANS, strict=True):
        y = y + F.pad(F.linear(F.linear(low, a), b) * scale, (span.start, y.shape[-1] - span.stop))
    return y


def outcome(run, tensors, **options):
    """y and the gradients asked for."""
    y = run(*tensors, **options)
    leaves = [t for t in tensors if t.requires_grad]
    torch.manual_seed(1)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if leaves else ())]


SUBSETS = [(x, w, w, a, a, b, b) for x, w, a, b in itertools.product((False, True), repeat=4)]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda n: "".join("01"[each] for each in n))
def test_every_subset_of_gradients(needs):
    tensors = operands(needs=needs)
    for ours, theirs in zip(outcome(fused, tensors), outcome(spelled, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(programs()) == 1


def test_one_program_for_every_seed():
    tensors = operands()
    first, second, again = (outcome(fused, tensors, seed=seed) for seed in (3, 4, 3))
    assert len(programs()) == 1
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("impl", ["auto", "aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [(197,), (3, 1), (0,), ()], ids=str)
def test_within_the_yardstick(dtype, m, impl):
    tensors = operands(dtype, m, k=48)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    # zeros and ones: the mask of one seed does not depend on the dtype it is drawn in
    torch.testing.assert_close(
        kept(tensors[0].detach().reshape(-1, 48), P, 5).double(),
        kept(wide[0].detach().reshape(-1, 48), P, 5),
    )
    plain = in_every_order(lambda: outcome(spelled, tensors))
    found = outcome(fused, tensors, impl=impl)
    verdict = judge_all(found, plain, outcome(spelled, wide), dtype)
    assert verdict.passed, verdict


def test_strided_operands_and_adapters_in_fp32():
    base = operands(torch.bfloat16, (21,))
    x = torch.randn(12, 21, dtype=torch.bfloat16).t().requires_grad_()
    halves = [t.detach().float().t().contiguous().t().requires_grad_() for t in base[3:]]
    found = outcome(fused, [x, *base[1:3], *halves])
    wide = [t.detach().double().requires_grad_() for t in (x, *base[1:3], *halves)]
    assert [t.dtype for t in found[4:]] == [torch.float32] * 4
    for ours, theirs in zip(found, outcome(spelled, wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.3)


def test_gradcheck():
    tensors = operands()
    assert torch.autograd.gradcheck(fused, tensors)


def test_a_layer_decides_again_where_its_dropout_is_on_or_off():
    layer, twin = FusedLoRALinear(12, 20, rank=4, dropout=P), None
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 12, requires_grad=True)
    for training in (True, False, True):
        twin = copy.deepcopy(layer).train(training)
        layer.train(training)
        found = []
        for each in (layer, twin):
            torch.manual_seed(7)
            y = each(x)
            found.append([y.detach(), *torch.autograd.grad(y.sum(), (x, *each.adapter()))])
        assert all(map(torch.equal, *found))
        plain = F.linear(x, layer.weight, layer.bias) + layer.scales[0] * (
            x @ layer.lora_A.T @ layer.lora_B.T
        )
        assert torch.allclose(found[0][0], plain, atol=1e-5) == (not training)


def test_two_forwards_before_their_backwards_keep_a_seed_each():
    layer = FusedLoRALinear(12, 20, rank=4, dropout=P)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 12)
    torch.manual_seed(7)
    apart = [torch.autograd.grad(layer(x).sum(), layer.lora_A)[0] for _ in range(2)]
    torch.manual_seed(7)
    first, second = layer(x), layer(x)
    torch.testing.assert_close(torch.autograd.grad(second.sum(), layer.lora_A)[0], apart[1])
    torch.testing.assert_close(torch.autograd.grad(first.sum(), layer.lora_A)[0], apart[0])


def test_what_is_kept_is_what_is_kept_without_dropout_and_a_seed():
    tensors = operands(torch.float32, (300,), 64)

    def bytes_kept(run):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run()
        return sum(found.values())

    x, w, bias, *ab = tensors
    without = lambda: lora_linear(x, w, bias, ab[:2], ab[2:], SCALES, SPANS)  # noqa: E731
    assert bytes_kept(lambda: fused(*tensors)) <= bytes_kept(without) + 4 * 300 * 5 + 8  # h, a seed


@pytest.mark.parametrize("dropout", [1.0, -0.1, 2])
def test_a_dropout_that_is_no_probability(dropout):
    x, w, bias, *ab = operands()
    with pytest.raises(
        ValueError, match=rf"lora_linear: dropout must lie in \[0, 1\), got {dropout}"
    ):
        lora_linear(x, w, bias, ab[:2], ab[2:], SCALES, SPANS, dropout=dropout)
