"""Endings of the Hopper product under the operations of blocks, over an emulated block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_lora.kernels.cuda import lora_extended
from fused_lora.kernels.cuda import lora_linear as room
from fused_lora.kernels.interface import Adapters, Epilogue, PreviousLinear
from fused_lora.ops import elementwise, epilogues, lora_grad_backends
from fused_lora.ops.lora_block import lora_mlp, lora_residual
from fused_lora.programs import run
from fused_lora.programs.describe import name_of
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Forward, Gradient, Impl, Keep, Needs, Plan, Span
from fused_lora.verify import verdicts
from fused_lora.verify.kernel_registry import of_compiled_product
from tests.ops.block_problems import cast, leaves, matrix, norm, plain_linear, plain_mlp, plain_norm

from .serving import Served, one_element, served  # noqa: F401
from .test_product_dispatch import BF16, CPU, hopper  # noqa: F401

F64, D, H = torch.float64, 24, 40
NAMES = {"erf": "gelu", "tanh": "gelu_tanh"}
TILE = lora_extended.ProductTile(64, 128)


@pytest.fixture(autouse=True)
def as_written(monkeypatch):
    """What is watched here are the calls themselves."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    run.forget()


@pytest.fixture
def ends(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """What the products that ran ended in, and GELUs of their own; checks are let pass."""
    ran: list[str] = []
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    for module, name in (
        (lora_extended, "_launch"),
        (elementwise, "gelu_forward"),
        (elementwise, "gelu_input_grad"),
    ):
        monkeypatch.setattr(module, name, told(getattr(module, name), name, ran))
    return ran


def told(right, name: str, ran: list[str]):
    """``right``, which leaves a word in ``ran``."""

    def watched(*args, **options):
        if name == "_launch":
            *_, epilogue, side, activation, _, _ = args
            said = {"rows": "product", "columns": "dx"}[side]
            joined = " residual" if epilogue["residual"] is not None else ""
            ran.append(said + joined + f" {activation}" * (activation != "none"))
        else:
            ran.append(name.replace("_", " ", 1))
        return right(*args, **options)

    return watched


def operands(dtype=BF16):
    x = torch.randn(3, 7, D, dtype=dtype, requires_grad=True)
    how = {"dtype": dtype, "w": False, "bias": False}
    return x, norm(D, dtype, trains=False), matrix(H, D, 3, **how), matrix(D, H, 5, **how)


def within(ours, plain, given) -> None:
    theirs = in_every_order(lambda: outcome(plain, given, BF16))
    verdict = judge_all(outcome(ours, given, BF16), theirs, outcome(plain, given, F64), BF16)
    assert verdict.passed, verdict


def outcome(function, given, dtype) -> list[Tensor]:
    """y and the gradients of every leaf."""
    given = cast(given, dtype)
    y = function(*given)
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, leaves(*given), torch.randn(y.shape).to(y.dtype))]


@pytest.mark.parametrize(
    "kind, recompute, again",
    [
        ("erf", "none", []),
        ("tanh", "elementwise", []),
        ("erf", "gemm", ["product"]),
    ],
)
def test_a_chain(ends: list[str], kind: str, recompute: str, again: list[str]) -> None:
    """What backward makes ``again`` is u alone: fc2's gradients form GELU(u) as they read it."""
    given = operands()

    def ours(x, before, *fcs):
        fcs = [fc._replace(impl=Impl.CUDA) for fc in fcs]
        how = {"norm": before, "around": True, "recompute": recompute}
        return lora_mlp(x, *fcs, NAMES[kind], **how)

    def plain(x, before, *fcs):
        return x + plain_mlp(plain_norm(x, before), *fcs, NAMES[kind], None)

    within(ours, plain, given)
    forward = [f"product {kind}", "product residual"]
    assert ends == [*forward, *again, f"dx {kind}", "dx"]


def test_its_programs_launch_it_with_addresses_alone(
    hopper: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    given = operands()

    def ours(x, before, *fcs):
        fcs = [fc._replace(impl=Impl.CUDA) for fc in fcs]
        return lora_mlp(x, *fcs, "gelu", norm=before, around=True, recompute="elementwise")

    as_written = outcome(ours, given, BF16)
    monkeypatch.delenv("FUSED_LORA_PROGRAMS")
    recorded, again = outcome(ours, given, BF16), outcome(ours, given, BF16)
    (program,) = run.programs()
    names = [name_of(call) for call in (*program.calls, *program.calls_back)]
    assert names.count("lora_linear_sm90") == 4 and names.count("lora_grad") == 2
    for one, two, three in zip(as_written, recorded, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32 around"])
def test_scale_and_residual(ends: list[str], wide: bool) -> None:
    """In the epilogue where all is of one type, else behind it."""
    x, _, fc, _ = operands()
    around = torch.float32 if wide else BF16
    beside, gamma = torch.randn(3, 7, H, dtype=around, requires_grad=True), torch.randn(H)

    def ours(x, fc, beside):
        return lora_residual(x, fc._replace(impl=Impl.CUDA), beside, gamma.to(beside.dtype))

    def plain(x, fc, beside):
        return beside + gamma.to(beside.dtype) * plain_linear(x, fc)

    given = (x, fc, beside)
    if wide:
        y = ours(*given)
        assert y.dtype is torch.float32 and ends == ["product"]
        return
    within(ours, plain, given)
    assert ends == ["product residual", "dx"]


def test_out_where_the_copy_engine_cannot_write(ends: list[str]) -> None:
    from fused_lora.ops.lora_linear import NO_GRADIENT, Frame, compute

    x, w, bias = torch.randn(9, D).to(BF16), torch.randn(H, D).to(BF16), torch.randn(H + 1).to(BF16)
    a, b = torch.randn(3, D), torch.randn(H, 3)
    given = (Frame((0.5,), (Span(0, H, 3),), Impl.CUDA), BF16, (a, b), NO_GRADIENT)
    whole = torch.full((9, H + 3), 7.0, dtype=BF16)
    for odd in (bias[1:], bias[:-1]):
        done = compute(x, w, odd, *given, epilogue=Epilogue("erf"), out=whole[:, :H])
        direct = compute(x, w, odd, *given, epilogue=Epilogue("erf"))
        assert done.y.data_ptr() == whole.data_ptr() and torch.equal(done.y, direct.y)
        assert done.u is not None and torch.equal(done.u, direct.u)
    assert (whole[:, H:] == 7).all() and set(ends) == {"product erf"}


@pytest.mark.parametrize("behind", ["gelu", "scale"])
def test_the_checks_pass(hopper: list[str], behind: str) -> None:  # noqa: F811
    found = verdicts.verdict(of_compiled_product(TILE, "bfloat16", behind), CPU)
    assert found.passed, found


@pytest.mark.parametrize(
    "backend, dx, taken",
    [
        (Backend.CUDA, Forward.EXTENDED, False),
        (Backend.TRITON, Forward.EXTENDED, True),
        (Backend.TRITON, Forward.ONE_PASS, False),
        (Backend.ATEN, Forward.OPEN, True),
        (Backend.ATEN, Forward.BORDERED, False),
    ],
)
def test_gradients_of_two_linears_in_one_pass_are_triton_s_alone(
    hopper: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    dx: Forward,
    taken: bool,
) -> None:
    monkeypatch.setattr(lora_grad_backends, "_trusted", lambda *_: True)
    span = (Span(0, 64, 8),)
    how = {"backend": backend, "grads_by": Backend.CUDA, "writes_dh": True}
    plan = Plan(Forward.EXTENDED, dx, Gradient.RANK, Keep.HIDDEN, **how)
    dy, w = torch.zeros(9, 64, dtype=BF16), torch.zeros(64, 128, dtype=BF16)
    a, b = [torch.zeros(8, 128, dtype=BF16)], [torch.zeros(64, 8, dtype=BF16)]
    previous = PreviousLinear(dy[:, :8], Adapters(a, b, (1.0,), span))
    reason = lora_grad_backends.why_not_previous(previous, dy, w, 8, Needs(w=False), plan, BF16)
    assert reason is None if taken else f"the plan is {plan}" in str(reason)


@pytest.mark.parametrize("traced", [False, True])
def test_why_not_a_derivative(
    hopper: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    traced: bool,
) -> None:
    monkeypatch.setenv("FUSED_LORA_VERIFY", "first")
    extended, spans = Forward.EXTENDED, (Span(0, 40, 5),)
    plan = Plan(extended, extended, Gradient.RANK, Keep.NOTHING, backend=Backend.CUDA)
    dy, w = torch.zeros(9, 40, dtype=BF16), torch.zeros(40, 24, dtype=BF16)
    question = (dy, w, spans, plan, BF16)
    if traced:
        with FakeTensorMode():
            assert "traced" in str(epilogues.why_not_activation_grad(*question))
        return
    assert epilogues.why_not_activation_grad(*question) is None
    right = lora_extended.input_grad

    def broken(*args, **options):
        dx, dh = right(*args, **options)
        if options.get("u") is not None:
            dx = one_element(dx)
        return dx, dh

    verdicts.forget()
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "again"))
    monkeypatch.setattr(lora_extended, "input_grad", broken)
    with pytest.warns(RuntimeWarning, match="lora_linear_gelu"):
        assert "tanh du is over" in str(epilogues.why_not_activation_grad(*question))


def test_a_broken_ending_never_serves(
    hopper: list[str],  # noqa: F811
    ends: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = lora_extended.forward

    def broken(*args, **options):
        found = right(*args, **options)
        if found.u is not None:
            found.y[-1, -1] += 1
        return found

    monkeypatch.setattr(lora_extended, "forward", broken)
    monkeypatch.setenv("FUSED_LORA_VERIFY", "first")
    x, before, *fcs = operands()
    fcs = [fc._replace(impl=Impl.CUDA) for fc in fcs]
    with pytest.warns(
        RuntimeWarning, match=r"cuda lora_linear_gelu \(64 x 128\) in bfloat16 .* over"
    ):
        lora_mlp(x, *fcs, norm=before)
    ends.clear()
    lora_mlp(x, *fcs, norm=before)
    assert ends == ["product", "gelu forward", "product"]


def test_why_not() -> None:
    t = torch.zeros(8, 16)
    assert room.why_not_epilogue(BF16, Epilogue("erf")) is None
    assert "a residual of torch.bfloat16, got torch.float32" in str(
        room.why_not_epilogue(BF16, Epilogue(residual=t))
    )
    assert "a factor of" in str(
        room.why_not_epilogue(BF16, Epilogue(factor=t[0], residual=t.to(BF16)))
    )
    assert "16 bytes" in str(room.why_not_epilogue(BF16, Epilogue(residual=t.to(BF16)[:, 1:])))
