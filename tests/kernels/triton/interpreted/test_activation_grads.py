"""GELU's derivative that adds dh a and forms gradients: the yardstick, bits, slices, faults."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_grad, lora_grad_rank
from fused_lora.kernels.triton.border import packed
from fused_lora.kernels.triton.launches import Launch
from fused_lora.kernels.triton.tiles import (
    MOST_GRAD_RANKS,
    DerivativeTile,
    gelu_grads_candidates,
)
from fused_lora.programs.describe import work
from fused_lora.programs.program import InputSpec, build
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Span
from fused_lora.verify import kernel_registry
from fused_lora.verify.kernel_registry import of_launch
from tests.kernels.triton.guards import fenced
from tests.programs.test_record import Op

LOW = (torch.bfloat16, torch.float16)
KINDS = {"erf": "none", "tanh": "tanh"}
SMALL = DerivativeTile(32, 64, 4, 2, 4)  # of four blocks and more
SHIPPED = [tile for arch in (80, 90) for tile in gelu_grads_candidates(256, arch)]


@dataclass(frozen=True)
class Given:
    """The operands; of fc2 ``own``, of fc1 ``before``."""

    dg: Tensor  # [M, K]
    own: Adapters
    dh: Tensor
    u: Tensor  # [M, K]
    h: Tensor
    before: Adapters

    def to(self, dtype: torch.dtype) -> Given:
        """The same numbers, adapters included."""
        tensors = {name: getattr(self, name).to(dtype) for name in ("dg", "dh", "u", "h")}
        return Given(**tensors, own=self.own.to(dtype), before=self.before.to(dtype))


@dataclass(frozen=True)
class Case:
    """Sizes, and why they are here."""

    why: str
    m: int
    k: int
    ranks: tuple[int, ...]  # of fc2
    ranks_before: tuple[int, ...]
    inside: int = 0  # elements of a row beyond its own


CASES = [
    Case("one whole tile", 32, 128, (16,), (16,)),
    Case("rows of one image, rows of longer ones", 197, 256, (5,), (3,), inside=8),
    Case("several adapters, the most ranks", 70, 256, (12, 20), (4, 16, 12)),
    Case("one row", 1, 128, (1,), (32,), inside=3),
    Case("no rows", 0, 128, (4,), (4,)),
]
IDS = [case.why for case in CASES]


def operands(case: Case, dtype: torch.dtype, adapters: torch.dtype = torch.float32) -> Given:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        whole = torch.randn(*shape[:-1], shape[-1] + case.inside)
        return whole.to(dtype)[:, : shape[-1]]

    def group(ranks: tuple[int, ...], a_columns: int, b_columns: int) -> Adapters:
        edges = [b_columns * g // (len(ranks) + 1) for g in range(len(ranks))] + [b_columns]
        spans = [Span(*edges[g : g + 2], rank) for g, rank in enumerate(ranks)]
        a = [(torch.randn(s.rank, a_columns) / a_columns**0.5).to(adapters) for s in spans]
        b = [(torch.randn(s.width, s.rank) / s.rank**0.5).to(adapters) for s in spans]
        return Adapters(a, b, [(0.5, 2.0, 1.0)[g % 3] for g in range(len(ranks))], spans)

    own, before = group(case.ranks, case.k, 48), group(case.ranks_before, 40, case.k)
    m, k = case.m, case.k
    dh, h = draw(m, own.rank), draw(m, before.rank)
    return Given(draw(m, k), own, dh, 2 * draw(m, k), h, before)


def equation(p: Given, kind: str) -> dict[str, Tensor]:
    dx = p.dg + p.dh @ torch.cat(tuple(p.own.a))
    du = torch.ops.aten.gelu_backward(dx, p.u, approximate=KINDS[kind])
    _, b, scales, spans = p.before
    each = zip(b, scales, spans, strict=True)
    return {
        "du": du,
        "da": p.dh.T @ F.gelu(p.u, approximate=KINDS[kind]),
        "db before, unscaled": p.h.T @ du,
        "dh before": torch.cat([s * du[:, c.start : c.stop] @ b_g for b_g, s, c in each], 1),
    }


def kernels(p: Given, kind: str, tile: DerivativeTile | None = SMALL) -> dict[str, Tensor]:
    made = lora_grad.activation_grad_and_slices(*given(p, kind), tile)
    dtype, ranks = p.dg.dtype, (p.own.rank, p.before.rank)
    da, db = (t.sum(0)[:, :r].T.to(dtype) for t, r in zip((made.a, made.b), ranks, strict=True))
    dh = lora_grad.add_blocks(made.hidden, p.before, dtype)
    return {"du": made.du, "da": da, "db before, unscaled": db, "dh before": dh}


def given(p: Given, kind: str) -> tuple:
    return p.dg, p.own, p.dh, kind, p.u, p.h, p.before


def check(p: Given, kind: str, tile: DerivativeTile | None = SMALL) -> None:
    """By the yardstick rule, beside plain torch in the same dtype."""
    ours, dtype = kernels(p, kind, tile), p.dg.dtype
    assert all(t.isfinite().all() for t in ours.values())
    plain = in_every_order(lambda: equation(p.to(dtype), kind))
    verdict = judge_all(ours, plain, equation(p.to(torch.float64), kind), dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parity(case, dtype, kind, monkeypatch):
    with fenced(monkeypatch):
        check(operands(case, dtype), kind)


@pytest.mark.parametrize("case", CASES[:3], ids=IDS[:3])
def test_adapters_are_read_as_they_lie(case):
    """Rounded as they are read: in fp32, in 16 bits and packed they are the same to the bit."""
    p = operands(case, torch.bfloat16)
    halves = p.own.to(torch.bfloat16), p.before.to(torch.bfloat16)
    both = [packed(half, torch.bfloat16) for half in (p.own, p.before)]
    once = kernels(p, "erf")
    for own, before in (halves, both):
        again = kernels(replace(p, own=own, before=before), "erf")
        assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("tile", [replace(SMALL, shares=1), *SHIPPED], ids=str)
def test_tiles_that_ship(tile):
    check(operands(replace(CASES[2], k=512), torch.bfloat16), "erf", tile)


def test_slices_add_up_whatever_their_number(monkeypatch):
    """du and dh are the same bits; what no rank owns is zero."""
    p, found = operands(CASES[1], torch.bfloat16), []
    for processors in (1, 3, 64):
        monkeypatch.setattr(lora_grad_rank, "multiprocessors", lambda device, n=processors: n)
        made = lora_grad.activation_grad_and_slices(*given(p, "erf"), SMALL)
        assert made.a.shape[1:] == (256, 16) and not made.a[:, :, 5:].any()
        assert made.hidden.shape == (4, 197, 16) and not made.hidden[:, :, 3:].any()
        found.append((made.du, made.hidden, made.a.sum(0), made.b.sum(0)))
    assert len({t.shape[0] for t in (made.a, made.b)}) == 1
    for other in found[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(found[0][:2], other, strict=False))
        for mine, its in zip(found[0][2:], other[2:], strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)


def test_more_blocks_than_are_read_at_once():
    """In order, so that no number of programs changes a bit."""
    before = operands(CASES[2], torch.bfloat16).before
    hidden = torch.randn(lora_grad.HIDDEN_PARTS + 3, 37, 32)
    scales = torch.cat([torch.full((s.rank,), x) for x, s in zip(*before[2:], strict=True)])
    for dtype in LOW:
        truth = hidden.double().sum(0) * scales
        found = lora_grad.add_blocks(hidden, before, dtype)
        verdict = judge_all({"dh": found}, [{"dh": truth.to(dtype)}], {"dh": truth}, dtype)
        assert found.dtype is dtype and verdict.passed, str(verdict)


def test_what_it_cannot_take_is_refused():
    def refused(match: str, case: Case, **how: object) -> None:
        p = operands(case, torch.bfloat16)
        with pytest.raises(AssertionError, match=match):
            lora_grad.activation_grad_and_slices(*given(replace(p, **how), "erf"))

    refused("96", replace(CASES[0], k=96))
    refused(str(MOST_GRAD_RANKS + 1), replace(CASES[0], ranks=(MOST_GRAD_RANKS + 1,)))
    refused("float32", CASES[0], u=torch.zeros(32, 128))
    refused("32, 15", CASES[0], h=torch.zeros(32, 15, dtype=torch.bfloat16))


def test_bytes_of_its_calls_in_a_program():
    """Every operand once: dg and u read, du written, and what slices and blocks leave."""
    p = operands(CASES[1], torch.bfloat16)
    own, before = p.own, p.before
    tensors = (p.dg, p.dh, p.u, p.h, own.a[0], own.b[0], before.a[0], before.b[0])

    def ahead(dg, dh, u, h, a, b, a_before, b_before):
        one = own._replace(a=[a], b=[b])
        other = before._replace(a=[a_before], b=[b_before])
        how = (dg, one, dh, "erf", u, h, other, SMALL)
        du, *sums, hidden = lora_grad.activation_grad_and_slices(*how)
        return (du, *sums, lora_grad.add_blocks(hidden, other, dg.dtype)), ((), None)

    program = build(Op(ahead), [InputSpec.of(t, False) for t in tensors])
    found = {
        call.target.__name__: (work(call).nbytes, call)
        for call in program.calls
        if work(call).nbytes
    }
    (m, k), slices = p.dg.shape, lora_grad_rank.slices_of(197, 256, SMALL, p.dg.device)
    thin, border, sums = 2 * m * (5 + 3), 4 * k * (5 + 3), 4 * slices * k * (16 + 16)
    hidden = 4 * 4 * m * 16  # of four blocks
    assert found["activation_grads"][0] == 3 * 2 * m * k + thin + border + sums + hidden
    assert found["add_blocks"][0] == hidden + 4 * k * 3 + 2 * m * 3
    assert len(found) == 2


def without(half: str):
    """Adapters of which the first ``half`` is zero."""

    def zeroed(own: Adapters) -> Adapters:
        first, *others = getattr(own, half)
        return own._replace(**{half: [0 * first, *others]})

    return zeroed


FAULTS = {  # of which operand
    "a part of dh a": (1, without("a")),
    "u of the next row": (4, lambda u: u.roll(1, 0)),
    "h of the next row": (5, lambda h: h.roll(1, 0)),
    "a part of b": (6, without("b")),
}


@pytest.mark.parametrize("fault", [*FAULTS, "a block of dh", "a slice of da", "a scale"])
def test_a_fault_fails_the_check(fault, monkeypatch):
    right, add = lora_grad.activation_grad_and_slices, lora_grad.add_blocks

    def broken(*how):
        if fault in FAULTS:
            at, spoiled = FAULTS[fault]
            how = (*how[:at], spoiled(how[at]), *how[at + 1 :])
        made = right(*how)
        if fault == "a block of dh":
            made.hidden[-1] = 0
        if fault == "a slice of da":
            made.a[0] = 0
        return made

    def unscaled(hidden, before, dtype):
        return add(hidden, before._replace(scales=[1.0] * len(before.scales)), dtype)

    monkeypatch.setattr(lora_grad, "activation_grad_and_slices", broken)
    if fault == "a scale":
        monkeypatch.setattr(lora_grad, "add_blocks", unscaled)
    checked = of_launch(Launch("gelu_grads", SHIPPED[0]), "bfloat16")
    verdict = checked.check(torch.device("cpu"))
    assert not verdict.passed and verdict.compared, str(verdict)


def test_both_kinds_are_among_what_a_device_checks():
    cpu = torch.device("cpu")
    found = {launch.kernel for launch in kernel_registry.epilogues(torch.bfloat16, cpu)}
    assert {"gelu_grads", "gelu_grads_tanh"} <= found
    alone = {launch.kernel for launch in kernel_registry.epilogues(torch.float32, cpu)}
    assert not any(kernel.startswith("gelu_grads") for kernel in alone)
