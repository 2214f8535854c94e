"""The operations of a block: right in every recompute mode, and keeping what they promise."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fused_lora.bench.saved_tensors import SavedBytes
from fused_lora.ops.chain import chain, linear
from fused_lora.ops.chain.chain import composed
from fused_lora.ops.chain.stages import packed, split
from fused_lora.ops.lora_block import (
    layer_norm_lora_linear,
    lora_attention,
    lora_mlp,
    lora_residual,
)
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Forward, Gradient, Keep, Plan
from tests.ops import block_problems as plain
from tests.ops.block_problems import cast, leaves, matrix, norm

D, H = 8, 12
FORMS = {  # fc1's columns, and how they are gated
    "plain": ("gelu", None, False),
    "tanh": ("gelu_tanh", None, False),
    "packed": ("silu", "first", False),
    "packed, gate last": ("sigmoid", "last", False),
    "apart": ("silu", None, True),
}
each_mode = pytest.mark.parametrize("recompute", RECOMPUTE)
each_form = pytest.mark.parametrize("form", FORMS)
WHO = {
    "adapters": {"w": False, "bias": False},
    "everything": {},
    "a": {"w": False, "bias": False, "b": False},
    "b": {"w": False, "bias": False, "a": False},
}
each_who = pytest.mark.parametrize("who", WHO.values(), ids=WHO)


def mlp_of(form, dtype=torch.float64, d=D, h=H, rank=3, **trains):
    activation, gated, apart = FORMS[form]
    make = lambda n, k: matrix(n, k, rank, dtype=dtype, **trains)  # noqa: E731
    fc1 = (make(h, d), make(h, d)) if apart else make(2 * h if gated else h, d)
    return fc1, make(d, h), activation, gated


def same(ours, theirs, operands, rtol=1e-10):
    """Both results, and the gradients of every leaf of a weighted sum."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    weight = torch.randn_like(theirs)
    mine = torch.autograd.grad(ours, leaves(*operands), weight)
    others = torch.autograd.grad(theirs, leaves(*operands), weight)
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)


@each_mode
@each_form
@each_who
@pytest.mark.parametrize("first", [False, True], ids=["inside", "first block"])
def test_mlp_in_float64(recompute, form, who, first):
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=not first)
    fc1, fc2, activation, gated = mlp_of(form, **who)
    y = lora_mlp(x, fc1, fc2, activation, gated=gated, recompute=recompute)
    same(y, plain.plain_mlp(x, fc1, fc2, activation, gated), (x, fc1, fc2))


@each_mode
@each_form
@pytest.mark.parametrize("trains", [False, True], ids=["frozen norm", "norm trains"])
def test_the_whole_half_of_a_block(recompute, form, trains):
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    fc1, fc2, activation, gated = mlp_of(form)
    before = norm(D, trains=trains)
    gamma, mask = torch.randn(D).double(), torch.tensor([0.0, 2.0, 1.0]).double().view(3, 1, 1)
    options = {"gated": gated, "norm": before, "around": True, "gamma": gamma, "mask": mask}
    y = lora_mlp(x, fc1, fc2, activation, recompute=recompute, **options)
    z = plain.plain_mlp(plain.plain_norm(x, before), fc1, fc2, activation, gated)
    same(y, x + gamma * mask * z, (x, before, fc1, fc2))


@each_mode
@each_who
def test_norm_and_grouped_projection(recompute, who):
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    before, qkv = norm(D), matrix(3 * D, D, 2, groups=3, **who)
    y = layer_norm_lora_linear(x, before, qkv, recompute)
    same(y, plain.plain_linear(plain.plain_norm(x, before), qkv), (x, before, qkv))


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_projection_and_what_follows_it(gamma, mask, lean):
    x, residual = (torch.randn(3, 5, n, dtype=torch.float64, requires_grad=True) for n in (D, H))
    proj = matrix(H, D, 2)
    factors = torch.randn(H).double() if gamma else None, torch.rand(3, 1, 1).double()
    factors = factors[0], factors[1] if mask else None
    y = lora_residual(x, proj, residual, *factors, lean=lean)
    z = plain.plain_linear(x, proj)
    for factor in factors:
        z = z if factor is None else z * factor
    same(y, residual + z, (x, residual, proj))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@each_who
def test_attention_without_q_k_and_v(backend, who):
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    before, qkv, proj = norm(D), matrix(3 * D, D, 2, groups=3, **who), matrix(D, D, 2, **who)
    with sdpa_kernel(backend):
        y = lora_attention(x, before, qkv, proj, heads=2)
        same(y, plain.plain_attention(x, before, qkv, proj, 2), (x, before, qkv, proj))


@each_mode
def test_gradcheck(recompute):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    fc1, fc2, before = matrix(6, 4, 2), matrix(4, 6, 2), norm(4)

    def half(*_):
        return lora_mlp(x, fc1, fc2, norm=before, around=True, recompute=recompute)

    assert torch.autograd.gradcheck(half, leaves(x, before, fc1, fc2))


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 40])
def test_within_the_yardstick(recompute, dtype, rank):
    x = torch.randn(2, 197, 48, dtype=dtype, requires_grad=True)
    before = norm(48, dtype, trains=False)
    fc1, fc2, *_ = mlp_of("plain", dtype, 48, 192, rank, w=False, bias=False)
    weight = torch.randn(2, 197, 48)

    def outcome(function, dtype):
        given = cast((x, before, fc1, fc2), dtype)
        y = function(*given)
        return [y.detach(), *torch.autograd.grad(y, leaves(*given), weight.to(dtype))]

    def expected(x, before, fc1, fc2):
        return x + plain.plain_mlp(plain.plain_norm(x, before), fc1, fc2, "gelu", None)

    ours = outcome(
        lambda x, n, a, b: lora_mlp(x, a, b, norm=n, around=True, recompute=recompute), dtype
    )
    theirs = in_every_order(lambda: outcome(expected, dtype))
    verdict = judge_all(ours, theirs, outcome(expected, torch.float64), dtype)
    assert verdict.passed, verdict


@each_mode
@each_form
def test_composed_is_the_same(recompute, form, monkeypatch):
    """What ``torch.compile`` is given."""
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    fc1, fc2, activation, gated = mlp_of(form)
    options = {"gated": gated, "norm": norm(D), "around": True, "recompute": recompute}
    y = lora_mlp(x, fc1, fc2, activation, **options)
    seen = []

    def instead(operation, inputs):
        source, residual, gamma, mask, *operands = inputs
        seen.append(operation)
        return composed(operation.spec, source, operands, residual, gamma, mask)

    monkeypatch.setattr(chain, "call", instead)
    same(y, lora_mlp(x, fc1, fc2, activation, **options), (x, fc1, fc2))
    assert seen


def test_compiles_whole():
    torch._dynamo.reset()
    x = torch.randn(2, 5, D, requires_grad=True)
    fc1, fc2, *_ = mlp_of("plain", torch.float32)
    half = torch.compile(
        lambda x: lora_mlp(x, fc1, fc2, norm=None), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(half(x), lora_mlp(x, fc1, fc2))


class TestKept:
    """Bytes that one call keeps beside x, in elements of float32."""

    M, R = 10, 2

    def kept(self, function, *operands):
        flat = leaves(*operands)
        with SavedBytes(torch.nn.ParameterList(torch.nn.Parameter(t) for t in flat)) as saved:
            saved._seen |= {t.untyped_storage().data_ptr(): t.untyped_storage() for t in flat}
            y = function(*operands)
        del y
        return saved.total // 4

    @pytest.mark.parametrize("mode, columns", [("none", 3 * H + 4 * D), ("elementwise", H)])
    def test_mlp(self, mode, columns):
        del columns
        x = torch.randn(2, 5, D, requires_grad=True)
        fc1, fc2, *_ = mlp_of("plain", torch.float32, rank=self.R, w=False, bias=False)
        trained = norm(D, torch.float32)
        frozen = [fc1.w, fc1.bias, fc2.w, fc2.bias]
        [t.requires_grad_() for t in frozen]  # so that they count as living on anyway
        found = self.kept(
            lambda x, n, a, b: lora_mlp(x, a, b, norm=n, around=True, recompute=mode),
            x, trained, fc1, fc2,
        )  # fmt: skip
        u, n, g, low, statistics = H, D, H, 2 * self.R, 2
        most = {"none": n + u + g + low + statistics, "elementwise": u + low}[mode]
        least = {"none": n + u + g + statistics, "elementwise": u}[mode]
        assert self.M * least <= found <= self.M * most

    def test_gemm_keeps_x_alone(self):
        x = torch.randn(2, 5, D, requires_grad=True)
        fc1, fc2, *_ = mlp_of("plain", torch.float32)
        before = norm(D, torch.float32)
        half = lambda x, n, a, b: lora_mlp(x, a, b, norm=n, recompute="gemm")  # noqa: E731
        assert self.kept(half, x, before, fc1, fc2) == 0

    def test_attention_keeps_out_and_its_log_sum_exp(self):
        x = torch.randn(2, 5, D, requires_grad=True)
        qkv, proj = (matrix(n, D, 2, dtype=torch.float32) for n in (3 * D, D))
        before = norm(D, torch.float32)
        half = lambda x, n, a, b: lora_attention(x, n, a, b, heads=2)  # noqa: E731
        assert self.kept(half, x, before, qkv, proj) == self.M * (D + 2)


class TestRoom:
    """The activation writes g into the left of [g | h] where fc2's plan is one GEMM on it."""

    @pytest.fixture(autouse=True)
    def one_gemm(self, monkeypatch):
        """Whatever this machine's ceilings are, and call by call as the operation is written."""
        monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
        plan = Plan(Forward.BORDERED, Forward.SEPARATE, Gradient.RANK, Keep.HIDDEN)
        monkeypatch.setattr(linear, "call_plan", lambda *_, **__: plan)

    def half(self, seen, monkeypatch, form, recompute, **trains):
        from fused_lora.kernels.aten import lora_linear as aten

        forward = aten.forward

        def spy(x, w, bias, adapters, plan, bordered=None, h=None, **made):
            seen.append((x, bordered))
            return forward(x, w, bias, adapters, plan, bordered, h, **made)

        monkeypatch.setattr(aten, "forward", spy)
        dtype = torch.bfloat16
        x = torch.randn(2, 197, 48, dtype=dtype, requires_grad=True)
        fc1, fc2, activation, gated = mlp_of(form, dtype, 48, 192, w=False, bias=False, **trains)
        y = lora_mlp(x, fc1, fc2, activation, gated=gated, recompute=recompute)
        return y, (x, fc1, fc2)

    @pytest.mark.parametrize("recompute, calls", [("elementwise", 2), ("gemm", 3)])
    @pytest.mark.parametrize("form", ["tanh", "packed", "apart"])
    def test_is_given_where_that_costs_nothing(self, form, recompute, calls, monkeypatch):
        seen = []
        y, operands = self.half(seen, monkeypatch, form, recompute)
        x, buffer = seen[-1]
        assert buffer is not None and buffer.shape == (394, 192 + 3)
        assert x.data_ptr() == buffer.data_ptr() and x.shape == (394, 192)
        torch.autograd.grad(y.float().sum(), leaves(*operands))
        assert len(seen) == calls + (form == "apart") * (calls - 1)
        assert sum(bordered is not None for _, bordered in seen) == 1

    @pytest.mark.parametrize("form, recompute", [("plain", "gemm"), ("tanh", "none")])
    def test_is_not_given_otherwise(self, form, recompute, monkeypatch):
        """A GELU that would copy, a g that is kept."""
        seen = []
        self.half(seen, monkeypatch, form, recompute)
        assert [bordered for _, bordered in seen] == [None, None]

    @each_mode
    @pytest.mark.parametrize("form", ["tanh", "packed", "apart"])
    def test_within_the_yardstick(self, recompute, form):
        x = torch.randn(2, 197, 48, dtype=torch.bfloat16, requires_grad=True)
        fc1, fc2, *how = mlp_of(form, torch.bfloat16, 48, 192, 4, w=False, bias=False)
        weight = torch.randn(2, 197, 48)

        def outcome(function, dtype, **options):
            given = cast((x, fc1, fc2), dtype)
            y = function(*given, how[0], **options)
            return [y.detach(), *torch.autograd.grad(y, leaves(*given), weight.to(dtype))]

        ours = outcome(lora_mlp, torch.bfloat16, gated=how[1], recompute=recompute)
        expected = lambda dtype: outcome(plain.plain_mlp, dtype, gated=how[1])  # noqa: E731
        theirs = in_every_order(lambda: expected(torch.bfloat16))
        verdict = judge_all(ours, theirs, expected(torch.float64), torch.bfloat16)
        assert verdict.passed, verdict

    @pytest.mark.parametrize("trains", [{}, {"a": False}], ids=["a and b", "b"])
    def test_nothing_of_it_is_kept(self, trains, monkeypatch):
        seen = []
        y, _ = self.half(seen, monkeypatch, "tanh", "elementwise", **trains)
        buffers = {buffer.untyped_storage().data_ptr() for _, buffer in seen if buffer is not None}
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        kept = {t.untyped_storage().data_ptr() for t in saved}
        assert buffers and not buffers & kept


class TestPacked:
    def test_slices_of_one_are_taken_as_they_lie(self):
        dqkv = torch.randn(2, 5, 3 * D)
        found = packed(split(dqkv, 2))
        assert torch.equal(found, dqkv) and found.data_ptr() == dqkv.data_ptr()

    @pytest.mark.parametrize("order", [(0, 1, 1), (1, 0, 2)])
    def test_others_are_copied(self, order):
        parts = split(torch.randn(2, 5, 3 * D), 2)
        mixed = tuple(parts[i] for i in order)
        again = split(packed(mixed), 2)
        assert all(torch.equal(one, other) for one, other in zip(mixed, again, strict=True))

    def test_what_attention_hands_back(self):
        qkv = torch.randn(2, 5, 3 * D, requires_grad=True)
        parts = split(qkv, 2)
        out = scaled_dot_product_attention(*parts)
        grads = torch.autograd.grad(out.sum(), parts, retain_graph=True)
        (whole,) = torch.autograd.grad(out.sum(), qkv)
        torch.testing.assert_close(packed(grads), whole)


@each_mode
def test_empty_and_strided_and_again(recompute):
    fc1, fc2, *_ = mlp_of("plain")
    empty = torch.zeros(0, 5, D, dtype=torch.float64, requires_grad=True)
    assert lora_mlp(empty, fc1, fc2, recompute=recompute).shape == (0, 5, D)
    wide = torch.randn(5, 2, 2 * D, dtype=torch.float64, requires_grad=True)
    x = wide.transpose(0, 1)[..., ::2]
    y = lora_mlp(x, fc1, fc2, norm=norm(D), around=True, recompute=recompute)
    one = torch.autograd.grad(y.sum(), wide, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(y.sum(), wide)[0])


@each_mode
def test_a_wide_x_around_it_under_autocast(recompute):
    """The residual's gradient reaches x in x's own precision."""
    fc1, fc2, *_ = mlp_of("plain", torch.float32)
    x = torch.randn(2, 5, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_mlp(x, fc1, fc2, around=True, gamma=torch.zeros(D), recompute=recompute)
    dy = torch.randn(2, 5, D)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy)


@each_mode
@each_form
def test_without_gradients_nothing_is_kept_for_them(recompute, form, monkeypatch):
    """Of a forward alone the plan may be another: the plain one is the measure."""
    x = torch.randn(2, 5, D, dtype=torch.float64)
    fc1, fc2, activation, gated = mlp_of(form)
    before, plans = norm(D), []
    right = linear.compute
    monkeypatch.setattr(linear, "compute", lambda *a: plans.append(a[6]) or right(*a))
    options = {"gated": gated, "norm": before, "around": True, "recompute": recompute}
    with torch.no_grad():
        y = lora_mlp(x, fc1, fc2, activation, **options)
        expected = x + plain.plain_mlp(plain.plain_norm(x, before), fc1, fc2, activation, gated)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert plans and not any(any(vars(needs).values()) for needs in plans)


def test_double_backward_fails_loudly():
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    fc1, fc2, *_ = mlp_of("plain")
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(lora_mlp(x, fc1, fc2).sum(), x, create_graph=True)


class TestBadInput:
    def setup_method(self):
        self.x = torch.randn(2, 5, D)
        self.fc1, self.fc2, *_ = mlp_of("plain", torch.float32)

    @pytest.mark.parametrize(
        "options, words",
        [
            ({"recompute": "all"}, "recompute must be one of .*, got 'all'"),
            ({"activation": "relu6"}, "activation must be one of .*, got 'relu6'"),
            ({"gated": "both"}, r"gated must be None or one of \('first', 'last'\), got 'both'"),
            ({"gated": "first"}, r"x \(0, 6\) must end in K = 12"),
            ({"norm": plain.norm(D + 1)}, r"gamma must be \[8\], got shape \(9,\)"),
            ({"gamma": torch.ones(D, requires_grad=True)}, "gamma has requires_grad"),
        ],
    )
    def test_mlp(self, options, words):
        with pytest.raises(ValueError, match=words):
            lora_mlp(self.x, self.fc1, self.fc2, **options)

    def test_mlp_around_another_width(self):
        with pytest.raises(ValueError, match="fc2 has 9 columns, the x around it 8"):
            lora_mlp(self.x, self.fc1, matrix(9, H, 2, dtype=torch.float32), around=True)

    def test_a_dtype_that_differs(self):
        with pytest.raises(TypeError, match=r"x is torch.float64 and w is torch.float32"):
            lora_mlp(self.x.double(), self.fc1, self.fc2)

    def test_residual_of_another_shape(self):
        with pytest.raises(ValueError, match=r"residual must be \(2, 5, 12\), got shape \(2, 5, 8"):
            lora_residual(self.x, self.fc1, self.x)

    @pytest.mark.parametrize(
        "heads, columns, words",
        [(5, 3 * D, "24 columns of qkv do not make 3 x 5 heads"), (2, 30, "must end in K = 8")],
    )
    def test_attention(self, heads, columns, words):
        qkv, proj = (matrix(n, D, 2, dtype=torch.float32) for n in (columns, D))
        with pytest.raises(ValueError, match=words):
            lora_attention(self.x, norm(D, torch.float32), qkv, proj, heads)

    def test_attention_of_two_dimensions(self):
        qkv, proj = (matrix(n, D, 2, dtype=torch.float32) for n in (3 * D, D))
        with pytest.raises(ValueError, match=r"x must be \[B, T, d\], got shape \(5, 8\)"):
            lora_attention(self.x[0], norm(D, torch.float32), qkv, proj, 2)
