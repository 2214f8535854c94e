"""The operation as autograd and torch.compile see it."""

import functools

import pytest
import torch
import torch._dynamo.testing

from fused_lora import lora_linear
from fused_lora.types import Span

SPANS = (Span(0, 8, 3), Span(10, 16, 2))


def operands(dtype=torch.float64, m=(2, 7), k=12, n=20):
    make = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    x = make(*m, k).requires_grad_()
    a = [make(span.rank, k).requires_grad_() for span in SPANS]
    b = [make(span.width, span.rank).requires_grad_() for span in SPANS]
    return x, make(n, k), make(n), a, b


def call(w, bias, x, *ab, impl="auto", scales=(0.5, 2.0)):
    return lora_linear(x, w, bias, ab[:2], ab[2:], scales, SPANS, impl=impl)


@pytest.mark.parametrize("impl", ["aten", "reference"])
def test_gradcheck(impl):
    x, w, bias, a, b = operands()
    assert torch.autograd.gradcheck(functools.partial(call, w, bias, impl=impl), (x, *a, *b))


def test_gradcheck_of_a_trained_base():
    x, w, bias, a, b = operands()
    w.requires_grad_()
    bias.requires_grad_()
    everything = lambda x, w, bias, *ab: call(w, bias, x, *ab)  # noqa: E731
    assert torch.autograd.gradcheck(everything, (x, w, bias, *a, *b))


@pytest.mark.parametrize("trained", range(1, 8))
def test_each_subset_of_needed_gradients(trained):
    x, w, bias, a, b = operands()
    inputs = [x, *a, *b]
    groups = [[x], a, b]
    for bit, group in enumerate(groups):
        [t.requires_grad_(bool(trained >> bit & 1)) for t in group]
    call(w, bias, *inputs).sum().backward()
    for bit, group in enumerate(groups):
        assert all((t.grad is not None) == bool(trained >> bit & 1) for t in group)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_narrow_adapter_does_not_round_its_neighbour(compiled):
    torch._dynamo.reset()
    run = torch.compile(call, backend="aot_eager") if compiled else call
    x, w, bias, a, b = operands(torch.float32, m=(197,))
    narrow = a[0].detach().bfloat16().requires_grad_()
    y = run(w, bias, x, narrow, a[1], *b)
    got = torch.autograd.grad(y.sum(), [narrow, a[1]])
    wide = narrow.detach().float().requires_grad_()
    expected = torch.autograd.grad(call(w, bias, x, wide, a[1], *b).sum(), [wide, a[1]])
    torch.testing.assert_close(got[0], expected[0].bfloat16())
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-4)  # bfloat16: 4e-3


def test_one_frozen_adapter_among_two_gets_no_gradient():
    x, w, bias, a, b = operands()
    a[0].requires_grad_(False)
    b[1].requires_grad_(False)
    call(w, bias, x, *a, *b).sum().backward()
    assert [t.grad is not None for t in (*a, *b)] == [False, True, True, False]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), ()])
def test_leading_shapes_and_empty(shape):
    x, w, bias, a, b = operands(m=shape)
    y = call(w, bias, x, *a, *b)
    assert y.shape == (*shape, 20)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(t.grad).all() for t in (*a, *b))


def test_strided_x_and_dy():
    x, w, bias, a, b = operands(m=(4, 6))
    wide = torch.randn(6, 4, 24, dtype=torch.float64)[..., ::2].transpose(0, 1).requires_grad_()
    for dy in (torch.randn(20, 4, 6, dtype=torch.float64).movedim(0, -1), torch.ones(()).double()):
        y = call(w, bias, wide, *a, *b)
        got = torch.autograd.grad(y, [wide, *a], dy.expand_as(y))
        y = call(w, bias, wide, *a, *b, impl="reference")
        expected = torch.autograd.grad(y, [wide, *a], dy.expand_as(y))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_double_backward_fails_loudly(compiled):
    torch._dynamo.reset()
    x, w, bias, a, b = operands()
    run = torch.compile(call, backend="eager") if compiled else call
    y = run(w, bias, x, *a, *b)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", ["aten", "reference"])
@pytest.mark.parametrize("shape", [(2, 7), (7,), ()])
def test_the_output_may_be_written_in_place(shape, impl):
    x, w, bias, a, b = operands(m=shape)
    grads = []
    for relu in (torch.relu, torch.relu_):
        y = relu(call(w, bias, x, *a, *b, impl=impl))
        grads.append(torch.autograd.grad(y.square().sum(), [x, *a, *b]))
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


def test_same_inputs_same_bits():
    x, w, bias, a, b = operands(torch.float32, m=(197,))
    runs = []
    for _ in range(2):
        y = call(w, bias, x, *a, *b)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *a, *b])])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def saved(run):
    """The tensors a call keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


def test_saves_x_and_at_most_h():
    x, w, bias, a, b = operands(torch.float32, m=(64,))
    kept = saved(lambda: call(w, bias, x, *a, *b))
    own = {t.data_ptr() for t in (x, w, *a, *b)}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert sum(t.numel() for t in extra) <= 64 * sum(span.rank for span in SPANS)


def test_frozen_a_saves_h_instead_of_x():
    x, w, bias, a, b = operands(torch.float32, m=(64,))
    [t.requires_grad_(False) for t in a]
    kept = saved(lambda: call(w, bias, x, *a, *b))
    assert x.data_ptr() not in {t.data_ptr() for t in kept}


class TestAutocast:
    def test_computes_in_bf16_and_returns_fp32_gradients(self):
        x, w, bias, a, b = operands(torch.float32, m=(64,))
        with torch.autocast("cpu", torch.bfloat16):
            y = call(w, bias, x, *a, *b)
        assert y.dtype is torch.bfloat16
        y.sum().backward()
        assert {t.grad.dtype for t in (x, *a, *b)} == {torch.float32}

    def test_matches_explicit_bf16(self):
        x, w, bias, a, b = operands(torch.float32, m=(64,))
        with torch.autocast("cpu", torch.bfloat16):
            y = call(w, bias, x, *a, *b)
        explicit = call(w.bfloat16(), bias.bfloat16(), x.bfloat16(), *a, *b)
        assert torch.equal(y, explicit)

    def test_keeps_no_fp32_copy_of_x(self):
        x, w, bias, a, b = operands(torch.float32, m=(64,))
        with torch.autocast("cpu", torch.bfloat16):
            kept = saved(lambda: call(w, bias, x, *a, *b))
        rows = [t for t in kept if t.numel() == x.numel() and t.shape[0] == 64]
        assert [t.dtype for t in rows] == [torch.bfloat16]

    @pytest.mark.parametrize("compiled", [False, True])
    def test_backward_inside_autocast_of_a_forward_outside(self, compiled):
        torch._dynamo.reset()
        run = torch.compile(call, backend="eager") if compiled else call
        x, w, bias, a, b = operands(torch.float32, m=(64,))
        expected = torch.autograd.grad(call(w, bias, x, *a, *b).sum(), [x, *a, *b])
        y = run(w, bias, x, *a, *b)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(y.sum(), [x, *a, *b])
        torch.testing.assert_close(got, expected)

    def test_leaves_float64_alone(self):
        x, w, bias, a, b = operands()
        with torch.autocast("cpu", torch.bfloat16):
            assert call(w, bias, x, *a, *b).dtype is torch.float64


class TestCompile:
    def compiled(self, **options):
        torch._dynamo.reset()
        frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        return torch.compile(call, fullgraph=True, backend=frames, **options), frames

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_same_values_and_gradients(self, dtype):
        x, w, bias, a, b = operands(dtype)
        traced, _ = self.compiled()
        runs = []
        for run in (call, traced):
            y = run(w, bias, x, *a, *b)
            runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *a, *b])])
        torch.testing.assert_close(runs[0], runs[1])

    def test_no_recompile_when_rows_change(self):
        traced, frames = self.compiled(dynamic=True)
        scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
        for m in (5, 64, 197, 300):
            x, w, bias, a, b = operands(torch.float32, m=(m,))
            traced(w, bias, x, *a, *b, scales=scales).sum().backward()
        assert frames.frame_count == 1

    def test_no_recompile_when_the_scale_changes(self):
        traced, frames = self.compiled()
        x, w, bias, a, b = operands()
        scales = torch.tensor([1.0, 1.0], dtype=torch.float64)
        for value in (1.0, 0.5, 3.0):
            scales.fill_(value)
            y = traced(w, bias, x, *a, *b, scales=scales)
            torch.testing.assert_close(y, call(w, bias, x, *a, *b, scales=(value, value)))
        assert frames.frame_count == 1

    def test_autocast(self):
        x, w, bias, a, b = operands(torch.float32)
        traced, _ = self.compiled()
        with torch.autocast("cpu", torch.bfloat16):
            y = traced(w, bias, x, *a, *b)
            expected = call(w, bias, x, *a, *b)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y, expected)

    @pytest.mark.parametrize("needs_a", [True, False])
    def test_opcheck(self, needs_a):
        from fused_lora.ops import lora_linear_traced as ops
        from fused_lora.types import Needs

        x, w, bias, a, b = operands()
        [t.requires_grad_(needs_a) for t in a]
        rows = x.detach().reshape(-1, 12).requires_grad_()
        needs = ops._bits(Needs(a=needs_a))
        flat = [number for span in SPANS for number in (span.start, span.stop, span.rank)]
        scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
        keep = "hidden"
        arguments = (rows, w, bias, a, b, scales, flat, needs, keep, "auto")
        torch.library.opcheck(torch.ops.fused_lora.lora_linear.default, arguments)
        x, w, a, b = rows.detach(), w, [t.detach() for t in a], [t.detach() for t in b]
        arguments = (torch.randn(14, 20).double(), x, w, torch.randn(14, 5).double(), a, b)
        arguments += (scales, flat, needs, keep, "auto")
        torch.library.opcheck(torch.ops.fused_lora.lora_linear_backward.default, arguments)

    def test_impl_is_heard(self):
        torch._dynamo.reset()
        graphs = []
        backend = lambda graph, _: graphs.append(graph.code) or graph  # noqa: E731
        x, w, bias, a, b = operands()
        traced = torch.compile(call, fullgraph=True, backend=backend)
        y = traced(w, bias, x, *a, *b, impl="reference")
        torch.testing.assert_close(y, call(w, bias, x, *a, *b))
        assert "fused_lora" not in graphs[0]

    def test_a_compiled_call_is_not_taken_for_an_exported_one(self):
        torch._dynamo.reset()
        graphs = []
        backend = lambda graph, _: graphs.append(graph.code) or graph  # noqa: E731
        x, w, bias, a, b = operands()
        torch.compile(call, fullgraph=True, backend=backend)(w, bias, x, *a, *b)
        assert "fused_lora.lora_linear(" in graphs[0]


def test_inference_mode_and_no_grad():
    x, w, bias, a, b = operands(torch.float32)
    expected = call(w, bias, x, *a, *b).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = call(w, bias, x, *a, *b)
        assert torch.equal(y, expected) or torch.allclose(y, expected, atol=1e-5)
        assert not y.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_without_gradients_the_plan_is_one_for_inference(compiled, monkeypatch):
    from fused_lora.ops import lora_linear, lora_linear_traced

    asked = []
    for room in (lora_linear, lora_linear_traced):
        spy = lambda *q, plan_for=room.plan_for: asked.append(q[6]) or plan_for(*q)  # noqa: E731
        monkeypatch.setattr(room, "plan_for", spy)
    torch._dynamo.reset()
    run = torch.compile(call, backend="aot_eager") if compiled else call
    x, w, bias, a, b = operands()
    with torch.no_grad():
        run(w, bias, x, *a, *b)
    assert asked
    assert all(needs == lora_linear.NO_GRADIENT for needs in asked)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    x, w, bias, a, b = operands()
    plain = torch.autograd.grad(call(w, bias, x, *a, *b).sum(), [x, *a, *b])
    y = checkpoint(functools.partial(call, w, bias), x, *a, *b, use_reentrant=use_reentrant)
    y.sum().backward()
    for ours, theirs in zip([x, *a, *b], plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
