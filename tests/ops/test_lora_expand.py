"""shrink, expand_add, lora_add: the two halves of an adapter, and dropout that keeps no mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fused_lora.kernels.aten import lora_linear_cases as library
from fused_lora.ops.lora_expand import expand_add, lora_add
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.lora_shrink import shrink
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Span

SPANS = (Span(0, 5, 3), Span(9, 20, 2))
SCALES = (0.5, 2.0)


def operands(dtype=torch.float64, m=(2, 7), k=12, n=20):
    x = torch.randn(*m, k, dtype=dtype, requires_grad=True)
    w, bias = torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)
    a = [torch.randn(s.rank, k, dtype=dtype, requires_grad=True) for s in SPANS]
    b = [torch.randn(s.width, s.rank, dtype=dtype, requires_grad=True) for s in SPANS]
    return x, w, bias, a, b


def added(x, w, bias, a, b, dropout=0.0):
    return lora_add(F.linear(x, w, bias), x, a, b, SCALES, SPANS, dropout)


def test_gradcheck():
    x, w, bias, a, b = operands()
    run = lambda x, *ab: added(x, w, bias, ab[:2], ab[2:])  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *a, *b))


def test_gradcheck_with_dropout():
    x, w, bias, a, b = operands()

    def run(x, *ab):
        torch.manual_seed(5)
        return added(x, w, bias, ab[:2], ab[2:], 0.4)

    assert torch.autograd.gradcheck(run, (x, *a, *b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_lora_linear_around_another_forward(dtype):
    low = operands(dtype, (197,), 48, 20)
    dy = torch.randn(197, 20, dtype=dtype)

    def results(run, dtype):
        x, w, bias, a, b = (
            [t.detach().to(dtype).requires_grad_() for t in operand]
            if isinstance(operand, list)
            else operand.detach().to(dtype).requires_grad_(operand.requires_grad)
            for operand in low
        )
        y = run(x, w, bias, a, b)
        return [y, *torch.autograd.grad(y, (x, *a, *b), dy.to(dtype))]

    def plain(x, w, bias, a, b):
        y = F.linear(x, w, bias)
        parts = zip(a, b, SCALES, SPANS, strict=True)
        low = [(F.linear(F.linear(x, p), q) * s, span) for p, q, s, span in parts]
        return y + sum(F.pad(part, (span.start, 20 - span.stop)) for part, span in low)

    def fused(x, w, bias, a, b):
        return lora_linear(x, w, bias, a, b, SCALES, SPANS)

    truth = results(fused, torch.float64)
    theirs = in_every_order(lambda: results(plain, dtype))
    verdict = judge_all(results(added, dtype), theirs, truth, dtype)
    assert verdict.passed, verdict


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (2, 3, 5)])
def test_leading_shapes_and_empty(shape):
    x, w, bias, a, b = operands(m=shape)
    y = added(x, w, bias, a, b)
    torch.testing.assert_close(y, lora_linear(x, w, bias, a, b, SCALES, SPANS))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_operands_and_a_y_that_cannot_be_viewed():
    x, w, bias, a, b = operands(m=(6, 7))
    strided = x.transpose(0, 1)
    y = F.linear(x, w, bias).transpose(0, 1)
    found = lora_add(y, strided, a, b, SCALES, SPANS)
    torch.testing.assert_close(found, lora_linear(strided, w, bias, a, b, SCALES, SPANS))


@pytest.mark.parametrize("trained", ["x", "a", "b", "none"])
def test_each_subset_of_needed_gradients(trained):
    x, w, bias, a, b = operands()
    for name, tensors in {"x": [x], "a": a, "b": b}.items():
        for tensor in tensors:
            tensor.requires_grad_(name == trained)
    y = added(x, w, bias, a, b, 0.2)
    assert y.requires_grad == (trained != "none")
    if y.requires_grad:
        y.sum().backward()
    for name, tensors in {"x": [x], "a": a, "b": b}.items():
        assert all((t.grad is not None) == (name == trained) for t in tensors)


def kept(run):
    tensors = {}

    def pack(t):
        tensors[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(tensors.values())


def test_dropout_keeps_neither_mask_nor_a_second_x():
    x, w, bias, a, b = operands(torch.float32, (300,), 64, 20)

    def composed():
        low = F.dropout(x, 0.5)
        y = F.linear(x, w, bias)
        return y + F.pad(F.linear(F.linear(low, a[0]), b[0]), (0, 15))

    fused = kept(lambda: added(x, w, bias, a, b, 0.5))
    without = kept(lambda: lora_linear(x, w, bias, a, b, SCALES, SPANS))
    assert fused <= without + 4 * 5 * (300 + 64)  # at most h, and the stacked a
    assert fused < kept(composed)


def test_dropout_is_unbiased_and_drops_as_many_as_asked():
    x = torch.ones(400, 500)
    found = x * library.kept(x, 0.3, 11) * library.inverse(0.3)
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert abs((found == 0).float().mean() - 0.3) < 0.005
    assert torch.equal(library.kept(x, 0.3, 11), library.kept(x, 0.3, torch.tensor(11)))
    assert not torch.equal(library.kept(x, 0.3, 11), library.kept(x, 0.3, 12))


def test_dropout_differs_from_call_to_call_and_follows_the_seed():
    x, _, _, a, _ = operands()
    torch.manual_seed(1)
    first, second = shrink(x, a[0], 0.5), shrink(x, a[0], 0.5)
    torch.manual_seed(1)
    assert torch.equal(shrink(x, a[0], 0.5), first)
    assert not torch.equal(first, second)


def test_ranks_routed_per_token():
    x, w, _, _, _ = operands()
    a = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    router = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    scores = F.linear(x, router)
    gate = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1) * scores.softmax(-1)
    y = expand_add(F.linear(x, w), shrink(x, a) * gate, b, 2.0)
    expected = x @ w.T + 2.0 * torch.einsum("...r,nr->...n", gate * (x @ a.T), b)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    leaves = (x, a, b, router)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, dy, retain_graph=True),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast():
    x, w, bias, a, b = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = added(x, w, bias, a, b, 0.0)
        h = shrink(x, a[0], 0.5)
        expected = lora_linear(x, w, bias, a, b, SCALES, SPANS)
    assert y.dtype is h.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.1)
    (y.float().sum() + h.float().sum()).backward()
    assert {t.grad.dtype for t in (x, *a, *b)} == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_whole(dropout):
    x, w, bias, a, b = operands(torch.float32)
    run = torch.compile(added, fullgraph=True, backend="aot_eager")
    y = run(x, w, bias, a, b, dropout)
    if not dropout:
        torch.testing.assert_close(y, added(x, w, bias, a, b))
    y.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *a, *b))


def test_double_backward_fails_loudly():
    x, w, bias, a, b = operands()
    y = added(x, w, bias, a, b)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, y, a, b: shrink(x[..., :-1], a), r"x \(2, 7, 11\) must end in K of a \(3, 12\)"),
        (lambda x, y, a, b: shrink(x, a[0]), r"must end in K of a \(12,\)"),
        (lambda x, y, a, b: shrink(x, a, 1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda x, y, a, b: shrink(x, a, -0.1), r"dropout must lie in \[0, 1\), got -0.1"),
        (lambda x, y, a, b: expand_add(y, x, b), r"h \(2, 7, 12\) must be y's \(2, 7\) by the R"),
        (lambda x, y, a, b: expand_add(y, x[:1, :, :3], b), r"h \(1, 7, 3\) must be y's \(2, 7\)"),
        (lambda x, y, a, b: expand_add(y, x[..., :3], b, 1.0, 16), "columns 16 to 21 leave y"),
        (lambda x, y, a, b: expand_add(y, x[..., :3], b, 1.0, -1), "columns -1 to 4 leave y"),
        (lambda x, y, a, b: expand_add(y, x[..., :3], b[0]), r"b \(3,\) = \[N, R\]"),
    ],
)
def test_bad_input(call, message):
    x, w, bias, a, b = operands()
    with pytest.raises(ValueError, match=message):
        call(x, F.linear(x, w, bias), a[0], b[0])
