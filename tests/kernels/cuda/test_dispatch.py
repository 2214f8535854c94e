"""The compiled gradients on their way from the plan to a parameter, over an emulated block."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

import fused_lora
from fused_lora import lora_linear
from fused_lora.kernels.interface import Adapters
from fused_lora.ops import backends, elementwise, lora_grad_backends, planning
from fused_lora.ops.lora_block import lora_mlp
from fused_lora.ops.lora_linear import backward
from fused_lora.ops.planning import plan_for
from fused_lora.testing.yardstick import error, in_every_order, judge_all
from fused_lora.types import Backend, Forward, Gradient, Impl, Keep, Needs, Plan, Span
from fused_lora.verify import selftest, verdicts
from fused_lora.verify.kernel_registry import TF32_BAND
from tests.ops.block_problems import matrix

from .serving import Served, forget, one_element, served, tf32  # noqa: F401

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SPANS = (Span(0, 24, 5), Span(24, 40, 8))


ALL = Needs()


def plan(impl: Impl = Impl.AUTO, needs: Needs = ALL, dtype: torch.dtype = BF16) -> Plan:
    return plan_for(21, 72, 40, SPANS, dtype, True, needs, CPU, impl=impl)


class Layer:
    """One projection in bf16 with fp32 adapters, one of them inside a larger tensor."""

    def __init__(self, m: int = 21, k: int = 72, n: int = 40, spans=SPANS) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(m, k).to(BF16)
        self.w = (torch.randn(n, k) / k**0.5).to(BF16)
        self.bias = torch.randn(n).to(BF16)
        self.a = [torch.randn(span.rank, k) / k**0.5 for span in spans]
        self.b = [torch.randn(span.width, span.rank + 3)[:, : span.rank] / 3 for span in spans]
        self.dy = torch.randn(m, n).to(BF16)
        self.scales, self.spans = (0.5, 2.0)[: len(spans)], spans

    def grads(self, impl: str = "auto", dtype: torch.dtype = BF16, bias: bool = True):
        """Of every operand by name, computed in ``dtype``."""
        up = lambda t: t.to(dtype).requires_grad_()  # noqa: E731
        x, w = up(self.x), self.w.to(dtype)
        own = self.bias.to(dtype).requires_grad_(bias)
        a, b = ([(up(t) if dtype is torch.float64 else t.clone().requires_grad_()) for t in half]
                for half in (self.a, self.b))  # fmt: skip
        y = lora_linear(x, w, own, a, b, self.scales, self.spans, impl=impl)
        inputs = {"x": x, "bias": own, "a0": a[0], "b0": b[0], "a1": a[-1], "b1": b[-1]}
        inputs = {name: t for name, t in inputs.items() if t.requires_grad}
        grads = torch.autograd.grad(y, list(inputs.values()), self.dy.to(dtype))
        return dict(zip(inputs, grads, strict=True))


def keeps_the_yardstick(layer: Layer, impl: str, **options: bool) -> None:
    ours = layer.grads(impl, **options)
    plain = in_every_order(partial(layer.grads, "reference", **options))
    truth = layer.grads("reference", torch.float64, **options)
    verdict = judge_all(ours, plain, truth, BF16)
    assert verdict.passed, str(verdict)
    assert all(grad.dtype is plain[0][name].dtype for name, grad in ours.items())


def test_right_kernels_are_checked_once_and_serve(served: Served) -> None:  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = plan()
    assert chosen.grads_by is Backend.CUDA and "cuda:rank" in str(chosen)
    assert chosen.writes_dh and not plan(needs=Needs(x=False)).writes_dh
    checks = served.checks
    assert checks > 0
    for impl in ("auto", "cuda"):
        keeps_the_yardstick(Layer(), impl)
    assert served.runs == 2
    forget()
    assert plan() == chosen and served.checks == checks  # from the disk


def test_a_broken_kernel_is_caught_and_never_serves(served: Served) -> None:  # noqa: F811
    served.fault = one_element
    with pytest.warns(RuntimeWarning, match=r"cuda lora_grad \(6 strips.*\) in bfloat16 .* over"):
        assert plan().library_alone
    assert planning.settled(
        planning.problem(21, 72, 40, SPANS, BF16, True, Needs()), BF16, CPU
    ).wrong == [f"lora_grad: {said}" for said in kept_verdicts()]
    keeps_the_yardstick(Layer(), "auto")
    assert served.runs == 0
    with pytest.raises(RuntimeError, match="impl='cuda' cannot serve: lora_grad: error .* over"):
        plan(Impl.CUDA)


def kept_verdicts() -> list[str]:
    return [str(found) for found in verdicts._known.values()]


def test_the_kernel_must_be_right_at_the_moment_of_use_too(served: Served) -> None:  # noqa: F811
    """What is recomputed may take another form of the kernel than the plan's: checked or not."""
    served.fault = one_element
    layer, adapters = Layer(), None
    adapters = Adapters(layer.a, layer.b, layer.scales, layer.spans)
    forms = Plan(*[Forward.SEPARATE] * 2, Gradient.RANK, Keep.NOTHING, grads_by=Backend.CUDA)
    call = (layer.dy, layer.x, None, layer.w, adapters, Needs(), forms, Impl.AUTO)
    with pytest.warns(RuntimeWarning, match="lora_grad"):
        ours = backward(*call)
    library = replace(forms, grads_by=None)
    theirs = backward(*call[:6], library, Impl.AUTO)
    assert served.runs == 0
    pairs = zip(ours.a + ours.b, theirs.a + theirs.b, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def unchecked(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:  # noqa: F811
    """Kernels that serve at once; other tests check them."""
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    return served


def test_every_subset_of_gradients_and_each_way_of_dx(unchecked: Served) -> None:
    layer = Layer()
    adapters = Adapters(layer.a, layer.b, layer.scales, layer.spans)
    bits = product((True, False), repeat=4)
    needs = [Needs(x, False, bias, a, b) for x, bias, a, b in bits if a or b]
    hidden = layer.x @ torch.cat(layer.a).to(BF16).T

    def run(
        asked: Needs, dx: Forward, h: torch.Tensor | None, by: Backend | None, hands: bool
    ) -> list:
        keep = Keep.NOTHING if h is None else Keep.HIDDEN
        hands = hands and by is Backend.CUDA and asked.x and asked.a
        way = Plan(dx, dx, Gradient.RANK, keep, grads_by=by, writes_dh=hands)
        found = backward(layer.dy, layer.x, h, layer.w, adapters, asked, way, Impl.AUTO)
        return [found.x, found.bias, *found.a, *found.b]

    for asked in needs:
        ways = (Forward.SEPARATE, Forward.BORDERED)
        for dx, h, hands in product(ways, (hidden, None), (True, False)):
            both = (run(asked, dx, h, by, hands) for by in (Backend.CUDA, None))
            for mine, other in zip(*both, strict=True):
                assert (mine is None) == (other is None)
                assert mine is None or mine.dtype is other.dtype
                assert mine is None or torch.allclose(mine, other, rtol=0.02, atol=0.05)
    assert unchecked.runs == 8 * len(needs)


def test_dy_is_read_once_for_dh_and_the_gradients(
    unchecked: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx takes the dh that the gradients wrote: no product of dy with b is left."""
    shrink_grad = "fused_lora.kernels.aten.lora_linear.shrink_grad"
    monkeypatch.setattr(shrink_grad, lambda *_: pytest.fail("dy was read for dh alone"))
    layer = Layer()
    ours, plain = layer.grads("cuda"), layer.grads("reference")
    assert unchecked.runs == 1
    assert all(torch.allclose(ours[n], plain[n], rtol=0.02, atol=0.05) for n in plain)


def test_operands_that_need_a_little_help(unchecked: Served) -> None:
    layer = Layer()
    layer.dy = torch.randn(21, 45).to(BF16)[:, 3:43]  # rows that begin anywhere
    layer.a[0], layer.b[1] = layer.a[0].to(BF16), layer.b[1].double()
    keeps_the_yardstick(layer, "cuda")
    layer.x = torch.randn(21, 75).to(BF16)[:, 1:73]
    keeps_the_yardstick(layer, "cuda", bias=False)
    assert unchecked.runs == 2
    keeps_the_yardstick(Layer(m=0), "cuda")


def test_what_no_block_forms_the_library_does(unchecked: Served, monkeypatch) -> None:
    from fused_lora.kernels.cuda.native import Chip

    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(80, 1)))
    layer = Layer(9, 768, 1024, (Span(0, 1024, 40),))
    adapters = Adapters(layer.a, layer.b, layer.scales, layer.spans)
    found = lora_grad_backends.adapter_grads(layer.dy, layer.x, None, None, adapters, ALL)
    dh = 0.5 * layer.dy.double() @ layer.b[0].double()
    h = layer.x.double() @ layer.a[0].double().T
    assert error(found.a[0], dh.T @ layer.x.double()) < 0.01
    assert error(found.b[0], 0.5 * layer.dy.double().T @ h) < 0.01
    assert unchecked.runs == 1


@pytest.mark.parametrize("wide", [False, True], ids=["on chip", "by the library"])
@pytest.mark.parametrize("b, bias", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("serves", [True, False])
def test_dh_is_written_where_a_asks_for_no_gradient(
    served: Served,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    wide: bool,
    b: bool,
    bias: bool,
    serves: bool,
) -> None:
    """By the kernel that forms db, by the library where no block holds it or none is trusted."""
    from fused_lora.kernels.cuda.lora_grad_shape import GradShape, fitting
    from fused_lora.kernels.cuda.native import Chip

    monkeypatch.setattr(lora_grad_backends, "_trusted", lambda *_: serves)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(80, 1)))
    by_library, right = [], lora_grad_backends.aten.shrink_grad
    monkeypatch.setattr(
        lora_grad_backends.aten, "shrink_grad", lambda *t: (by_library.append(1), right(*t))[1]
    )
    layer = Layer(9, 72, 1024, (Span(0, 1024, 40),)) if wide else Layer()
    adapters = Adapters(layer.a, layer.b, layer.scales, layer.spans)
    shape = GradShape(0, layer.dy.shape[1], adapters.rank, b, False, False, b, bias, False, True)
    assert fitting(shape, Chip(80, 1)).forms_dh is not wide
    needs = Needs(False, bias=bias, a=False, b=b)
    h = (layer.x @ adapters.stacked_a().T.to(BF16)) if b else None
    out = torch.full((layer.dy.shape[0], adapters.rank + 8), 7.0).to(BF16)
    dh = out[:, 8:]
    found = lora_grad_backends.adapter_grads(layer.dy, None, h, None, adapters, needs, dh)
    pairs = zip(layer.b, layer.scales, layer.spans, strict=False)
    truth = [s * layer.dy[:, p.start : p.stop].double() @ b_g.double() for b_g, s, p in pairs]
    assert error(dh, torch.cat(truth, 1)) < 0.01 and (out[:, :8] == 7).all()
    assert by_library == [1] * (wide or not serves)
    assert found.a == [None] * len(layer.a)
    plain = lora_grad_backends.aten.rank_grads(
        layer.dy, None, h, None, adapters, adapters.to(BF16), needs
    )
    for mine, other in zip(found.b, plain[1], strict=True):
        assert (mine is None) == (other is None) == (not b)
        assert mine is None or error(mine, other.double()) < 0.01
    assert not bias or error(found.bias, layer.dy.double().sum(0)) < 0.01
    assert (found.bias is None) == (not bias)
    assert served.runs == serves


def test_a_block_of_several_matrices(unchecked: Served) -> None:
    torch.manual_seed(1)
    fc1, fc2 = (matrix(n, k, 6, dtype=BF16, w=False) for n, k in ((40, 24), (24, 40)))
    x = torch.randn(19, 24).to(BF16).requires_grad_()
    trained = [x, *fc1.a, *fc1.b, *fc2.a, *fc2.b]

    def grads(impl: str, recompute: str = "none"):
        y = lora_mlp(x, fc1._replace(impl=impl), fc2._replace(impl=impl), recompute=recompute)
        return torch.autograd.grad(y.sum(), trained)

    plain = grads("aten")
    for recompute in ("none", "gemm"):
        for mine, other in zip(grads("cuda", recompute), plain, strict=True):
            assert torch.allclose(mine, other, rtol=0.03, atol=0.03)
    assert unchecked.runs == 4


@pytest.mark.parametrize("recompute", ["none", "elementwise", "gemm"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_x_of_fc2_is_formed_of_u(served: Served, monkeypatch, tmp_path, kind, recompute) -> None:  # noqa: F811
    """GELU of u is not made again: the gradients of fc2 form it, where it was not kept."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    torch.manual_seed(1)
    fc1, fc2 = (matrix(n, k, 6, dtype=BF16, w=False) for n, k in ((40, 24), (24, 40)))
    x = torch.randn(19, 24).to(BF16).requires_grad_()
    trained = [x, *fc1.a, *fc1.b, *fc2.a, *fc2.b]
    made, right = [], elementwise.gelu_forward
    monkeypatch.setattr(
        elementwise, "gelu_forward", lambda *given: (made.append(1), right(*given))[1]
    )

    def grads(impl: str):
        both = (fc1._replace(impl=impl), fc2._replace(impl=impl))
        y = lora_mlp(x, *both, kind, recompute=recompute)
        made.clear()
        return torch.autograd.grad(y.float().sin().sum(), trained), len(made)

    ours, again = grads("cuda")
    plain, anew = grads("aten")
    assert (again, anew) == (0, recompute != "none")
    for mine, other in zip(ours, plain, strict=True):
        assert error(mine, other) < 0.02
    served.of, served.fault = "activation", one_element
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "anew"))
    forget()
    if recompute != "none":
        with pytest.warns(
            RuntimeWarning, match=r"lora_grad_gelu \(6 strips.*\) in bfloat16 .* over"
        ):
            ours, again = grads("cuda")
        assert again == 1 and all(error(t, o) < 0.02 for t, o in zip(ours, plain, strict=True))


def test_a_model_trains(unchecked: Served) -> None:
    torch.manual_seed(0)
    layer = fused_lora.FusedLoRALinear(16, 24, rank=4, impl="cuda", dtype=BF16)
    model = torch.nn.Sequential(layer, torch.nn.GELU())
    model(torch.randn(5, 16).to(BF16)).float().square().mean().backward()
    assert unchecked.runs == 1 and layer.lora_B.grad.abs().sum() > 0
    with torch.no_grad():
        model(torch.randn(5, 16).to(BF16))  # nothing of theirs to do


def test_beside_triton(unchecked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_lora.kernels.triton import available

    monkeypatch.setattr(available, "why_not", lambda device=None, dtype=None: None)
    monkeypatch.setattr("fused_lora.plan.cost_kernels.TRITON_EFFICIENCY", 1e6)
    monkeypatch.setattr("fused_lora.plan.cost_kernels.TRITON_LAUNCH_CALLS", 0.0)
    forget()
    for impl in (Impl.AUTO, Impl.CUDA):
        chosen = plan(impl)
        assert (chosen.backend, chosen.grads_by) == (Backend.TRITON, Backend.CUDA)
    question = planning.problem(21, 72, 40, SPANS, BF16, True, ALL)
    names = [
        one.subject.kernel for one in backends.kernels(question, chosen, BF16, "bfloat16", CPU)
    ]
    assert "lora_grad" in names and "grad" not in names and len(names) > 1
    assert plan(Impl.TRITON).grads_by is None


def test_fp32_is_served_by_tf32_where_torch_allows_it(served: Served) -> None:  # noqa: F811
    layer = Layer()
    layer.x, layer.w, layer.bias, layer.dy = (
        t.float() for t in (layer.x, layer.w, layer.bias, layer.dy)
    )
    truth = layer.grads("reference", torch.float64)
    with tf32():
        chosen = plan(dtype=torch.float32)
        assert chosen.grads_by is Backend.CUDA
        assert {subject.dtype for subject, _ in verdicts._known} == {"tf32"}
        ours = layer.grads("cuda", torch.float32)
        assert served.runs == 1
    runs = in_every_order(lambda: layer.grads("reference", torch.float32))
    ours, truth, *runs = ({n: t.detach() for n, t in g.items()} for g in (ours, truth, *runs))
    verdict = judge_all(ours, runs, truth, torch.float32, TF32_BAND)
    assert verdict.passed, str(verdict)
    assert all(grad.dtype is torch.float32 for grad in ours.values())
    assert error(ours["a0"], runs[0]["a0"]) > 1e-5  # it was rounded
    assert error(ours["bias"], truth["bias"]) < 1e-6  # a sum is not
    adapters = Adapters(layer.a, layer.b, layer.scales, layer.spans)
    call = (layer.dy, layer.x, None, layer.w, adapters, ALL, chosen, Impl.AUTO)
    with torch.no_grad():
        exact = backward(*call)  # no longer allowed: the library has it
    assert served.runs == 1 and error(exact.a[0], truth["a0"]) < 1e-5


def test_a_broken_kernel_of_tf32_is_caught(served: Served) -> None:  # noqa: F811
    served.fault = one_element
    with tf32(), pytest.warns(RuntimeWarning, match=r"lora_grad \(6 strips.*\) in tf32 .* over"):
        assert plan(dtype=torch.float32).library_alone


class TestElsewhere:
    """Without the fixture: this machine as it is."""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
    def test_a_cpu_is_never_served(self) -> None:
        assert plan().library_alone
        with pytest.raises(RuntimeError, match="impl='cuda' cannot serve: "):
            plan(Impl.CUDA)

    def test_wider_is_refused_with_the_reason(self, served: Served) -> None:  # noqa: F811
        with pytest.raises(RuntimeError, match="which torch does not allow: .*fp32_precision"):
            plan(Impl.CUDA, dtype=torch.float32)
        with pytest.raises(RuntimeError, match="TF32, bfloat16 and float16, not float64"):
            plan(Impl.CUDA, dtype=torch.float64)
        frozen = Needs(a=False, b=False)
        assert plan(Impl.CUDA, frozen, torch.float32).library_alone  # nothing of theirs to do


def test_the_self_test_lists_every_form(served: Served, monkeypatch) -> None:  # noqa: F811
    from fused_lora.kernels.cuda.lora_grad_shape import examples
    from fused_lora.kernels.cuda.native import Chip
    from fused_lora.verify.kernel_registry import compiled_grads

    for dtype, least in (("bfloat16", 40), ("tf32", 12)):
        listed = list(compiled_grads(dtype, CPU))
        forms = (1 + 2 * (dtype != "tf32")) * len(examples(Chip(90, 1), dtype == "tf32"))
        assert len(listed) == forms > least
        assert len({one.subject for one in listed}) == len(listed)
        result = selftest._result(listed[0], CPU)
        assert result.subject.kernel == "lora_grad"
