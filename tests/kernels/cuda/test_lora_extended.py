"""EXTENDED on sm_90: the kernel's own source over an emulated block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.cuda import lora_extended as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.testing.yardstick import error, in_every_order, judge
from fused_lora.types import Span

from .linear_cases import BF16, CASES, F16, Case, Problem, one

WORLDS = [(False, True), (True, True)]  # threads backwards, copies and products late
H100 = Chip(90, 132)


def tiles(case: Case) -> list[cuda.ProductTile]:
    """Two of the tiles, all over the cases; float16 is compiled for the CPU in one."""
    i = CASES.index(case)
    return [cuda.ALONE[0]] if case.dtype is F16 else [cuda.ALONE[i % 5], cuda.ALONE[(i + 2) % 5]]


RUNS = [(case, tile) for case in CASES for tile in tiles(case)]
IDS = [f"{case.why}, {tile}" for case, tile in RUNS]


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
def test_forward(on_host: ModuleType, case: Case, tile: cuda.ProductTile) -> None:
    p, chip = Problem(case), Chip(90, case.processors)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        out = p.out(case.n)
        y, _, u = cuda.forward(p.x, p.w, p.bias, p.adapters, h=p.h, tile=tile, out=out, chip=chip)
        assert y is out and u is None
        equal(y, p.u())
        assert beside(out).isnan().all()


@pytest.mark.parametrize("case, tile", RUNS, ids=IDS)
def test_input_grad(on_host: ModuleType, case: Case, tile: cuda.ProductTile) -> None:
    p, chip = Problem(case), Chip(90, case.processors)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, dh=p.dh, tile=tile, chip=chip)
        equal(dx, p.dx())


SMALL = Case("a tail in rows and columns", 75, 40, 136, one(136, 4), gap=8)


@pytest.mark.parametrize("tile", cuda.ALONE, ids=str)
def test_scale_and_residual(on_host: ModuleType, tile: cuda.ProductTile) -> None:
    p, residual = Problem(SMALL), Problem(SMALL).residual(SMALL.n)
    extra = dict(factor=p.factor, residual=residual)
    y = cuda.forward(p.x, p.w, None, p.adapters, h=p.h, tile=tile, **extra, chip=H100).y
    equal(y, residual.double() + p.factor.double() * (p.u() - p.bias.double()))
    joined = p.residual(SMALL.k)
    dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, p.dh, tile, residual=joined, chip=H100)
    equal(dx, joined.double() + p.dx())


@pytest.mark.parametrize("tile", cuda.ALONE, ids=str)
@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_activation(
    on_host: ModuleType, kind: str, approximate: str, tile: cuda.ProductTile
) -> None:
    p = Problem(SMALL)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        y, _, u = cuda.forward(
            p.x, p.w, p.bias, p.adapters, kind, h=p.h, tile=tile, factor=p.factor, chip=H100
        )
        equal(u, p.u())
        truth = p.factor.double() * F.gelu(p.u(), approximate=approximate)
        assert error(y, truth) <= 2**-9


@pytest.mark.parametrize("tile", cuda.ALONE, ids=str)
@pytest.mark.parametrize("kind, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_activation_grad(
    on_host: ModuleType, kind: str, approximate: str, tile: cuda.ProductTile
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
    y = cuda.forward(p.x, p.w, None, p.adapters, tile=cuda.ALONE[0], chip=H100).y
    dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, tile=cuda.ALONE[0], chip=H100)
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


PAIRED = [  # processors: a cluster that walks over tiles, or two with few; stages beyond the ring
    Case("one pair of row tiles, and a tail", 197, 136, 264, one(264, 70), processors=2),
    Case("three row tiles, so that one has no pair; groups within tiles", 300, 264, 216,
         tuple(Span(72 * g, 72 * g + 72, 16 - 5 * g) for g in range(3)), gap=8, processors=4),
    Case("four row tiles on a processor without a pair", 400, 520, 128, one(128, 40), processors=1),
]  # fmt: skip


@pytest.mark.parametrize("case", PAIRED, ids=lambda case: case.why)
@pytest.mark.parametrize("tile", (*cuda.CLUSTERS, *cuda.PING_PONG), ids=str)
def test_a_cluster_and_ping_pong_have_the_bits_of_a_block(
    on_host: ModuleType, case: Case, tile: cuda.ProductTile
) -> None:
    """Of ordinary numbers, whose sums depend on the order; with each epilogue, in every world."""
    p, chip = Problem(case), Chip(90, case.processors)
    for t in (p.x, p.w, p.dy):
        t.copy_(torch.randn(t.shape) / 4)
    u, joined = torch.randn(case.m, case.k).to(BF16), p.residual(case.n)

    def products(one: cuda.ProductTile, kind: str) -> list[Tensor]:
        how = dict(tile=one, chip=chip)
        given = (p.x, p.w, p.bias, p.adapters, kind, p.h)
        y, _, before = cuda.forward(*given, **how, factor=p.factor, residual=joined)
        behind = dict(activation=kind, u=u) if kind != "none" else {}
        dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, p.dh, **how, **behind)
        return [y, dx, *([] if before is None else [before])]

    kind = ("none", "erf", "tanh")[PAIRED.index(case)]
    world(on_host, False, False)
    alone = products(cuda.ProductTile(128, tile.columns), kind)
    for backwards, late in product((False, True), repeat=2):
        world(on_host, backwards, late)
        found = products(tile, kind)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_a_cluster_is_for_more_rows_than_a_tile_has(
    on_host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dict(columns=768, depth=768, ranks=16, right=on_host.Right.rows)
    asked |= dict(activation=on_host.Activation.none)

    def plan(rows: int, processors: int, tile: cuda.ProductTile = cuda.CLUSTERS[1]):
        return on_host.plan_lora_linear(rows=rows, processors=processors, tile=tile, **asked)

    assert [plan(rows, 132).cluster for rows in (0, 1, 128, 129, 25216)] == [1, 1, 1, 2, 2]
    assert (plan(25216, 132).blocks, plan(25216, 132).tiles) == (132, 4 * 198)  # of 197 row tiles
    assert (plan(25216, 133).blocks, plan(25216, 1).blocks, plan(129, 132).blocks) == (132, 2, 8)
    turns = cuda.PING_PONG[1]
    assert [cuda.ProductTile.of(plan(rows, 132, turns)) for rows in (64, 65)] == [
        turns._replace(cluster=1), turns,
    ]  # fmt: skip
    for tile in ((128, 192, 3), (128, 192, 0), (64, 128, 2), (96, 128, 1)):
        assert plan(25216, 132, cuda.ProductTile(*tile)) is None
    for tile in ((128, 192), (64, 128), (64, 256, 4)):
        assert plan(25216, 132, cuda.ProductTile(*tile, ping_pong=True)) is None
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: H100))
    sizes = [(m, n) for m in (197, 25216) for n in (384, 768, 3072)]
    by_rule = [cuda.tile_of(m, n, 768, 16, torch.bfloat16, torch.device("cpu")) for m, n in sizes]
    assert set(by_rule) <= set(cuda.ALONE)


def test_nothing_to_do(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    y = cuda.forward(p.x[:0], p.w, p.bias, p.adapters, chip=H100).y
    assert y.shape == (0, SMALL.n)


@pytest.mark.parametrize(
    "rows, columns, tile",
    [(25216, 768, (128, 192)), (25216, 384, (128, 192)), (197, 768, (64, 128)), (8, 8, (64, 128))],
)
def test_plan(host: ModuleType, rows: int, columns: int, tile: tuple[int, int]) -> None:
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
    with pytest.raises(
        ValueError, match="no tile of 64 x 128, ping-pong; it has 128 x 128; .* 64 x"
    ):
        other = cuda.ProductTile(64, 128, ping_pong=True)
        cuda.forward(p.x, p.w, None, p.adapters, tile=other, chip=H100)
    with pytest.raises(ValueError, match="bias must begin"):
        cuda.forward(p.x, p.w, torch.zeros(137, dtype=BF16)[1:], p.adapters, chip=H100)
