"""EXTENDED on sm_90: the kernel's own source over an emulated block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.cuda import lora_extended as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.testing.yardstick import error, in_every_order, judge

from .linear_cases import BF16, CASES, F16, Case, Problem, one

WORLDS = [(False, True), (True, True)]  # threads backwards, copies and products late
H100 = Chip(90, 132)


def tiles(case: Case) -> list[cuda.Tile]:
    """Two of the tiles, all over the cases; float16 is compiled for the CPU in one."""
    i = CASES.index(case)
    return [cuda.TILES[0]] if case.dtype is F16 else [cuda.TILES[i % 5], cuda.TILES[(i + 2) % 5]]


RUNS = [(case, tile) for case in CASES for tile in tiles(case)]
IDS = [f"{case.why}, {rows} x {columns}" for case, (rows, columns) in RUNS]


@pytest.fixture
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The launcher uses the module whose kernels run on the CPU."""
    monkeypatch.setattr(native, "load", lambda: host)
    yield host
    world(host, False, False)


def world(host: ModuleType, backwards: bool, late: bool) -> None:
    """In which order emulated threads take turns, and when copies and products land."""
    ctypes.CDLL(host.__file__).host_linear_world(backwards, late)


def equal(ours: Tensor, truth: Tensor) -> None:
    """To the bit: fp32 sums of few-bit numbers are exact, and then rounded once."""
    assert torch.equal(ours, truth.float().to(ours.dtype)), error(ours, truth)


def beside(inside: Tensor) -> Tensor:
    """What lies between the rows of a block of a larger tensor."""
    (m, n), row = inside.shape, inside.stride(0)
    return inside.as_strided((m - 1, row - n), (row, 1), inside.storage_offset() + n)


@pytest.mark.parametrize("case, tile", RUNS, ids=IDS)
def test_forward(on_host: ModuleType, case: Case, tile: cuda.Tile) -> None:
    p, chip = Problem(case), Chip(90, case.processors)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        out = p.out(case.n)
        y, _, u = cuda.forward(p.x, p.w, p.bias, p.adapters, h=p.h, tile=tile, out=out, chip=chip)
        assert y is out and u is None
        equal(y, p.u())
        assert beside(out).isnan().all()


@pytest.mark.parametrize("case, tile", RUNS, ids=IDS)
def test_input_grad(on_host: ModuleType, case: Case, tile: cuda.Tile) -> None:
    p, chip = Problem(case), Chip(90, case.processors)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, dh=p.dh, tile=tile, chip=chip)
        equal(dx, p.dx())


SMALL = Case("a tail in rows and columns", 75, 40, 136, one(136, 4), gap=8)


@pytest.mark.parametrize("tile", cuda.TILES, ids=str)
def test_scale_and_residual(on_host: ModuleType, tile: cuda.Tile) -> None:
    p, residual = Problem(SMALL), Problem(SMALL).residual(SMALL.n)
    extra = dict(factor=p.factor, residual=residual)
    y = cuda.forward(p.x, p.w, None, p.adapters, h=p.h, tile=tile, **extra, chip=H100).y
    equal(y, residual.double() + p.factor.double() * (p.u() - p.bias.double()))
    joined = p.residual(SMALL.k)
    dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, p.dh, tile, residual=joined, chip=H100)
    equal(dx, joined.double() + p.dx())


@pytest.mark.parametrize("tile", cuda.TILES, ids=str)
@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_activation(on_host: ModuleType, kind: str, approximate: str, tile: cuda.Tile) -> None:
    p = Problem(SMALL)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        y, _, u = cuda.forward(
            p.x, p.w, p.bias, p.adapters, kind, h=p.h, tile=tile, factor=p.factor, chip=H100
        )
        equal(u, p.u())
        truth = p.factor.double() * F.gelu(p.u(), approximate=approximate)
        assert error(y, truth) <= 2**-9


@pytest.mark.parametrize("tile", cuda.TILES, ids=str)
@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_activation_grad(
    on_host: ModuleType, kind: str, approximate: str, tile: cuda.Tile
) -> None:
    p = Problem(SMALL)
    u, joined = p.out(SMALL.k), p.residual(SMALL.k)
    u.copy_(2 * torch.randn(u.shape))
    at = u.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.gelu(at, approximate=approximate), at, p.dx())
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        given = (p.dy, p.w, p.adapters, p.dh, tile)
        how = dict(activation=kind, u=u, chip=H100)
        du, _ = cuda.input_grad(*given, **how)
        assert error(du, truth) <= 2**-9
        both, _ = cuda.input_grad(*given, residual=joined, **how)
        assert error(both, joined.double() + truth) <= 2**-9
        assert beside(u).isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_ordinary_numbers_keep_the_yardstick(on_host: ModuleType, dtype: torch.dtype) -> None:
    """h and dh formed here; the tile chosen here."""
    p = Problem(Case("", 70, 136, 128, one(128, 12), dtype, torch.float32, scale=1.3))
    torch.manual_seed(1)
    p.x, p.w, p.dy = (torch.randn(t.shape).to(dtype) for t in (p.x, p.w / 8, p.dy))
    p.adapters = p.adapters._replace(a=[torch.randn(12, 136) / 12], b=[torch.randn(128, 12) / 4])
    (a,), (b,), (s,), _ = p.adapters
    y = cuda.forward(p.x, p.w, None, p.adapters, tile=(128, 128), chip=H100).y
    dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, tile=(128, 128), chip=H100)
    for name, ours, left, right, down, up in [
        ("y", y, p.x, p.w.T, a.T, b.T),
        ("dx", dx, p.dy, p.w, b, a),
    ]:
        product = lambda x, w, down, up: x @ w + s * (x @ down) @ up  # noqa: E731
        low, wide = ([t.to(to) for t in (left, right, down, up)] for to in (dtype, torch.float64))
        plain, truth = in_every_order(partial(product, *low)), product(*wide)
        assert (found := judge(name, ours, plain, truth, dtype)).passed, found


def test_same_bits_in_every_world(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    p.x, p.w = (torch.randn(t.shape).to(BF16) for t in (p.x, p.w))
    found = []
    for backwards in (False, True):
        for late in (False, True):
            world(on_host, backwards, late)
            found.append(cuda.forward(p.x, p.w, None, p.adapters, h=p.h, chip=H100).y)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_to_do(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    y = cuda.forward(p.x[:0], p.w, p.bias, p.adapters, chip=H100).y
    assert y.shape == (0, SMALL.n)


@pytest.mark.parametrize(
    "rows, columns, tile",
    [(25216, 768, (128, 192)), (25216, 384, (128, 192)), (197, 768, (64, 128)), (8, 8, (64, 128))],
)
def test_plan(host: ModuleType, rows: int, columns: int, tile: cuda.Tile) -> None:
    """ViT-B and ViT-S at a batch of 128; one image; next to nothing."""
    asked = dict(right=host.Right.rows, activation=host.Activation.none, processors=132)
    plan = host.plan_lora_linear(rows=rows, columns=columns, depth=768, ranks=16, **asked)
    assert (plan.tile_rows, plan.tile_columns) == tile
    assert plan.blocks == min(132, plan.tiles) and plan.smem_bytes <= 227 << 10


def test_why_not(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    assert cuda.why_not(p.x, p.w, p.adapters) is None
    for x, w, word in [
        (p.x.float(), p.w, "bfloat16"),
        (p.x, p.w[:, :36], "multiples of 8"),
        (p.x[:, 1:33], p.w[:, :32], "x or its rows"),
        (p.x, p.w.T.contiguous().T, "w or its rows"),
    ]:
        assert word in str(cuda.why_not(x, w, p.adapters))
    many = p.adapters._replace(spans=p.adapters.spans * 5)
    assert "5 adapters" in str(cuda.why_not(p.x, p.w, many))


def test_what_the_launch_refuses(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    with pytest.raises(ValueError, match="residual must begin"):
        cuda.forward(p.x, p.w, None, p.adapters, residual=p.residual(137)[:, 1:], chip=H100)
    with pytest.raises(ValueError, match="u must begin"):
        u = p.residual(SMALL.k + 1)[:, 1:]
        cuda.input_grad(p.dy, p.w, p.adapters, p.dh, activation="erf", u=u, chip=H100)
    with pytest.raises(ValueError, match="u belongs to an activation"):
        cuda.input_grad(p.dy, p.w, p.adapters, p.dh, activation="erf", chip=H100)
    with pytest.raises(ValueError, match="bias must begin"):
        cuda.forward(p.x, p.w, torch.zeros(137, dtype=BF16)[1:], p.adapters, chip=H100)
