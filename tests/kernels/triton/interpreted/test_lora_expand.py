"""Low-rank terms added by what reads a product next: the yardstick, dtypes, fences, bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_lora.kernels.interface import Adapters, LowRank
from fused_lora.kernels.triton import border, lora_expand
from fused_lora.kernels.triton.tiles import MOST_ROW_RANKS, expand_tile
from fused_lora.ops import elementwise
from fused_lora.programs.describe import name_of, work
from fused_lora.programs.program import InputSpec
from fused_lora.programs.program import build as build_program
from fused_lora.testing.yardstick import judge
from tests.kernels.triton.cases import CASES, THIN_TILE, Case, adapters, build, lowered
from tests.kernels.triton.guards import fenced
from tests.kernels.triton.interpreted.serving import serving  # noqa: F401
from tests.programs.test_record import Op

LOW = (torch.bfloat16, torch.float16)
EPS = 1e-6
FEW = [case for case in CASES if sum(span.rank for span in case.spans) <= MOST_ROW_RANKS]
DTYPE = pytest.mark.parametrize("dtype", LOW, ids=str)
EACH = pytest.mark.parametrize("case", FEW, ids=[case.why for case in FEW])
WIDE = pytest.mark.parametrize("wide", [False, True])  # a stream in fp32, as autocast has it
TILES = {rank: replace(THIN_TILE, block_r=expand_tile(rank).block_r) for rank in range(1, 65)}


def hidden(p, dtype: torch.dtype):
    """h or dh [M, sum R], the right of a longer tensor."""
    rank = adapters(p).rank
    return torch.randn(p.x.shape[0], 5 + rank).to(dtype)[:, 5:]


def input_grad(p, x, dy, dh, weight, residual, to: torch.dtype):
    """dx in ``to``, by torch; p in that dtype as well."""
    dy, x = dy.to(to) + dh.to(to) @ torch.cat(p.a), x.to(to)
    own = None if weight is None else weight.to(to)
    _, mean, rstd = torch.native_layer_norm(x, x.shape[1:], own, None, EPS)
    asked = [True, False, False]
    given = (dy, x, x.shape[1:], mean, rstd, own, None, asked)
    dx = torch.ops.aten.native_layer_norm_backward(*given)[0]
    return dx if residual is None else dx + residual.to(to)


def statistics(x):
    x = x.double()
    mean = x.mean(1)
    return mean.float(), ((x - mean[:, None]).square().mean(1) + EPS).rsqrt().float()


@DTYPE
@EACH
@WIDE
@pytest.mark.parametrize("around", [True, False])
def test_layer_norm(case, dtype, wide, around, monkeypatch):
    p = build(case, dtype, torch.float32)
    stream = torch.float32 if wide else dtype
    x = (3 * p.x + 1).to(stream)
    dy, dh = torch.randn(x.shape).to(dtype), hidden(p, dtype)
    weight = torch.randn(case.k) if around else None
    residual = torch.randn(case.m, case.k + 3).to(stream)[:, 3:] if around else None
    with fenced(monkeypatch):
        out = torch.empty_like(x) if wide else None
        given = (dy, x, weight, *statistics(x), dh, adapters(p), residual, out)
        dx = lora_expand.layer_norm_expand(*given, TILES[adapters(p).rank])
    assert dx.dtype is stream and (out is None or dx is out)
    plain = input_grad(lowered(p, dtype), x, dy, dh, weight, residual, dtype)
    truth = input_grad(p.double(), x, dy, dh, weight, residual, torch.float64)
    verdict = judge("dx", dx, [plain], truth, dtype)
    assert verdict.passed, str(verdict)


def sum_of(p, z, h, residual, factor, to: torch.dtype):
    """y in ``to``, by torch; p in that dtype as well."""
    z = z.to(to).clone()
    for g, columns, ranks in adapters(p).ranks():
        z[:, columns] += p.scales[g] * h.to(to)[:, ranks] @ p.b[g].T
    return residual.to(to) + (z if factor is None else factor.to(to) * z)


@DTYPE
@EACH
@WIDE
@pytest.mark.parametrize("scaled", [True, False])
def test_residual(case, dtype, wide, scaled, monkeypatch):
    p = build(case, dtype, torch.float32)
    z, h = p.dy, hidden(p, dtype)
    residual = torch.randn(case.m, case.n + 3)[:, 3:].to(torch.float32 if wide else dtype)
    factor = torch.randn(case.n) if scaled else None
    tile = TILES[adapters(p).rank]
    with fenced(monkeypatch):
        y = lora_expand.residual_expand(z, h, adapters(p), residual, factor, tile=tile)
    assert y.dtype is residual.dtype
    plain = sum_of(lowered(p, dtype), z, h, residual, factor, dtype)
    truth = sum_of(p.double(), z, h, residual, factor, torch.float64)
    verdict = judge("y", y, [plain], truth, dtype)
    assert verdict.passed, str(verdict)
    if not wide:
        over = z.clone()
        same = lora_expand.residual_expand(over, h, adapters(p), residual, factor, over, tile)
        assert same is over and torch.equal(same, y)


@DTYPE
def test_packed_adapters_give_the_same_bits(dtype):
    p = build(FEW[3], dtype, torch.float32)
    low, dh, h = border.packed(adapters(p), dtype), hidden(p, dtype), hidden(p, dtype)
    assert isinstance(low, border.Packed)
    norm = (p.x, p.x + 1, None, *statistics(p.x + 1), dh)
    runs = [
        (
            lora_expand.layer_norm_expand(*norm, each, tile=THIN_TILE),
            lora_expand.residual_expand(p.dy, h, each, p.dy, tile=THIN_TILE),
        )
        for each in (adapters(p), low)
    ]
    assert all(map(torch.equal, *runs))


def test_the_same_bits_whatever_the_rows():
    """A row is summed in one order, alone or among others."""
    p = build(FEW[1], torch.bfloat16, torch.float32)
    dh, mean, rstd = hidden(p, p.x.dtype), *statistics(p.x)
    runs = [
        lora_expand.layer_norm_expand(
            p.x[r], p.x[r], None, mean[r], rstd[r], dh[r], adapters(p), tile=THIN_TILE
        )
        for r in (slice(None), slice(None), slice(5, 9))
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0][5:9], runs[2])


def test_no_sum_of_large_numbers_is_lost():
    """x far from zero: x^ is formed before it is summed."""
    case = Case("wide", 5, 300, 8, FEW[1].spans)
    p = build(replace(case, n=93), torch.bfloat16, torch.float32)
    x, dh = torch.randn(5, 300) + 1000, hidden(p, torch.bfloat16)
    out = torch.empty_like(x)
    given = (p.x, x, None, *statistics(x), dh, adapters(p))
    lora_expand.layer_norm_expand(*given, None, out, THIN_TILE)
    truth = input_grad(p.double(), x, p.x, dh, None, None, torch.float64)
    assert (out - truth).abs().max() <= 2e-2 * truth.abs().max()


def test_programs_give_the_same_bits_and_count_what_is_moved(serving):  # noqa: F811
    """z, which y is written over, is read and written."""
    p = build(FEW[3], torch.bfloat16, torch.float32)
    group, mean, rstd = adapters(p), *statistics(p.x)
    groups, h = len(group.spans), hidden(p, p.x.dtype).contiguous()
    weight = torch.randn(p.x.shape[1])

    def ahead(x, dy, h, weight, mean, rstd, *ab):
        low = LowRank(h, group._replace(a=ab[:groups], b=ab[groups:]))
        dx = elementwise.layer_norm_expand(x, x, weight, mean, rstd, low, x)
        return (dx, elementwise.residual_expand(dy.exp(), low, dy)), ((), None)

    tensors = p.x, p.dy, h, weight, mean, rstd, *group.a, *group.b
    program = build_program(Op(ahead), [InputSpec.of(t, False) for t in tensors])
    found = program.forward(*tensors)
    assert all(map(torch.equal, found, ahead(*tensors)[0]))
    moved = {name_of(call): work(call).nbytes for call in program.calls if not call.view}
    thin = [sum(t.nbytes for t in half) + h.nbytes for half in (group.a, group.b)]
    norm = weight.nbytes + mean.nbytes + rstd.nbytes
    assert moved["norm_expand"] == 2 * p.x.nbytes + thin[0] + norm
    assert moved["residual_expand"] == 3 * p.dy.nbytes + thin[1]


def test_why_not(serving):  # noqa: F811
    p = build(FEW[1], torch.bfloat16, torch.float32)
    z, none = p.dy, None
    for kernel in ("expand_norm", "expand_residual"):
        ask = lambda *others, z=z, dtype=z.dtype, rank=5, k=kernel: elementwise.why_not_expand(  # noqa: E731
            k, z, dtype, rank, *others
        )
        assert ask(z.float(), none, z[0].float()) is None
        for said, found in {
            "16-bit operands, not of torch.float32": ask(dtype=torch.float32),
            "64 ranks in all, and they sum to 65": ask(rank=65),
            "and they sum to 0": ask(rank=0),
            "got torch.float64": ask(none, z.double()),
            "(1, 197)": ask(z=z.t().contiguous().t()),
            "got torch.bfloat16 (93,)": ask(z[:, 0]),
            "nothing to launch": ask(z=z[:0]),
        }.items():
            assert said in found


@pytest.mark.parametrize("change, said", [("rank", "65"), ("dtype", "float32")])
def test_what_it_cannot_hold_is_named(change, said):
    p = build(FEW[0], torch.bfloat16, torch.float32)
    group, h = adapters(p), hidden(p, torch.bfloat16)
    if change == "rank":
        a, b = torch.randn(65, p.x.shape[1]), torch.randn(p.dy.shape[1], 65)
        group = Adapters([a], [b], [1.0], [replace(p.spans[0], rank=65)])
        h = h.new_zeros(h.shape[0], 65)
    else:
        h = h.float()
    with pytest.raises(AssertionError, match=said):
        lora_expand.residual_expand(p.dy, h, group, p.dy)
