"""a and b as tensors made from others: the gradient goes on to whatever made them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fused_lora.ops.lora_linear import call_plan, lora_linear
from fused_lora.types import Forward, Gradient, Needs, Span

K, N, R = 24, 16, 3


def base():
    w = torch.randn(N, K, dtype=torch.float64)
    return torch.randn(50, K, dtype=torch.float64, requires_grad=True), w


def same(y, expected, leaves):
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for found, wanted in zip(ours, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted)


def drawn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def test_nola():
    x, w = base()
    basis_a, basis_b = drawn(7, R, K), drawn(7, N, R)
    alpha, beta = drawn(7, requires_grad=True), drawn(7, requires_grad=True)
    a, b = torch.einsum("i,irk->rk", alpha, basis_a), torch.einsum("i,inr->nr", beta, basis_b)
    change = sum(beta[i] * basis_b[i] for i in range(7)) @ sum(
        alpha[i] * basis_a[i] for i in range(7)
    )
    same(lora_linear(x, w, None, [a], [b], [0.5]), x @ (w + 0.5 * change).T, (x, alpha, beta))


def test_vera():
    x, w = base()
    shared_a, shared_b = drawn(R, K), drawn(N, R)
    d, out = drawn(R, requires_grad=True), drawn(N, requires_grad=True)
    y = lora_linear(x, w, None, [d[:, None] * shared_a], [out[:, None] * shared_b], [1.0])
    change = torch.diag(out) @ shared_b @ torch.diag(d) @ shared_a
    same(y, x @ (w + change).T, (x, d, out))


def test_randlora():
    x, w = base()
    basis_a, basis_b = drawn(R, K), drawn(5, N, R)
    lam, gamma = drawn(5, R, requires_grad=True), drawn(5, K, requires_grad=True)
    a = (lam[:, :, None] * basis_a * gamma[:, None, :]).reshape(-1, K)
    b = basis_b.permute(1, 0, 2).reshape(N, -1)
    change = sum(basis_b[j] @ torch.diag(lam[j]) @ basis_a @ torch.diag(gamma[j]) for j in range(5))
    same(lora_linear(x, w, None, [a], [b], [1.0]), x @ (w + change).T, (x, lam, gamma))


def test_the_rank_of_randlora_is_merged():
    w = torch.empty(768, 768)
    rows, spans = torch.empty(25216, 768), (Span(0, 768, 768),)
    plan = call_plan(rows, w, True, spans, Needs())
    assert (plan.forward, plan.gradient) == (Forward.MERGE, Gradient.FULL)


@pytest.mark.parametrize("eta", [1.0, 10.0])
def test_allora_scales_rows_of_the_gradient(eta):
    x, w = base()
    a, b = drawn(R, K), drawn(N, R).requires_grad_()
    y = lora_linear(x, w, None, [a], [b], [1.0])
    (plain,) = torch.autograd.grad(y.sum(), b, retain_graph=True)
    b.register_hook(lambda g: g / (b.detach().norm(dim=1, keepdim=True) + eta**-2).sqrt())
    y.sum().backward()
    for row in range(N):
        factor = 1 / (float(b[row].detach().norm()) + 1 / eta**2) ** 0.5
        torch.testing.assert_close(b.grad[row], factor * plain[row])


def test_a_prefix_of_the_ranks():
    x, w = base()
    a, b = drawn(8, K, requires_grad=True), drawn(N, 8, requires_grad=True)
    y = lora_linear(x, w, None, [a[:5]], [b[:, :5]], [1.0])
    keep = (torch.arange(8) < 5).double()
    same(y, x @ w.T + F.linear(F.linear(x, a) * keep, b), (x, a, b))
