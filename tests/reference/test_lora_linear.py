"""The spelled-out gradients are the gradients of the spelled-out forward, in float64."""

import itertools

import pytest
import torch

from fused_lora.reference import lora_linear as reference
from fused_lora.types import Needs, Span

SPANS = {
    "one adapter": (Span(0, 10, 3),),
    "three thirds": (Span(0, 4, 2), Span(4, 8, 1), Span(8, 10, 3)),
    "uncovered columns": (Span(1, 3, 2), Span(7, 9, 1)),
}


def operands(spans, m=5, k=7, n=10):
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    a = [make(span.rank, k) for span in spans]
    b = [make(span.width, span.rank) for span in spans]
    return make(m, k), make(n, k), make(n), a, b, [0.5 + g for g in range(len(spans))]


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_backward_is_the_gradient_of_forward(spans):
    x, w, bias, a, b, scales = operands(spans)
    y = reference.forward(x, w, bias, a, b, scales, spans)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, w, bias, *a, *b], dy)
    everything = Needs(True, True, True, True, True)
    got = reference.backward(dy, x, w, a, b, scales, spans, everything)
    for ours, theirs in zip([got.x, got.w, got.bias, *got.a, *got.b], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_forward_gradcheck(spans):
    x, w, bias, a, b, scales = operands(spans)

    def call(x, w, bias, *ab):
        return reference.forward(x, w, bias, ab[: len(spans)], ab[len(spans) :], scales, spans)

    assert torch.autograd.gradcheck(call, (x, w, bias, *a, *b))


def test_each_subset_of_needs_returns_exactly_those():
    spans = SPANS["three thirds"]
    x, w, _, a, b, scales = operands(spans)
    dy = torch.randn(5, 10, dtype=torch.float64)
    for bits in itertools.product((False, True), repeat=5):
        needs = Needs(*bits)
        got = reference.backward(dy, x, w, a, b, scales, spans, needs)
        present = [g is not None for g in (got.x, got.w, got.bias, got.a[0], got.b[0])]
        assert present == list(bits)


def test_the_border_picture():
    """y is one product of [x | h] with [w | s b], and dx one of [dy | dh] with [w ; a]."""
    spans = SPANS["one adapter"]
    x, w, _, (a,), (b,), (s,) = operands(spans)
    y = torch.cat([x, x @ a.T], 1) @ torch.cat([w, s * b], 1).T
    torch.testing.assert_close(y, reference.forward(x, w, None, [a], [b], [s], spans))
