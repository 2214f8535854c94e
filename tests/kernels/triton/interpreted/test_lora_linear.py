"""Every plan of Triton's, and the operation with impl="triton", against float64."""

import random

import pytest
import torch

from fused_lora.kernels.triton import lora_linear as triton
from fused_lora.kernels.triton.tiles import BulkTile
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.planning import problem
from fused_lora.plan.strategies import candidates, keeps_x
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Keep, Needs, Plan, Span
from tests.kernels.triton.cases import CASES, Case, adapters, build, lowered
from tests.kernels.triton.interpreted.serving import serving, small_tiles  # noqa: F401
from tests.ops.problems import Problem
from tests.ops.test_parity import named, reference_run

SMALL = Case("two groups, odd", 53, 33, 45, (Span(0, 21, 5), Span(30, 45, 3)))
MERGES = Case("more h than w", 70, 17, 19, (Span(0, 19, 6),))
pytestmark = pytest.mark.usefixtures("small_tiles")
NEEDS = [Needs(*(bool(bits >> i & 1) for i in range(5))) for bits in range(32)]
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def plans(p: Problem, needs: Needs) -> list[Plan]:
    (m, k), n = p.x.shape, p.w.shape[0]
    question = problem(m, k, n, p.spans, p.x.dtype, p.bias is not None, needs)
    return candidates(question, [Backend.TRITON])


def triton_run(p: Problem, plan: Plan, needs: Needs):
    """y and the gradients by ``plan``, given only what it says it keeps."""
    y, kept = triton.forward(p.x, p.w, p.bias, adapters(p), plan)
    assert (kept is None) == (plan.keep is Keep.NOTHING)
    x = p.x if keeps_x(needs, plan) else None
    w = None if plan.keep is Keep.MERGED or not needs.x else p.w
    grads = triton.backward(p.dy, x, kept, w, adapters(p), needs, plan)
    absent = [grads.x, grads.w, grads.bias, grads.a[0], grads.b[0]]
    assert [g is not None for g in absent] == [needs.x, needs.w, needs.bias, needs.a, needs.b]
    for own, got in zip((*p.a, *p.b), (*grads.a, *grads.b), strict=True):
        assert got is None or (got.dtype, got.shape) == (own.dtype, own.shape)
    return [("y", y), *named(grads, needs)]


def check(p: Problem, plan: Plan, needs: Needs) -> None:
    dtype = p.x.dtype
    plain = in_every_order(lambda: dict(reference_run(lowered(p, dtype), needs)))
    truth = dict(reference_run(p.double(), needs))
    verdict = judge_all(dict(triton_run(p, plan, needs)), plain, truth, dtype)
    assert verdict.passed, f"{plan} {verdict}"


@pytest.mark.parametrize(
    "needs", NEEDS, ids=lambda needs: "".join("01"[n] for n in vars(needs).values())
)
def test_every_subset_of_gradients(needs):
    rng = random.Random(sum(vars(needs).values()))
    for case, dtype in zip((SMALL, MERGES, SMALL), DTYPES, strict=True):
        p = build(case, dtype, torch.float32)
        check(p, rng.choice(plans(p, needs)), needs)


@pytest.mark.parametrize("case", [SMALL, MERGES], ids=["two groups", "merges"])
def test_every_plan(case):
    p = build(case, torch.bfloat16, torch.float32)
    found = plans(p, Needs(bias=True))
    assert {plan.keep for plan in found} >= {Keep.NOTHING, Keep.HIDDEN}
    assert (Keep.MERGED in {plan.keep for plan in found}) == (case is MERGES)
    for plan in found:
        check(p, plan, Needs(bias=True))


def test_no_rows():
    p = build(CASES[7], torch.bfloat16, torch.float32)
    for plan in plans(p, Needs(bias=True)):
        assert all(torch.isfinite(t).all() for _, t in triton_run(p, plan, Needs(bias=True)))


def test_adapters_of_mixed_dtypes_and_odd_strides():
    p = build(SMALL, torch.bfloat16, torch.float32)
    p.a[0], p.b[1] = p.a[0].bfloat16(), p.b[1].double()
    p.bias = torch.randn(2 * len(p.bias)).bfloat16()[::2]
    p.w = p.w.t().contiguous().t()
    for plan in plans(p, Needs())[::4]:
        check(p, plan, Needs())


def test_a_single_column_whatever_torch_calls_contiguous():
    p = build(Case("one column", 37, 1, 1, (Span(0, 1, 1),)), torch.float32, torch.float32)
    p.x, p.dy = (torch.randn(37, 5)[:, 2:3] for _ in range(2))
    p.x = p.x.contiguous().as_strided((37, 1), (1, 7))
    assert p.x.is_contiguous() and p.x.stride(1) == 7
    for plan in plans(p, Needs())[::4]:
        check(p, plan, Needs())


def test_operands_without_descriptors_are_copied_for_a_tile_that_needs_them(monkeypatch):
    tile = BulkTile(64, 64, 64, 2, 4)
    small = triton.tile_of
    choose = lambda kernel, *shape: tile if kernel == "extended" else small(kernel, *shape)  # noqa: E731
    monkeypatch.setattr(triton, "tile_of", choose)
    p = build(Case("aligned sizes", 37, 72, 88, (Span(0, 88, 5),)), torch.bfloat16, torch.float32)
    p.x, p.dy = torch.randn(37, 73).bfloat16()[:, 1:], torch.randn(37, 91).bfloat16()[:, 3:]
    for plan in plans(p, Needs()):
        if str(plan) == "triton:extended/extended/rank/hidden":
            check(p, plan, Needs())


def test_a_producers_bordered_buffer_takes_h():
    p = build(SMALL, torch.bfloat16, torch.float32)
    (plan,) = [q for q in plans(p, Needs()) if str(q) == "triton:extended/extended/rank/hidden"]
    y, h = triton.forward(p.x, p.w, p.bias, adapters(p), plan)
    buffer = torch.full((53, 33 + 8), torch.nan, dtype=torch.bfloat16)
    buffer[:, :33] = p.x
    again, kept = triton.forward(buffer[:, :33], p.w, p.bias, adapters(p), plan, buffer)
    assert torch.equal(again, y) and torch.equal(kept, h) and torch.equal(buffer[:, 33:], h)


@pytest.mark.parametrize("bulk", [False, True])
def test_h_that_is_there_already_is_read_where_it_lies(monkeypatch, bulk):
    tile, small = BulkTile(64, 64, 64, 2, 4), triton.tile_of
    choose = lambda kernel, *shape: tile if kernel == "extended" else small(kernel, *shape)  # noqa: E731
    if bulk:
        monkeypatch.setattr(triton, "tile_of", choose)
    p = build(Case("aligned sizes", 37, 72, 88, (Span(0, 88, 5),)), torch.bfloat16, torch.float32)
    (plan,) = [q for q in plans(p, Needs()) if str(q) == "triton:extended/extended/rank/hidden"]
    y, h = triton.forward(p.x, p.w, p.bias, adapters(p), plan)
    of_many = torch.full((37, 14), torch.nan, dtype=torch.bfloat16)
    of_many[:, 3:8] = h
    again, _ = triton.forward(p.x, p.w, p.bias, adapters(p), plan, h=of_many[:, 3:8])
    assert torch.equal(again, y)


class TestOperation:
    """lora_linear(..., impl="triton"): autograd, autocast, tracing."""

    def operands(self, dtype):
        p = build(SMALL, dtype, torch.float32)
        leaves = [t.detach().requires_grad_() for t in (p.x, *p.a, *p.b)]
        return p, leaves

    def run(self, p, leaves, impl="triton"):
        x, a, b = leaves[0], leaves[1:3], leaves[3:]
        y = lora_linear(x, p.w, p.bias, a, b, p.scales, p.spans, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, p.dy.to(y.dtype))]

    @pytest.mark.usefixtures("serving")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_autograd(self, dtype):
        p, leaves = self.operands(dtype)
        low, exact = lowered(p, dtype), p.double()
        as_leaves = lambda q: [t.detach().requires_grad_() for t in (q.x, *q.a, *q.b)]  # noqa: E731
        plain = in_every_order(lambda: self.run(low, as_leaves(low), "reference"))
        truth = self.run(exact, as_leaves(exact), "reference")
        verdict = judge_all(self.run(p, leaves), plain, truth, dtype)
        assert verdict.passed, str(verdict)

    @pytest.mark.usefixtures("serving")
    def test_autocast_is_the_explicit_cast(self):
        p, leaves = self.operands(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            ours = self.run(p, leaves)
        p.x, p.w, p.bias = p.x.bfloat16(), p.w.bfloat16(), p.bias.bfloat16()
        explicit = self.run(p, [p.x.detach().requires_grad_(), *leaves[1:]])
        assert [t.dtype for t in ours] == [torch.bfloat16, *[torch.float32] * 5]
        for mine, theirs in zip(ours, explicit, strict=True):
            assert torch.equal(mine, theirs.to(mine.dtype))

    @pytest.mark.usefixtures("serving")
    def test_traced(self):
        p, leaves = self.operands(torch.float32)
        run = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
        x, a, b = leaves[0], leaves[1:3], leaves[3:]
        y = run(x, p.w, p.bias, a, b, p.scales, p.spans, impl="triton")
        grads = torch.autograd.grad(y, leaves, p.dy)
        for mine, theirs in zip([y, *grads], self.run(p, leaves, "aten"), strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_a_program_that_records_gets_operations_it_can_record(self, serving):  # noqa: F811
        from torch.fx.experimental.proxy_tensor import make_fx

        serving.setattr(
            "fused_lora.plan.cost_kernels.TRITON_EFFICIENCY", 1e6
        )  # Triton is what auto takes
        serving.setattr("fused_lora.plan.cost_kernels.TRITON_LAUNCH_CALLS", 0.0)
        p, leaves = self.operands(torch.float32)
        call = lambda x, impl: lora_linear(x, p.w, p.bias, p.a, p.b, p.scales, p.spans, impl=impl)  # noqa: E731
        eager = call(p.x, "auto")
        (plan,) = {str(q) for q in self.chosen(p)}
        assert plan.startswith("triton:")
        graph = make_fx(lambda x: call(x, "auto"))(p.x)
        torch.testing.assert_close(graph(p.x), eager)
        assert not torch.equal(graph(2 * p.x), graph(p.x))
        with pytest.raises(RuntimeError, match="impl='triton' cannot serve: .*traced"):
            make_fx(lambda x: call(x, "triton"))(p.x)

    def chosen(self, p):
        from fused_lora.ops.lora_linear import NO_GRADIENT, call_plan

        return [call_plan(p.x, p.w, p.bias is not None, p.spans, NO_GRADIENT)]

    @pytest.mark.usefixtures("serving")
    def test_what_triton_lacks_is_said(self):
        p = build(SMALL, torch.float64, torch.float64)
        with pytest.raises(RuntimeError, match="impl='triton' cannot serve: .*not in float64"):
            lora_linear(p.x, p.w, p.bias, p.a, p.b, p.scales, p.spans, impl="triton")
