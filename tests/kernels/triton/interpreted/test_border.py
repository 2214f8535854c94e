"""Packed borders and those beside w: what they hold, and that a pass packs once at most."""

from dataclasses import replace

import pytest
import torch

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import border
from fused_lora.kernels.triton import lora_linear as triton
from fused_lora.kernels.triton import lora_merge as merging
from fused_lora.ops import backends, lora_grad_backends, lora_linear
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Forward, Gradient, Impl, Keep, Needs, Plan, Span
from tests.kernels.triton.cases import CASES, DTYPES, IDS, adapters, build, lowered
from tests.kernels.triton.guards import fenced
from tests.kernels.triton.interpreted.serving import serving, small_tiles  # noqa: F401
from tests.kernels.triton.interpreted.test_lora_linear import SMALL, plans
from tests.ops.test_parity import named, reference_run

PASSES = Needs(bias=True)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_half_is_one_matrix_with_zeros_beside_its_blocks(case, dtype, monkeypatch):
    held = torch.bfloat16 if dtype is torch.float32 else torch.float32
    p = build(case, dtype, held)
    with fenced(monkeypatch):
        both = border.packed(adapters(p), dtype)
    rank = sum(span.rank for span in p.spans)
    a = torch.cat([block.to(dtype) for block in p.a])
    b, first = torch.zeros(rank, case.n, dtype=dtype), 0
    for block, span in zip(p.b, p.spans, strict=True):
        b[first : first + span.rank, span.start : span.stop] = block.t().to(dtype)
        first += span.rank
    for found, expected in ((both.a, a), (both.b, b)):
        assert found.dtype is dtype and found.shape[1] % 16 == 0 and found.is_contiguous()
        wide = torch.zeros(rank, max(found.shape[1], expected.shape[1]), dtype=dtype)
        wide[:, : expected.shape[1]] = expected
        assert torch.equal(found, wide[:, : found.shape[1]])
        assert not wide[:, found.shape[1] :].any()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_several_in_one_launch_are_those_of_one_each(case, monkeypatch):
    other = build(CASES[0], torch.bfloat16, torch.float32)
    every = [adapters(build(case, torch.bfloat16, torch.float32)), adapters(other)]
    made = []
    monkeypatch.setattr(border, "launch", lambda *args: (made.append(1), launch(*args))[1])
    with fenced(monkeypatch):
        found = border.packed_together(every, torch.bfloat16)
    assert len(made) == 1
    for both, own in zip(found, every, strict=True):
        alone = border.packed(own, torch.bfloat16)
        assert torch.equal(both.a, alone.a) and torch.equal(both.b, alone.b)
        assert both[2:] == alone[2:]


def test_what_products_can_read_stays_where_it_is():
    p = build(CASES[3], torch.float32, torch.float32)
    given = adapters(p)
    assert border.packed(given, torch.float32) is given
    both = border.packed(given, torch.float16)
    assert border.packed(both, torch.float16) is both
    a, b = torch.zeros(16, 40).half(), torch.zeros(56, 16).half()
    whole = Adapters([a], [b], (1.0,), (Span(0, 56, 16),))
    assert border.packed(whole, torch.float16) is whole
    for other in (
        whole._replace(spans=(Span(8, 64, 16),)),
        whole._replace(a=[torch.zeros(16, 41).half()]),
        whole._replace(b=[torch.zeros(56, 24).half()[:, 1:17]]),
        Adapters([a, a], [b, b], (1.0, 1.0), (Span(0, 56, 16), Span(56, 112, 16))),
    ):
        assert isinstance(border.packed(other, torch.float16), border.Packed)


@pytest.mark.parametrize("dtype, packs", [(torch.bfloat16, 1), (torch.float32, 0)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_a_pass_packs_once_at_most(dtype, packs, monkeypatch):
    made = []
    monkeypatch.setattr(border, "launch", lambda *args: (made.append(1), launch(*args))[1])
    p = build(SMALL, dtype, torch.float32)
    for plan in plans(p, PASSES)[::3]:
        assert plan.backend is Backend.TRITON
        made.clear()
        _, kept = triton.forward(p.x, p.w, p.bias, adapters(p), plan)
        forward, _ = len(made), made.clear()
        triton.backward(p.dy, p.x, kept, p.w, adapters(p), PASSES, plan)
        assert max(forward, len(made)) <= packs, str(plan)
        if "merge" not in str(plan):
            assert forward == len(made) == packs, str(plan)


def beside(p, dtype):
    """[w | s b] and [w ; a], each number of a border rounded once."""
    right, first = p.w.new_zeros(p.w.shape[0], sum(span.rank for span in p.spans)), 0
    for b, s, span in zip(p.b, p.scales, p.spans, strict=True):
        own = slice(span.start, span.stop), slice(first, first + span.rank)
        right[own] = (b.float() * s).to(dtype)
        first += span.rank
    return torch.cat((p.w, right), 1), torch.cat((p.w, *(a.to(dtype) for a in p.a)))


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w_is_copied_and_each_border_rounded_once(case, dtype, monkeypatch):
    for held in dict.fromkeys((torch.float32, dtype, torch.float16)):
        p = build(case, dtype, held)
        for w in (p.w, p.w.t().contiguous().t(), p.w.repeat(2, 2)[::2, : case.k]):
            given = replace(p, w=w)
            with fenced(monkeypatch):
                right = merging.bordered_weight(w, adapters(given))
                below = merging.bordered_weight_rows(w, adapters(given))
            for found, expected in zip((right, below), beside(given, dtype), strict=True):
                assert found.is_contiguous() and torch.equal(found, expected), (held, w.stride())


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32], ids=str)
def test_of_scales_that_are_powers_of_two_it_is_as_the_library_has_it(held):
    p = replace(build(CASES[4], torch.bfloat16, held), scales=(0.5, 4.0))
    low = adapters(p).to(torch.bfloat16)
    assert torch.equal(merging.bordered_weight(p.w, adapters(p)), aten.bordered_weight(p.w, low))


def test_a_border_goes_where_it_is_told():
    p = build(CASES[3], torch.bfloat16, torch.float32)
    (n, k), rank, room = p.w.shape, 12, torch.full((200, 200), torch.nan, dtype=torch.bfloat16)
    right, below = room[:n, 1 : 1 + k + rank], room[: n + rank, :k]
    expected = beside(p, torch.bfloat16)
    assert merging.bordered_weight(p.w, adapters(p), right) is right
    assert torch.equal(right, expected[0]) and room[n:].isnan().all()
    room.fill_(torch.nan)
    assert merging.bordered_weight_rows(p.w, adapters(p), below) is below
    assert torch.equal(below, expected[1]) and room[:, k:].isnan().all()
    with pytest.raises(AssertionError):
        merging.bordered_weight(p.w, adapters(p), below)


def test_of_nothing_there_is_a_border_at_most():
    a, b = torch.randn(3, 0), torch.randn(5, 3)
    group = Adapters([a], [b], (2.0,), (Span(0, 5, 3),))
    w = torch.zeros(5, 0)
    assert torch.equal(merging.bordered_weight(w, group), 2 * b)
    assert merging.bordered_weight_rows(w, group).shape == (8, 0)
    none = group._replace(b=[b[:0]], spans=(Span(0, 0, 3),))
    assert merging.bordered_weight(w[:0], none).shape == (0, 3)


@pytest.fixture
def made(serving) -> list[str]:  # noqa: F811
    """What was made in one launch for a library's product, in order."""
    found: list[str] = []
    for name, side in (("bordered_weight", "right"), ("bordered_weight_rows", "below")):
        right = getattr(merging, name)

        def watched(*given, right=right, side=side):
            found.append(side)
            return right(*given)

        serving.setattr(merging, name, watched)
    serving.setattr(lora_grad_backends, "_trusted", lambda *_: False)  # nor does it run
    return found


ONE = Plan(Forward.BORDERED, Forward.BORDERED, Gradient.RANK, Keep.HIDDEN)
BY_CUDA = replace(ONE, grads_by=Backend.CUDA)


def by_operation(p, plan, impl=Impl.AUTO, needs=PASSES):
    """y and the gradients."""
    given = (p.w, p.bias, adapters(p))
    y, kept = lora_linear.forward(p.x, *given, plan, impl)
    grads = lora_linear.backward(p.dy, p.x, kept, p.w, adapters(p), needs, plan, impl)
    return {"y": y, **dict(named(grads, needs))}


def within(ours, p):
    dtype = p.x.dtype
    plain = in_every_order(lambda: dict(reference_run(lowered(p, dtype), PASSES)))
    verdict = judge_all(ours, plain, dict(reference_run(p.double(), PASSES)), dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("plan", [ONE, BY_CUDA, replace(BY_CUDA, writes_dh=True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_the_library_is_given_what_one_launch_made(made, dtype, plan):
    p = build(SMALL, dtype, torch.float32)
    p = replace(p, a=[p.a[0], p.a[1].double()], b=[p.b[0].double(), p.b[1]])  # of two dtypes
    within(by_operation(p, plan), p)
    assert made == ["right", "below"]


@pytest.mark.parametrize("plan", [ONE, BY_CUDA], ids=str)
def test_where_the_library_makes_it(made, serving, plan):  # noqa: F811
    p = build(SMALL, torch.bfloat16, torch.float32)
    expected = by_operation(p, plan, Impl.ATEN)  # which asks for no kernel
    serving.setattr(backends, "distrust", lambda *_: "it is wrong")
    alone = by_operation(p, plan)
    serving.undo()  # and where Triton does not serve
    found = [alone, *([by_operation(p, plan)] if plan is ONE else [])]
    assert all(torch.equal(ours[name], t) for ours in found for name, t in expected.items())
    assert not made


def test_no_side_is_made_that_nothing_reads(made):
    p = build(SMALL, torch.bfloat16, torch.float32)
    by_operation(p, replace(ONE, forward=Forward.SEPARATE), needs=replace(PASSES, x=False))
    by_operation(p, replace(ONE, forward=Forward.SEPARATE, dx=Forward.SEPARATE))
    assert not made
    by_operation(p, replace(ONE, dx=Forward.SEPARATE))
    by_operation(p, replace(ONE, forward=Forward.SEPARATE))
    assert made == ["right", "below"]


def test_a_program_makes_them_of_what_adapters_are_at_each_step(made, serving):  # noqa: F811
    serving.setattr(lora_linear, "call_plan", lambda *_, **__: ONE)
    p = build(SMALL, torch.bfloat16, torch.float32)
    leaves = [t.requires_grad_() for t in (p.x, p.bias, *p.a, *p.b)]
    for _ in range(3):
        y = lora_linear.lora_linear(p.x, p.w, p.bias, p.a, p.b, p.scales, p.spans)
        dx, dbias, *others = torch.autograd.grad(y, leaves, p.dy)
        da, db = (torch.cat([t.flatten() for t in half]) for half in (others[:2], others[2:]))
        with torch.no_grad():
            ours = {"y": y.detach(), "dx": dx, "dbias": dbias, "da": da, "db": db}
            within(ours, p)
            for t in (*p.a, *p.b):
                t.mul_(-1.5)
    assert made == ["right", "below"]  # when it was recorded


launch = border.launch
