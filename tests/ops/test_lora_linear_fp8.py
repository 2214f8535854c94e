"""lora_linear_fp8: parity on what was quantised, the bound on what it stands for, gradients."""

import functools

import pytest
import torch

from fused_lora.ops.lora_linear_fp8 import lora_linear_fp8
from fused_lora.reference import lora_linear
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.reference.lora_linear_fp8 import quantise
from fused_lora.testing.yardstick import error, in_every_order, judge_all
from fused_lora.types import Needs, Span
from tests.ops.problems import draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPANS = (Span(0, 8, 3), Span(10, 16, 2))
E4M3_NOISE = 0.05  # of a product of two matrices of random numbers: 2^-4 / sqrt(3) each, at most


def run(p, impl="auto"):
    """y and every gradient, by name."""
    x, *ab = (t.detach().requires_grad_() for t in (p.x, *p.a, *p.b))
    bias = None if p.bias is None else p.bias.detach().requires_grad_()
    a, b = ab[: len(p.a)], ab[len(p.a) :]
    y = lora_linear_fp8(x, quantise(p.w), bias, a, b, p.scales, p.spans, impl=impl)
    y.backward(p.dy)
    yield from (("y", y.detach()), ("dx", x.grad))
    for name, group in (("da", a), ("db", b)):
        yield name, torch.cat([t.grad.flatten() for t in group])
    if bias is not None:
        yield "dbias", bias.grad


def equations(p):
    w = quantise(p.w)
    yield "y", reference.forward(p.x, w, p.bias, p.a, p.b, p.scales, p.spans)
    grads = reference.backward(p.dy, p.x, w, p.a, p.b, p.scales, p.spans, Needs(bias=True))
    yield "dx", grads.x
    yield "da", torch.cat([t.flatten() for t in grads.a])
    yield "db", torch.cat([t.flatten() for t in grads.b])
    yield "dbias", grads.bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(1, 5))
def test_parity_on_the_quantised_operands(seed, dtype):
    p = draw(seed, dtype)
    plain = in_every_order(lambda: dict(equations(p)))
    verdict = judge_all(dict(run(p)), plain, dict(equations(p.double())), dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("seed", [2, 7])
def test_how_far_y_is_from_that_of_the_weight_itself(seed):
    p = draw(seed, torch.float32).double()
    operands = (p.a, p.b, p.scales, p.spans)
    y = reference.forward(p.x, quantise(p.w), p.bias, *operands)
    off = error(y, lora_linear.forward(p.x, p.w, p.bias, *operands))
    assert 0.001 < off < E4M3_NOISE


def operands(dtype=torch.float64, m=(2, 7), k=12, n=20):
    make = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    a = [make(span.rank, k).requires_grad_() for span in SPANS]
    b = [make(span.width, span.rank).requires_grad_() for span in SPANS]
    return make(*m, k).requires_grad_(), quantise(make(n, k)), make(n), a, b


def call(w, bias, x, *ab, impl="auto", scales=(0.5, 2.0)):
    return lora_linear_fp8(x, w, bias, ab[:2], ab[2:], scales, SPANS, impl=impl)


@pytest.mark.parametrize("impl", ["aten", "reference"])
def test_gradcheck_of_what_is_not_rounded(impl):
    x, w, bias, a, b = operands()
    bias.requires_grad_()
    of = lambda bias, *ab: call(w, bias, x.detach(), *ab, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(of, (bias, *a, *b))


def test_dx_knows_no_rounding_of_x():
    """dx = dy (w^ + s b a)."""
    x, w, bias, a, b = operands()
    dy = torch.randn(2, 7, 20, dtype=torch.float64)
    dense = w.widened(torch.float64)
    for span, s, a_g, b_g in zip(SPANS, (0.5, 2.0), a, b, strict=True):
        dense[span.start : span.stop] += s * (b_g @ a_g).detach()
    (dx,) = torch.autograd.grad(call(w, bias, x, *a, *b), x, dy)
    torch.testing.assert_close(dx, dy @ dense)


@pytest.mark.parametrize("trained", range(1, 8))
def test_each_subset_of_needed_gradients(trained):
    x, w, bias, a, b = operands(torch.float32)
    groups = [[x], a, b]
    expected = torch.autograd.grad(call(w, bias, x, *a, *b).sum(), (x, *a, *b))
    for bit, group in enumerate(groups):
        [t.requires_grad_(bool(trained >> bit & 1)) for t in group]
    call(w, bias, x, *a, *b).sum().backward()
    for t, grad in zip((x, *a, *b), expected, strict=True):
        assert t.grad is None or torch.allclose(t.grad, grad, rtol=1e-4, atol=1e-5)
    for bit, group in enumerate(groups):
        assert all((t.grad is not None) == bool(trained >> bit & 1) for t in group)


def test_what_is_kept_is_x_and_h_at_most():
    x, w, bias, a, b = operands(torch.float32, m=(50,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(w, bias, x, *a, *b)
    own = {t.untyped_storage().data_ptr() for t in (x, *w, *a, *b)}
    more = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in more] == [(50, 5)]
    kept.clear()
    for t in a:
        t.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(w, bias, x, *a, *b)
    assert all(t.shape != x.shape for t in kept)


def test_strided_and_empty_x():
    _, w, bias, a, b = operands(torch.float32)
    for x in (torch.randn(7, 24)[:, ::2], torch.randn(12, 5).t(), torch.randn(3, 0, 12)):
        y = call(w, bias, x, *a, *b)
        torch.testing.assert_close(y, call(w, bias, x.contiguous(), *a, *b))
        assert y.shape == (*x.shape[:-1], 20)


def test_autocast():
    x, w, bias, a, b = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(w, bias, x, *a, *b)
    y.sum().backward()
    low = call(w, bias.bfloat16(), x.detach().bfloat16(), *a, *b)
    assert y.dtype is torch.bfloat16 and torch.equal(y, low) and x.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(dtype):
    torch._dynamo.reset()
    x, w, bias, a, b = operands(dtype)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    ys = [of(w, bias, x, *a, *b) for of in (call, compiled)]
    assert torch.equal(*ys)
    grads = [torch.autograd.grad(y.sum(), (x, *a, *b)) for y in ys]
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(eager, traced)


def test_transforms():
    x, w, bias, a, b = operands()
    with torch.no_grad():
        mapped = torch.func.vmap(lambda row: call(w, bias, row, *a, *b))(x.detach())
    torch.testing.assert_close(mapped, call(w, bias, x.detach(), *a, *b).detach())
    grad = torch.func.grad(lambda x: call(w, bias, x, *a, *b).sum())(x.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(call(w, bias, x, *a, *b).sum(), x)[0])


def test_double_backward_fails_loudly():
    x, w, bias, a, b = operands()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(call(w, bias, x, *a, *b).sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_backend_that_cannot_serve_says_so(impl):
    x, w, bias, a, b = operands(torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot serve"):
        call(w, bias, x, *a, *b, impl=impl)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"impl='{impl}' cannot serve"):
        call(w, bias, x, *a, *b, impl=impl)


def test_without_gradients_the_bits_are_the_same():
    x, w, bias, a, b = operands(torch.bfloat16)
    y = call(w, bias, x, *a, *b)
    with torch.no_grad():
        assert torch.equal(call(w, bias, x, *a, *b), y.detach())


def test_wrong_operands():
    x, w, bias, a, b = operands(torch.float32)
    of = functools.partial(lora_linear_fp8, x, bias=bias, a=a, b=b, scales=(1, 1), spans=SPANS)
    with pytest.raises(TypeError, match="codes must be torch.float8_e4m3fn, got torch.float32"):
        of(w._replace(codes=w.codes.float()))
    with pytest.raises(ValueError, match=r"scales must be \[20\] in float32, got \(3,\)"):
        of(w._replace(scales=w.scales[:3]))
    with pytest.raises(ValueError, match="must end in K = 12"):
        lora_linear_fp8(torch.randn(3, 5), w, None, a, b, (1, 1), SPANS)
