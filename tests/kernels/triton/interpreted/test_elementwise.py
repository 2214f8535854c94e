"""Partners end to end by Triton, once it is trusted: norms, GELU, dropout, whole models merged."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora
from fused_lora.kernels.aten import lora_linear as aten_linear
from fused_lora.kernels.interface import Epilogue
from fused_lora.kernels.triton import lora_linear
from fused_lora.kernels.triton import lora_merge as launched
from fused_lora.kernels.triton import lora_shrink as shrinks
from fused_lora.ops import elementwise
from fused_lora.ops import lora_merge as merging
from fused_lora.ops.chain import linear as linear_stage
from fused_lora.ops.lora_block import layer_norm_lora_linear, lora_mlp
from fused_lora.ops.lora_expand import lora_add
from fused_lora.ops.lora_linear import Frame, compute
from fused_lora.ops.lora_merge import Job, lora_merge, lora_merge_many
from fused_lora.ops.lora_shrink import shrink
from fused_lora.reference import dropout as reference
from fused_lora.reference import lora_linear as reference_linear
from fused_lora.testing.yardstick import error, in_every_order, judge_all
from fused_lora.types import Forward, Gradient, Impl, Keep, Plan, Span
from fused_lora.verify import verdicts
from tests.kernels.triton.cases import CASES, TILE, adapters, build, lowered
from tests.kernels.triton.interpreted.serving import serving  # noqa: F401
from tests.ops.block_problems import cast, matrix, norm, plain_linear, plain_norm

BF16 = torch.bfloat16


def test_rows_in_a_bordered_buffer(checking):
    x, gamma = torch.randn(9, 40).to(BF16), torch.randn(40)
    bordered = torch.zeros(9, 48, dtype=BF16)
    runs = (
        lambda impl: (
            elementwise.layer_norm_forward(x, gamma, gamma, 1e-6, bordered[:, :40], impl=impl).y
        ),
        lambda impl: elementwise.gelu_forward(x, "erf", bordered[:, :40], impl=impl),
        lambda impl: elementwise.gelu_input_grad(x, x, "tanh", impl=impl),
    )
    for run in runs:
        ours, plain = run(Impl.AUTO).clone(), run(Impl.ATEN).clone()
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
        assert not bordered[:, 40:].any()
    assert elementwise.layer_norm_places(x) and elementwise.gelu_places(x)
    *_, mean, rstd = elementwise.layer_norm_forward(x, gamma, gamma, 1e-6)
    for impl in (Impl.TRITON, Impl.ATEN):  # statistics of one serve the other
        elementwise.layer_norm_input_grad(x, x, gamma, mean, rstd, x, impl=impl)
        elementwise.layer_norm_rebuild(x, gamma, gamma, mean, rstd, impl=impl)


def test_a_broken_norm_never_serves(checking):
    from fused_lora.kernels.triton import elementwise as kernels

    right = kernels.layer_norm_forward

    def broken(x, *arguments, **options):
        found = right(x, *arguments, **options)
        found.y[-1, -1] += 1
        return found

    checking.setattr(kernels, "layer_norm_forward", broken)
    x = torch.randn(9, 40)
    with pytest.warns(RuntimeWarning, match="does not use triton layer_norm"):
        ours = elementwise.layer_norm_forward(x, None, None, 1e-6).y
    torch.testing.assert_close(ours, torch.nn.functional.layer_norm(x, (40,), eps=1e-6))
    with pytest.raises(RuntimeError, match="cannot serve: error .* over the budget"):
        elementwise.layer_norm_forward(x, None, None, 1e-6, impl=Impl.TRITON)


class Copies(TorchDispatchMode):
    """How many tensors of ``shape`` are copied or cast."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPIES and tuple(out.shape) == self.shape:
            self.found.append(str(func))
        return out


COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.clone}


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "autocast around fp32"])
class TestNormBeforeOneGemm:
    M, K, N, R = 42, 24, 40, 3

    @pytest.fixture(autouse=True)
    def one_gemm(self, serving):  # noqa: F811
        plan = Plan(Forward.BORDERED, Forward.SEPARATE, Gradient.RANK, Keep.HIDDEN)
        for asked in ("call_plan", "plan_in_context"):
            serving.setattr(linear_stage, asked, lambda *_, **__: plan)
        self.buffers, right = [], aten_linear.forward

        def spy(x, w, bias, adapters, plan, bordered=None, h=None, **made):
            if x.shape[1] == self.K:
                assert bordered is not None and bordered.shape == (self.M, self.K + self.R)
                assert x.data_ptr() == bordered.data_ptr()
                self.buffers.append(bordered.untyped_storage().data_ptr())
            return right(x, w, bias, adapters, plan, bordered, h, **made)

        serving.setattr(aten_linear, "forward", spy)

    def operands(self, wide):
        dtype = torch.float32 if wide else BF16
        x = torch.randn(2, 21, self.K, dtype=dtype, requires_grad=True)
        trains = {"w": False, "bias": False}
        fc1 = matrix(self.N, self.K, self.R, dtype=dtype, **trains)
        return x, norm(self.K, dtype, trains=False), fc1, matrix(self.K, self.N, 2, 1, dtype)

    def test_writes_where_the_gemm_reads(self, wide):
        x, before, fc1, _ = self.operands(wide)
        copies = Copies((self.M, self.K))
        with torch.autocast("cpu", BF16, enabled=wide), copies:
            y = layer_norm_lora_linear(x, before, fc1)
        assert len(self.buffers) == 1 and copies.found == []
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        assert not {t.untyped_storage().data_ptr() for t in saved} & set(self.buffers)
        leaves = (x, *fc1.a, *fc1.b)
        with copies:
            ours = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        assert copies.found == []  # dy and dx are cast as the norm reads and writes them

        def plain(dtype):
            given = cast((x, before, fc1), dtype)
            y = plain_linear(plain_norm(*given[:2]), given[2])
            leaves = (given[0], *given[2].a, *given[2].b)
            return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

        verdict = judge_all(ours, in_every_order(lambda: plain(BF16)), plain(torch.float64), BF16)
        assert verdict.passed, str(verdict)

    @pytest.mark.usefixtures("as_written")
    def test_writes_there_again_in_backward(self, wide):
        x, *operands = self.operands(wide)
        with torch.autocast("cpu", BF16, enabled=wide):
            y = lora_mlp(x, *operands[1:], norm=operands[0], around=True, recompute="gemm")
        assert len(self.buffers) == 1
        y.sum().backward()
        assert len(self.buffers) == 2 and x.grad.isfinite().all()


def dropped_run(kind, seed):
    """h, dx and da of the reference's mask."""
    torch.manual_seed(3)
    x, a, dh = (torch.randn(*shape).to(BF16) for shape in ((21, 24), (5, 24), (21, 5)))
    x, a, dh = (t.to(kind) for t in (x, a, dh))
    kept = reference.dropout(x, 0.3, seed, 0)
    return kept @ a.T, reference.dropout(dh @ a, 0.3, seed, 0), dh.T @ kept


def test_dropout_without_a_mask(checking, monkeypatch):
    torch.manual_seed(3)
    x, a, dh = (torch.randn(*shape).to(BF16) for shape in ((21, 24), (5, 24), (21, 5)))
    torch.manual_seed(11)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(11)
    for leaf in (x, a):
        leaf.requires_grad_()
    h = shrink(x, a, 0.3)
    ours = (h.detach(), *torch.autograd.grad(h, (x, a), dh))
    plain = in_every_order(lambda: dropped_run(BF16, seed))
    verdict = judge_all(ours, plain, dropped_run(torch.float64, seed), BF16)
    assert verdict.passed, str(verdict)


def test_dropout_reaches_the_same_kernels_when_compiled(serving):  # noqa: F811
    from fused_lora.kernels.triton import lora_linear as kernels

    x, a = (torch.randn(*shape, requires_grad=True) for shape in ((21, 24), (5, 24)))
    runs, calls = [], []
    names = ["dropout_shrink", "dropout_input_grad", "dropout_a_grad"]
    for name in names:
        right = getattr(kernels, name)
        spy = lambda *args, name=name, right=right: (calls.append(name), right(*args))[1]  # noqa: E731
        serving.setattr(kernels, name, spy)
    for run in (shrink, torch.compile(shrink, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(11)
        h = run(x, a, 0.3)
        runs.append([h.detach(), *torch.autograd.grad(h.square().sum(), (x, a))])
    assert calls == names * 2
    for mine, other in zip(*runs, strict=True):
        assert torch.equal(mine, other)


def test_a_backward_that_triton_cannot_run_has_the_forwards_mask(serving):  # noqa: F811
    x, a = torch.ones(16, 24, requires_grad=True), torch.ones(1, 24)
    h = shrink(x, a, 0.5)
    serving.setattr("fused_lora.ops.lora_dropout.why_not_concrete", lambda t: "held elsewhere")
    (dx,) = torch.autograd.grad(h, x, torch.ones_like(h))
    torch.testing.assert_close(dx.sum(1, keepdim=True), h.detach())


def test_a_broken_dropout_never_serves(checking):
    right, calls = shrinks.shrink, []

    def broken(x, adapters, out=None, tile=None, *, dropout=None):
        calls.append(dropout)
        return right(x, adapters, out, tile)

    checking.setattr(shrinks, "shrink", broken)
    x, a, y = torch.ones(8, 24), torch.ones(1, 24), torch.zeros(8, 6)
    with pytest.warns(RuntimeWarning, match="does not use triton shrink_dropout"):
        lora_add(y, x, [a], [torch.ones(6, 1)], (1.0,), (Span(0, 6, 1),), 0.5)
    served = len(calls)
    shrink(x, a, 0.5)
    assert len(calls) == served  # the library's, from now on


def jobs(dtype):
    torch.manual_seed(5)
    spans = (Span(0, 16, 3), Span(20, 32, 2))
    for i, k in enumerate((24, 40, 16)):
        a = [torch.randint(-8, 9, (span.rank, k)) / 8 for span in spans]
        b = [torch.randint(-8, 9, (span.width, span.rank)) / 8 for span in spans]
        yield Job(torch.randn(32, k).to(dtype), a, b, (1.0, 0.5), spans, i // 2)


@pytest.mark.parametrize("noise", [("nearest", 0), ("stochastic", 3)], ids=lambda n: n[0])
def test_many_merges_in_one_launch(checking, noise):
    launches = []
    right = launched.launch_many
    checking.setattr("fused_lora.kernels.triton.lora_merge.launch_many",
                     lambda *arguments: (launches.append(1), right(*arguments)))  # fmt: skip
    group = list(jobs(BF16))
    lora_merge_many(group, *noise, impl="triton")  # checked now
    launches.clear()
    merged = lora_merge_many(group, *noise, impl="triton")
    assert len(launches) == 1
    for ours, job in zip(merged, group, strict=True):
        assert torch.equal(ours, lora_merge(*job[:5], noise[0], job.seed, noise[1], impl="aten"))


def test_a_whole_model(serving):  # noqa: F811
    served = []
    right = merging.triton_many
    serving.setattr("fused_lora.ops.lora_merge.triton_many",
                    lambda w, *rest: (served.append(len(w)), right(w, *rest))[1])  # fmt: skip
    linears = [fused_lora.nn.FusedLoRALinear(16, 24, rank=2) for _ in range(3)]
    model = nn.ModuleList(linears)
    for one in linears:
        nn.init.normal_(one.lora_B)
    expected = [one.base + one.lora_B @ one.lora_A * one.scales[0] for one in linears]
    fused_lora.merge(model, impl="triton")
    assert served == [3]
    for one, truth in zip(linears, expected, strict=True):
        torch.testing.assert_close(one.weight, truth)


def test_verdicts_of_partners_are_kept(checking):
    elementwise.gelu_forward(torch.randn(4, 8))
    assert "triton gelu" in verdicts.path().read_text()


def epilogues(m, n):
    yield Epilogue("erf")
    yield Epilogue("tanh")
    yield Epilogue(factor=torch.randn(n), residual=torch.randn(m, n))
    yield Epilogue("erf", torch.randn(n))  # no epilogue does both


def tile_of_epilogue(right):
    """``TILE`` for products that have one."""
    return lambda kernel, *shape: TILE if "_" in kernel else right(kernel, *shape)


def test_epilogues_in_the_product(serving):  # noqa: F811
    from fused_lora.ops import epilogues as module
    from fused_lora.types import Backend, Forward, Gradient, Keep, Needs, Plan

    fused = []
    right = lora_linear.forward_epilogue
    serving.setattr(lora_linear, "forward_epilogue", lambda *a: (fused.append(1), right(*a))[1])
    serving.setattr(lora_linear, "tile_of", tile_of_epilogue(lora_linear.tile_of))
    plan = Plan(Forward.EXTENDED, Forward.EXTENDED, Gradient.RANK, Keep.HIDDEN, 0, Backend.TRITON)
    serving.setattr("fused_lora.ops.lora_linear.call_plan", lambda *_, **__: plan)
    p = build(CASES[3], BF16, torch.float32)
    for one in epilogues(p.x.shape[0], p.w.shape[0]):
        call = (Frame(p.scales, p.spans, Impl.AUTO), BF16, (*p.a, *p.b), Needs())
        y, _, _, h, _, u = compute(p.x, p.w, p.bias, *call, epilogue=one)

        def expected(q, one=one):
            as_q = [None if t is None else t.to(q.x.dtype) for t in one[1:3]]
            base = reference_linear.forward(q.x, q.w, q.bias, *adapters(q))
            return {"y": module.composed(base.clone(), None, Epilogue(one[0], *as_q))[0], "u": base}

        ours = {"y": y} if u is None else {"y": y, "u": u}
        low = lowered(p, BF16)
        plain = in_every_order(lambda run=expected, low=low: run(low))
        verdict = judge_all(ours, plain, expected(p.double()), BF16)
        assert verdict.passed, str(verdict)
        assert (u is None) == (one.activation == "none") and h is not None
        assert y.dtype is (BF16 if one.factor is None else torch.float32)
    assert len(fused) == 3


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32 around"])
def test_a_chain_ends_in_its_products_epilogue(serving, wide):  # noqa: F811
    from fused_lora.ops.lora_block import lora_residual
    from fused_lora.ops.operand import Adapted

    serving.setattr("fused_lora.plan.cost_kernels.TRITON_EFFICIENCY", 1e6)
    serving.setattr("fused_lora.plan.cost_kernels.MERGE_EFFICIENCY", 1e-9)
    serving.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    fused = []
    right = lora_linear.forward_epilogue
    serving.setattr(lora_linear, "forward_epilogue", lambda *a: (fused.append(1), right(*a))[1])
    serving.setattr(lora_linear, "tile_of", tile_of_epilogue(lora_linear.tile_of))
    x, w, a, b = (torch.randn(*s).to(BF16) for s in ((2, 16, 32), (48, 32), (4, 32), (48, 4)))
    beside = torch.randn(2, 16, 48, dtype=torch.float32 if wide else BF16)
    gamma, dy = torch.randn(48).to(beside.dtype), torch.randn(2, 16, 48, dtype=beside.dtype)
    leaves = [t.requires_grad_() for t in (x, a, b, beside)]
    runs = []
    for impl in (Impl.AUTO, Impl.REFERENCE):
        y = lora_residual(x, Adapted(w, None, [a], [b], (1.0,), impl=impl), beside, gamma)
        runs.append([y, *torch.autograd.grad(y, leaves, dy)])
    for ours, plain in zip(*runs, strict=True):
        assert ours.dtype is plain.dtype
        assert error(ours.detach(), plain.detach().double()) < 2e-2
    assert fused == [1]
