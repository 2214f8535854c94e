"""Blocks by the library's products, whose low-rank terms are left to the kernels that read next."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.triton import lora_expand, lora_grad, lora_grad_rank
from fused_lora.ops import backends, elementwise, epilogues, lora_grad_backends
from fused_lora.ops.chain import stages
from fused_lora.ops.lora_block import lora_attention, lora_residual
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Forward, Impl
from tests.kernels.cuda.serving import forget
from tests.kernels.triton.interpreted.serving import serving  # noqa: F401
from tests.kernels.triton.interpreted.test_chains import (
    BF16,
    F32,
    F64,
    NAMES,
    gradients,
    operands,
    run,
    within,
)
from tests.kernels.triton.interpreted.test_chains import plain as plain_half
from tests.kernels.triton.interpreted.test_gradients_in_dx import host  # noqa: F401
from tests.ops.block_problems import cast, leaves, matrix, norm, plain_attention, plain_linear

D, H = 64, 256
KERNELS = {
    "norm": (lora_expand, "layer_norm_expand"),
    "residual": (lora_expand, "residual_expand"),
    "gelu": (lora_grad, "activation_grad_and_slices"),
    "packed": (lora_grad_rank, "pack_and_slices"),
}


@pytest.fixture
def closed(serving) -> list[str]:  # noqa: F811
    """What closed a product, in order, by the library's plans of one GEMM each way."""
    every = backends.plans

    def asked(*how):
        ways = {Forward.BORDERED, Forward.OPEN}
        own = [plan for plan in every(*how) if plan.backend is Backend.ATEN]
        return [plan for plan in own if {plan.forward, plan.dx} <= ways]

    serving.setattr(backends, "plans", asked)
    ran: list[str] = []
    for said, (module, name) in KERNELS.items():
        right = getattr(module, name)

        def watched(*given, right=right, said=said, **how):
            ran.append(said)
            return right(*given, **how)

        serving.setattr(module, name, watched)
    for name in ("expand", "expand_grad"):
        right = getattr(aten, name)

        def alone(*given, right=right, name=name):
            ran.append(name)
            return right(*given)

        serving.setattr(aten, name, alone)
    serving.setattr("fused_lora.ops.chain.chain.expand_grad", aten.expand_grad)
    forget()
    return ran


@pytest.fixture
def both(closed, serving, host) -> list[str]:  # noqa: F811
    """Likewise beside the compiled gradients."""
    serving.setattr(native, "load", lambda: host)
    serving.setattr(native, "why_not", lambda device=None: None)
    serving.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 3)))
    serving.setattr(lora_grad_backends, "why_not_on", lambda device: None)
    for name in ("CUDA_LAUNCH_CALLS", "GRADIENT_CALLS", "SLICES"):
        serving.setattr(f"fused_lora.plan.cost_kernels.{name}", 0)
    serving.setattr("fused_lora.plan.cost_kernels.CUDA_EFFICIENCY", 1e6)
    forget()
    return closed


def of(dtype=BF16, **trains):
    return operands(dtype, (2, 35), (D, H), **trains)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("programs", [True, False])
@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_every_gradient(both, monkeypatch, kind, programs, recompute):
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", str(int(programs)))
    given = of()
    within(run(given, BF16, recompute, NAMES[kind]), given, BF16, NAMES[kind])
    joint = ["gelu"] * (recompute != "gemm")  # which keeps no h
    assert both == ["residual", *joint, "norm"]
    # A program's launches are bound from its second run on.
    within(run(given, BF16, recompute, NAMES[kind]), given, BF16, NAMES[kind])


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_without_the_compiled_gradients(closed, recompute):
    """Nobody forms gradients in the tiles of du then, so fc2's dx is not left open."""
    given = of()
    within(run(given, BF16, recompute), given, BF16)
    assert closed == ["residual", "norm"]


def test_biases_that_train(both):
    given = of(bias=True)
    within(run(given, BF16, "elementwise"), given, BF16)
    assert both == ["residual", "gelu", "norm"]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_attention(closed, request, compiled, groups, recompute):
    if compiled:
        request.getfixturevalue("both")
    qkv = matrix(3 * D, D, 5, groups, BF16, w=False, bias=False)
    proj = matrix(D, D, 3, dtype=BF16, w=False, bias=False)
    x = torch.randn(2, 19, D, dtype=BF16, requires_grad=True)
    given = (x, norm(D, BF16, trains=False), qkv, proj)

    def ours():
        parts = cast(given, BF16)
        y = lora_attention(*parts, 4, recompute=recompute)
        return [y.detach(), *gradients(y, parts)]

    def plain(dtype):
        parts = cast(given, dtype)
        y = plain_attention(*parts, 4)
        return [y.detach(), *gradients(y, parts)]

    verdict = judge_all(ours(), in_every_order(lambda: plain(BF16)), plain(F64), BF16)
    assert verdict.passed, str(verdict)
    packs = ["packed"] * (compiled and recompute != "gemm")  # which keeps no h
    assert [one for one in closed if one in KERNELS] == ["residual", *packs, "norm"]


@pytest.mark.parametrize("trains", [{"a": False}, {"b": False}, {"w": True, "bias": True}], ids=str)
def test_every_subset_of_gradients_of_attention(both, trains):
    """db and dh of qkv are formed with its dy where its b trains; what else there is, of dy."""
    attention_within(both, ["packed"] * trains.get("b", True), **trains)


def test_gradients_of_qkv_of_a_kernel_that_is_not_trusted(both, monkeypatch):
    """Nor asked for: h is kept for nobody."""
    right = epilogues.why_not_launch

    def asked(kernel, *how):
        return "wrong" if kernel == "pack_grads" else right(kernel, *how)

    monkeypatch.setattr(epilogues, "why_not_launch", asked)
    attention_within(both, [])


def test_gradients_of_qkv_of_a_kernel_that_is_trusted_no_more(both, monkeypatch):
    """h was kept for it: gradients have a pass of their own, which reads it."""
    monkeypatch.setattr(stages, "why_not_packed", lambda previous, like: "not any more")
    attention_within(both, [])


def attention_within(closed: list[str], packs: list[str], **trains: bool) -> None:
    """Attention of three adapters of qkv, of which ``trains`` does."""
    frozen = {"w": False, "bias": False}
    qkv = matrix(3 * D, D, 5, 3, BF16, **frozen | trains)
    proj = matrix(D, D, 3, dtype=BF16, **frozen)
    x = torch.randn(2, 19, D, dtype=BF16, requires_grad=True)
    given = (x, norm(D, BF16, trains=False), qkv, proj)

    def results(attention, dtype):
        parts = cast(given, dtype)
        y = attention(*parts, 4)
        return [y.detach(), *gradients(y, parts)]

    ours = results(partial(lora_attention, recompute="elementwise"), BF16)
    plain = partial(results, plain_attention)
    verdict = judge_all(ours, in_every_order(lambda: plain(BF16)), plain(F64), BF16)
    assert verdict.passed, str(verdict)
    assert [one for one in closed if one == "packed"] == packs


@pytest.mark.parametrize("scaled", [True, False])
def test_a_residual_alone(closed, scaled):
    linear = matrix(D, 40, 5, dtype=BF16, w=False, bias=False)
    x, residual = torch.randn(3, 7, 40, dtype=BF16), torch.randn(3, 7, D, dtype=BF16)
    gamma = torch.randn(D, dtype=BF16) if scaled else None
    given = (x.requires_grad_(), linear, residual.requires_grad_())

    def ours():
        x, linear, residual = parts = cast(given, BF16)
        y = lora_residual(x, linear, residual, gamma)
        return [y.detach(), *gradients(y, parts)]

    def plain(dtype):
        x, linear, residual = parts = cast(given, dtype)
        factor = 1.0 if gamma is None else gamma.to(dtype)
        y = residual + factor * plain_linear(x, linear)
        return [y.detach(), *gradients(y, parts)]

    verdict = judge_all(ours(), in_every_order(lambda: plain(BF16)), plain(F64), BF16)
    assert verdict.passed, str(verdict)
    assert closed[:1] == ["residual"] and "expand" not in closed


def test_an_fp32_stream_under_autocast(both):
    given = of(F32)
    with torch.autocast("cpu", BF16):
        ours = run(given, F32, "elementwise")
        assert both == ["residual", "gelu", "norm"]
        others = in_every_order(lambda: run(given, F32, "elementwise", impl=Impl.ATEN))
    verdict = judge_all(ours, others, plain_half(given, F64), BF16)
    assert verdict.passed, str(verdict)
    assert [t.dtype for t in ours] == [t.dtype for t in others[0]]


SUBSETS = [
    {"x": False},
    {"a": False},
    {"b": False},
    {"x": False, "a": False},
    {"a": False, "b": False},
    {"w": True, "bias": True},
]


@pytest.mark.parametrize("trains", SUBSETS, ids=str)
@pytest.mark.parametrize("recompute", ["elementwise", "gemm"])
def test_every_subset_of_gradients(both, trains, recompute):
    given = of(**trains)
    within(run(given, BF16, recompute), given, BF16)
    assert both[0] == "residual" and "expand" not in both and "expand_grad" not in both
    assert both.count("norm") == trains.get("x", True)


def test_a_norm_that_trains_closes_no_product(both):
    x, _, *fcs = of()
    given = (x, norm(D, BF16), *fcs)
    within(run(given, BF16, "elementwise"), given, BF16)
    assert "norm" not in both and "gelu" in both and leaves(*given)


@pytest.mark.parametrize("fault", ["norm", "gelu", "residual"])
def test_what_may_not_run_any_more_is_added_in_a_pass_of_its_own(both, monkeypatch, fault):
    """A kernel that was trusted when the plan was made, and is no more when it is its turn."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    given, right = of(), elementwise.why_not_expand
    asked = []

    def later(kernel, *how):
        asked.append(kernel)
        turn = asked.count("expand_residual") > 1 if fault == "residual" else len(both) > 0
        return "not any more" if kernel == f"expand_{fault}" and turn else right(kernel, *how)

    monkeypatch.setattr(elementwise, "why_not_expand", later)
    if fault == "gelu":
        place = "fused_lora.ops.chain.linear.LinearStage.takes_previous"
        monkeypatch.setattr(place, lambda *_: False)
    within(run(given, BF16, "elementwise"), given, BF16)
    assert fault not in both
    assert ("expand" if fault == "residual" else "expand_grad") in both


@pytest.mark.parametrize("fault", ["fp32", "ranks", "gelu of fc1", "asked for the library"])
def test_where_it_is_not_asked_for(both, monkeypatch, fault):
    dtype = F32 if fault == "fp32" else BF16
    given = of(dtype)
    if fault == "ranks":
        monkeypatch.setattr(elementwise, "MOST_ROW_RANKS", 2)
        monkeypatch.setattr("fused_lora.kernels.triton.tiles.MOST_GRAD_RANKS", 2)
    impl = Impl.ATEN if fault == "asked for the library" else Impl.AUTO
    activation = "silu" if fault == "gelu of fc1" else "gelu"
    within(run(given, dtype, "elementwise", activation, impl), given, dtype, activation)
    assert "gelu" not in both
    assert ("norm" in both) == ("residual" in both) == (fault == "gelu of fc1")


def test_an_open_plan_is_one_for_who_closes_it(closed):
    """No call that stands alone has one."""
    from fused_lora.ops.planning import problem
    from fused_lora.plan.strategies import candidates, why_not
    from fused_lora.types import FusionContext, Needs, Span

    given = (70, D, H, (Span(0, H, 3),), BF16, True, Needs())
    alone = candidates(problem(*given))
    assert not [plan for plan in alone if Forward.OPEN in (plan.forward, plan.dx)]
    context = FusionContext(expanded=True, input_expanded=True)
    within_chain = candidates(problem(*given, context))
    opened = next(p for p in within_chain if p.forward is p.dx is Forward.OPEN)
    assert "behind y" in why_not(problem(*given), opened)
    half = replace(opened, forward=Forward.SEPARATE)
    assert "before x" in why_not(problem(*given), half)
    assert why_not(problem(*given, FusionContext(input_expanded=True)), half) is None
