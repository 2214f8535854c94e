"""lora_grads of a LayerNorm's input: x is formed on chip, over an emulated block."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_grad as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad_shape import GradCall
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import InputNorm
from fused_lora.ops import elementwise
from fused_lora.types import Impl, Needs, Span

from .grad_cases import BF16, CASES, F16, F32, Case, Problem
from .test_lora_grad import (
    ALL,
    KINDS,
    NEEDS,
    ROUNDED_H,
    SMALL,
    check,
    error,
    flat,
    on_host,  # noqa: F401
    run,
    world,
)

OF_16_BITS = [case for case in CASES if case.dtype is not F32]
VECTORS = [(F32, F32), (BF16, None), (None, F16), (None, None), (F16, F16), (BF16, BF16)]
EPS = 1e-6


def beside_nan(values: Tensor) -> Tensor:
    """``values`` at the beginning of a vector that goes on with NaN."""
    whole = torch.full((values.numel() + 16,), torch.nan, dtype=values.dtype)
    return whole[: values.numel()].copy_(values)


def of_norm(p: Problem, dtypes: tuple[torch.dtype | None, torch.dtype | None]) -> InputNorm:
    """The LayerNorm of ``p.x``, with gamma and beta of ``dtypes`` or without."""
    wide, k = p.x.float(), p.x.shape[1]
    mean = wide.mean(1)
    rstd = ((wide - mean[:, None]).square().mean(1) + EPS).rsqrt()
    gamma, beta = (None if t is None else beside_nan(torch.randn(k).to(t)) for t in dtypes)
    return InputNorm(beside_nan(mean), beside_nan(rstd), gamma, beta)


def made(z: Tensor, norm: InputNorm) -> Tensor:
    """x in fp32, rounded once."""
    x = (z.float() - norm.mean[:, None]) * norm.rstd[:, None]
    x = x if norm.gamma is None else x * norm.gamma.float()
    x = x if norm.beta is None else x + norm.beta.float()
    return x.to(z.dtype)


def normed(case: Case, dtypes=(F32, F32)) -> tuple[Problem, Tensor, InputNorm]:
    """A problem, the z that its x is the LayerNorm of, and what makes it."""
    p = Problem(case)
    z, norm = p.x, of_norm(p, dtypes)
    p.x = made(z, norm)
    p.h, p.dh = p.shrunk()
    return p, z, norm


@pytest.mark.parametrize("at", range(len(OF_16_BITS)), ids=[case.why for case in OF_16_BITS])
def test_x_is_formed_of_z(on_host: ModuleType, at: int) -> None:  # noqa: F811
    """To the bit the gradients of the x that was made before; within the budget of float64."""
    case, needs = OF_16_BITS[at], Needs(x=False)
    p, z, norm = normed(case, VECTORS[at % len(VECTORS)])
    x, truth = p.x, p.expected(needs)
    for late in (False, True):
        world(on_host, not late, late, late and case.arch >= 90)
        p.x = x
        before = flat(run(p, needs))
        p.x = z
        ours = run(p, needs, norm=norm)
        assert all(torch.equal(flat(ours)[name], value) for name, value in before.items())
    check(ours._replace(b=[None]), truth._replace(b=[None]))
    assert error(flat(ours)["b"], flat(truth)["b"]) < ROUNDED_H


@pytest.mark.parametrize("given", ["", "h", "dh", "h dh"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_every_subset_of_gradients(on_host: ModuleType, needs: Needs, given: str) -> None:  # noqa: F811
    """In every world, with dh written or not."""
    p, z, norm = normed(replace(SMALL, given=given))
    before = flat(run(p, needs))
    p.x = z
    for backwards, late, bulk in product((False, True), repeat=3):
        world(on_host, backwards, late, bulk)
        written = {} if "dh" in given else {"dh_out": torch.empty_like(p.dh)}
        found = flat(run(p, needs, norm=norm, **written))
        assert all(torch.equal(found[name], value) for name, value in before.items())
        assert not written or torch.equal(written["dh_out"], p.dh)


@pytest.mark.parametrize("vectors", VECTORS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gamma_and_beta_of_every_dtype(on_host: ModuleType, dtype, vectors) -> None:  # noqa: F811
    p, z, norm = normed(replace(SMALL, dtype=dtype), vectors)
    before = flat(run(p, ALL))
    p.x = z
    found = flat(run(p, ALL, norm=norm))
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_it_is_what_whoever_makes_it_again_has(on_host: ModuleType) -> None:  # noqa: F811
    """``layer_norm_rebuild`` by the library, of the statistics of its forward."""
    p = Problem(replace(SMALL, k=136))
    z, weight, bias = p.x, torch.randn(136), torch.randn(136)
    _, mean, rstd = elementwise.layer_norm_forward(z, weight, bias, EPS, impl=Impl.ATEN)
    norm = InputNorm(mean, rstd, weight, bias)
    p.x = elementwise.layer_norm_rebuild(z, weight, bias, mean, rstd, impl=Impl.ATEN)
    before = flat(run(p, ALL))
    p.x = z
    found = flat(run(p, ALL, norm=norm))
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_no_rows(on_host: ModuleType) -> None:  # noqa: F811
    p, z, norm = normed(replace(SMALL, m=0))
    assert all((grad == 0).all() for grad in flat(run(p, ALL, norm=norm)).values())


def test_what_it_is_not_formed_of(on_host: ModuleType) -> None:  # noqa: F811
    p, z, norm = normed(SMALL)
    good = GradCall(z, p.dy, p.adapters, Needs(), None, None)
    assert good.why_not_normed(norm) is None is good.why_not_normed(None)
    gamma = torch.zeros(80)
    bad = {
        "mean must be (41,) torch.float32": norm._replace(mean=norm.mean[1:]),
        "rstd must be (41,) torch.float32": norm._replace(rstd=norm.rstd.double()),
        "gamma must be (72,) torch.float32 or": norm._replace(gamma=gamma[1:]),
        "beta must be (72,)": norm._replace(beta=torch.zeros(72).double()),
        "gamma must be (72,), contiguous": norm._replace(gamma=torch.zeros(144)[::2]),
        "gamma does not begin": norm._replace(gamma=gamma[1:73]),
        "one dtype, got torch.bfloat16 and torch.float32": norm._replace(gamma=gamma[:72].to(BF16)),
    }
    for sentence, wrong in bad.items():
        said = good.why_not_normed(wrong)
        wanted, _, layout = sentence.partition(", contiguous")
        assert said and wanted in said and ("strides (2,)" in said or not layout), said
    fp32 = good._replace(x=z.float(), dy=p.dy.float())
    said = "x is formed of the input of a LayerNorm of 16 bits, got torch.float32"
    assert fp32.why_not_normed(norm) == said
    assert "nothing is" in good._replace(x=None).why_not_normed(norm)
    with pytest.raises(AssertionError, match="gamma does not begin"):
        run(p, Needs(), norm=bad["gamma does not begin"])
    with pytest.raises(AssertionError, match="erf"):
        run(p, Needs(), norm=norm, activation="erf")


def test_what_the_module_refuses(on_host: ModuleType) -> None:  # noqa: F811
    p, z, norm = normed(SMALL)
    plan = GradCall(z, p.dy, p.adapters, Needs(), None, None).plan(Chip(80, 2))
    bf16, group = on_host.DType.bfloat16, on_host.GradGroup
    place = dict(first_column=0, columns=40, first_rank=0, rank=16, scale=1.0)
    whole = dict(x_row=72, dy_row=40, h_row=0, dh_row=0, rows=41, type=bf16, adapter=bf16)
    whole |= dict(groups=[group(a_strides=(1, 1), b_strides=(1, 1), **place)])
    mean, rstd, gamma, beta = (t.data_ptr() for t in norm)
    kinds = {name: getattr(on_host.Activation, name) for name in ("none", *KINDS)}
    bad = {
        "mean and rstd are given together": ("none", (mean, 0, gamma, beta)),
        "gamma and beta are given without mean": ("none", (0, 0, gamma, 0)),
        "must begin at a multiple of 16 bytes": ("none", (mean, rstd, gamma + 4, beta)),
        "an activation or a LayerNorm": ("erf", (mean, rstd, 0, 0)),
    }
    for message, (kind, at) in bad.items():
        bound = on_host.BoundGrad(plan=plan, **whole, activation=kinds[kind])
        with pytest.raises(ValueError, match=message):
            bound([z.data_ptr(), p.dy.data_ptr(), 0, 0, 0, 0, *at, 0, 0], 0, 0)
    fp32 = GradCall(z.float(), p.dy.float(), p.adapters, Needs(), None, None).plan(Chip(90, 2))
    bound = on_host.BoundGrad(plan=fp32, **whole | dict(type=on_host.DType.float32))
    with pytest.raises(ValueError, match="of 16 bits, planned for fp32"):
        bound([z.data_ptr(), p.dy.data_ptr(), 0, 0, 0, 0, mean, rstd, 0, 0, 0, 0], 0, 0)


def test_rows_and_columns_beyond_stay_zeros(on_host: ModuleType) -> None:  # noqa: F811
    """Of every tail: what lies beside statistics, gamma and beta is NaN, and is not read."""
    for m, k in product((1, 15, 17, 33), (8, 24, 40)):
        case = Case("tails", m, k, 24, (Span(0, 24, 5),))
        p, z, norm = normed(case)
        p.x = z
        for bulk in (False, True):
            world(on_host, False, bulk, bulk)
            assert all(t.isfinite().all() for t in flat(run(p, ALL, norm=norm)).values())


@pytest.mark.gpu
@pytest.mark.parametrize("vectors", VECTORS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_bits_are_those_of_tritons_kernel(dtype, vectors) -> None:
    """Which made x in forward, and would again."""
    if reason := native.why_not():
        pytest.skip(reason)
    triton = pytest.importorskip("fused_lora.kernels.triton.elementwise")
    p = Problem(Case("ViT-B, a tail", 197, 768, 768, (Span(0, 768, 16),), dtype))
    z, dy = torch.randn(197, 768).to(dtype).cuda(), p.dy.cuda()
    a, b = ([t.cuda() for t in halves] for halves in p.adapters[:2])
    adapters, k = p.adapters._replace(a=a, b=b), z.shape[1]
    gamma, beta = (None if t is None else torch.randn(k).to(t).cuda() for t in vectors)
    _, mean, rstd = triton.layer_norm_forward(z, gamma, beta, EPS)
    x = triton.layer_norm_rebuild(z, gamma, beta, mean, rstd)
    if reason := cuda.why_not(x, dy, adapters, ALL):
        pytest.skip(reason)
    norm = InputNorm(mean, rstd, gamma, beta)
    ours = flat(cuda.lora_grads(z, dy, adapters, ALL, norm=norm))
    again = flat(cuda.lora_grads(x, dy, adapters, ALL))
    assert all(torch.equal(ours[name], value) for name, value in again.items())
