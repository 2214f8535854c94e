"""Several linears on one x: what lora_linear gives one by one, from fewer products."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import lora_linear
from fused_lora.bench.saved_tensors import SavedBytes
from fused_lora.ops.lora_linear_many import LoRALinearMany, lora_linear_many
from fused_lora.ops.operand import Adapted
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Forward, Span
from tests.observe import operations
from tests.ops.plans import fix_plans

WIDTHS, RANKS, K = (24, 16, 24), (3, 4, 1), 20
SPLIT = (Span(0, 7, 2), Span(9, 16, 2))  # the second matrix holds two adapters


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """The same on every machine."""
    fix_plans(monkeypatch)


def layers(dtype=torch.float64, adapters=None, k=K, widths=WIDTHS, ranks=RANKS):
    """Three matrices, the second with two adapters and no bias."""
    torch.manual_seed(0)
    found = []
    for i, (n, r) in enumerate(zip(widths, ranks, strict=True)):
        spans = SPLIT if i == 1 else (Span(0, n, r),)
        a = [torch.randn(s.rank, k, dtype=adapters or dtype).div_(k**0.5) for s in spans]
        b = [torch.randn(s.width, s.rank, dtype=adapters or dtype) for s in spans]
        for half in (*a, *b):
            half.requires_grad_()
        w, bias = torch.randn(n, k, dtype=dtype) / k**0.5, torch.randn(n, dtype=dtype)
        found.append(Adapted(w, None if i == 1 else bias, a, b, (0.5,) * len(spans), spans))
    return found


def apart(x, given):
    return [lora_linear(x, *each[:6], impl=each.impl) for each in given]


def halves(given):
    return [half for each in given for half in (*each.a, *each.b)]


def outcome(run, x, given, dys):
    ys = run(x, given)
    wanted = [t for t in (x, *halves(given)) if t.requires_grad]
    return [*ys, *torch.autograd.grad(ys, wanted, dys)]


@pytest.mark.parametrize("shape", [(2, 7), (197,), (0,), (1,), ()])
def test_values_and_gradients_are_those_of_each(shape):
    given, x = layers(), torch.randn(*shape, K, dtype=torch.float64).requires_grad_()
    dys = [torch.randn(*shape, n, dtype=torch.float64) for n in WIDTHS]
    ours, theirs = (outcome(run, x, given, dys) for run in (lora_linear_many, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    given = layers(k=5, widths=(4, 16, 3), ranks=(2, 4, 1))
    x = torch.randn(3, 5, dtype=torch.float64).requires_grad_()

    def run(x, *ab):
        left = iter(ab)
        new = [e._replace(a=[next(left) for _ in e.a], b=[next(left) for _ in e.b]) for e in given]
        return lora_linear_many(x, new)

    assert torch.autograd.gradcheck(run, (x, *halves(given)))


@pytest.mark.parametrize("trained", range(1, 8))
def test_each_subset_of_needed_gradients(trained):
    given, x = layers(), torch.randn(6, K, dtype=torch.float64)
    groups = [[x], [a for e in given for a in e.a], [b for e in given for b in e.b]]
    for bit, group in enumerate(groups):
        for t in group:
            t.requires_grad_(bool(trained >> bit & 1))
    dys = [torch.randn(6, n, dtype=torch.float64) for n in WIDTHS]
    ours, theirs = (outcome(run, x, given, dys) for run in (lora_linear_many, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_trained_base_and_one_frozen_matrix_among_three():
    given, x = layers(), torch.randn(6, K, dtype=torch.float64)
    given[0].w.requires_grad_()
    given[0].bias.requires_grad_()
    for half in (*given[1].a, *given[1].b):
        half.requires_grad_(False)
    wanted = [given[0].w, given[0].bias, *given[0].a, *given[2].a, *given[2].b]
    found = [torch.autograd.grad(sum(y.square().sum() for y in run(x, given)), wanted)
             for run in (lora_linear_many, apart)]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_an_output_that_nobody_uses_trains_nothing():
    given, x = layers(), torch.randn(6, K, dtype=torch.float64).requires_grad_()
    _, y, _ = lora_linear_many(x, given)
    y.sum().backward()
    used = [half.grad is not None for half in halves(given)]
    assert used == [False] * 2 + [True] * 4 + [False] * 2
    (expected,) = torch.autograd.grad(apart(x, given)[1].sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_bordered_plans_round_once(monkeypatch):
    fix_plans(monkeypatch, Forward.BORDERED)
    given, x = layers(torch.bfloat16), torch.randn(31, K).bfloat16()
    torch.testing.assert_close(list(lora_linear_many(x, given)), apart(x, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["fp32", "same"])
def test_within_the_yardstick(dtype, adapters):
    given = layers(dtype, adapters, k=96)
    x = torch.randn(197, 96).to(dtype).requires_grad_()
    dys = [torch.randn(197, n).to(dtype) for n in WIDTHS]
    up = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    wide = [e._replace(w=up(e.w), bias=up(e.bias), a=list(map(up, e.a)), b=list(map(up, e.b)))
            for e in given]  # fmt: skip
    ours = outcome(lora_linear_many, x, given, dys)
    plain = in_every_order(lambda: outcome(composed, x, given, dys))
    truth = outcome(composed, up(x), wide, [dy.double() for dy in dys])
    verdict = judge_all(ours, plain, truth, dtype)
    assert verdict.passed, str(verdict)


def composed(x, given):
    """Plain torch, one by one."""
    ys = []
    for w, bias, a, b, scales, spans, *_ in given:
        y = torch.nn.functional.linear(x, w, bias)
        for a_g, b_g, s, span in zip(a, b, scales, spans, strict=True):
            low = (x @ a_g.to(x.dtype).t()) @ b_g.to(x.dtype).t() * s
            y = y + torch.nn.functional.pad(low, (span.start, y.shape[-1] - span.stop))
        ys.append(y)
    return ys


class Products(TorchDispatchMode):
    """Counts matrix products, additions to a whole dx, and casts of a whole x."""

    def __init__(self, like: torch.Size) -> None:
        super().__init__()
        self.products, self.sums, self.casts, self.like = 0, 0, 0, like

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        whole = isinstance(out, torch.Tensor) and out.numel() == self.like.numel()
        self.products += name in ("mm", "addmm", "addmm_")
        self.sums += whole and name in ("add", "add_")
        self.casts += whole and name == "_to_copy"
        return out


@pytest.mark.parametrize(
    ("autocast", "counts"),
    [(False, ((18, 0, 0), (24, 2, 0))), (True, ((18, 0, 2), (24, 2, 6)))],  # three matrices
)
def test_fewer_products_and_no_sums(autocast, counts):
    given = wide_layers()
    for run, expected in zip((lora_linear_many, apart), counts, strict=True):
        x = torch.randn(2, 30, 64).requires_grad_()
        with Products(x.shape) as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ys = run(x, given)
            sum(y.float().sum() for y in ys).backward()
        assert (seen.products, seen.sums, seen.casts) == expected


def wide_layers():
    return [
        Adapted(torch.randn(48, 64), torch.randn(48), [torch.randn(4, 64).requires_grad_()],
                [torch.randn(48, 4).requires_grad_()], (0.5,), (Span(0, 48, 4),)) for _ in range(3)
    ]  # fmt: skip


def test_under_autocast_x_is_kept_once():
    given, x = wide_layers(), torch.randn(2, 30, 64).requires_grad_()
    kept = []
    for run in (lora_linear_many, apart):
        with torch.autocast("cpu", torch.bfloat16), SavedBytes(torch.nn.Identity()) as saved:
            ys = run(x, given)
        kept.append(saved)
        del ys
    x_bytes = 60 * 64 * 2
    assert kept[1].total - kept[0].total == 2 * x_bytes


def test_plans_without_h_are_computed_one_by_one(monkeypatch):
    fix_plans(monkeypatch, Forward.MERGE)
    seen = operations(monkeypatch, LoRALinearMany)
    given, x = wide_layers(), torch.randn(30, 64)
    torch.testing.assert_close(list(lora_linear_many(x, given)), composed(x, given))
    assert not seen


def test_transforms_and_traces_see_each():
    given, x = layers(), torch.randn(6, K, dtype=torch.float64)
    jvp = torch.func.jvp(lambda x: lora_linear_many(x, given)[0], (x,), (x,))[1]
    torch.testing.assert_close(jvp, torch.func.jvp(lambda x: apart(x, given)[0], (x,), (x,))[1])


def test_no_layers_and_double_backward_are_refused():
    x = torch.randn(6, K, dtype=torch.float64).requires_grad_()
    with pytest.raises(ValueError, match="no layers"):
        lora_linear_many(x, [])
    y = lora_linear_many(x, layers())[0]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="must end in K = 20"):
        lora_linear_many(x[:, :5], layers())
