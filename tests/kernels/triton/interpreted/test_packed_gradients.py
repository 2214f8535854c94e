"""dy packed of dq, dk and dv, with db and dh of it: the yardstick, bits, slices, faults."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_grad, lora_grad_rank
from fused_lora.kernels.triton.border import packed
from fused_lora.kernels.triton.launches import Launch, tile_of
from fused_lora.kernels.triton.tiles import (
    MOST_GRAD_RANKS,
    PACK_GRADS,
    ElementTile,
    pack_grads_candidates,
    packs_gradients,
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
CPU = torch.device("cpu")
SMALL = ElementTile(32, 64, 2, 4)


@dataclass(frozen=True)
class Given:
    """The operands."""

    parts: list[Tensor]  # of [M, N / P]
    h: Tensor
    before: Adapters

    def to(self, dtype: torch.dtype) -> Given:
        """The same numbers, adapters included."""
        parts = [part.to(dtype) for part in self.parts]
        return Given(parts, self.h.to(dtype), self.before.to(dtype))


@dataclass(frozen=True)
class Case:
    """Sizes, and why they are here."""

    why: str
    m: int
    width: int  # of a part
    spans: tuple[Span, ...]
    parts: int = 3
    inside: int = 0  # elements of a row beyond its own


def apart(width: int, *ranks: int) -> tuple[Span, ...]:
    return tuple(Span(g * width, g * width + width, rank) for g, rank in enumerate(ranks))


CASES = [
    Case("one whole tile of each", 32, 64, apart(64, 16, 16, 16)),
    Case("rows of one image, rows of longer ones", 197, 64, apart(64, 4, 4, 4), inside=8),
    Case("a joint adapter", 70, 128, (Span(0, 384, 32),)),
    Case("unequal ranks, the most among them, over several blocks", 70, 128, apart(128, 5, 32, 3)),
    Case("of q and v alone", 37, 128, (Span(0, 128, 7), Span(256, 384, 16)), inside=3),
    Case("across a border of parts", 37, 64, (Span(0, 128, 16), Span(128, 192, 4))),
    Case("of the last in front", 37, 64, (Span(128, 192, 3), Span(0, 64, 8))),
    Case("two parts", 40, 64, apart(64, 8, 16), parts=2),
    Case("one part", 40, 64, apart(64, 8), parts=1),
    Case("one row", 1, 64, apart(64, 1, 2, 1), inside=3),
    Case("no rows", 0, 64, apart(64, 4, 4, 4)),
]
IDS = [case.why for case in CASES]


def operands(case: Case, dtype: torch.dtype, adapters: torch.dtype = torch.float32) -> Given:
    torch.manual_seed(0)

    def draw(columns: int, inside: int) -> Tensor:
        return torch.randn(case.m, columns + inside).to(dtype)[:, :columns]

    spans = case.spans
    parts = [draw(case.width, case.inside * p) for p in range(case.parts)]  # rows of its own each
    a = [torch.randn(s.rank, 8).to(adapters) for s in spans]
    b = [(torch.randn(s.width, s.rank) / s.rank**0.5).to(adapters) for s in spans]
    own = Adapters(a, b, [(0.5, 2.0, 1.0)[g % 3] for g in range(len(spans))], spans)
    return Given(parts, draw(own.rank, case.inside), own)


def equation(p: Given) -> dict[str, Tensor]:
    dy, (_, b, scales, _) = torch.cat(p.parts, 1), p.before
    each = list(p.before.ranks())
    db = [dy[:, own].T @ p.h[:, ranks] for _, own, ranks in each]
    dh = [scales[g] * dy[:, own] @ b[g] for g, own, _ in each]
    return {"dy": dy, "dh": torch.cat(dh, 1)} | {f"db of {g}": t for g, t in enumerate(db)}


def kernels(p: Given, tile: ElementTile | None = SMALL) -> dict[str, Tensor]:
    made = lora_grad_rank.pack_and_slices(p.parts, p.h, p.before, tile)
    dtype, sums = p.h.dtype, made.b.sum(0)
    dh = lora_grad.add_blocks(made.hidden, p.before, dtype, columns=made.dy.shape[1])
    db = {f"db of {g}": sums[own, ranks].to(dtype) for g, own, ranks in ranks_of(p.before)}
    return {"dy": made.dy, "dh": dh} | db


def ranks_of(before) -> list[tuple[int, slice, slice]]:
    return list(Adapters([], [], before.scales, before.spans).ranks())


def check(p: Given, tile: ElementTile | None = SMALL) -> None:
    """dy to the bit; the rest by the yardstick rule, beside plain torch in the same dtype."""
    ours, dtype = kernels(p, tile), p.h.dtype
    assert torch.equal(ours["dy"], torch.cat(p.parts, 1))
    assert all(t.isfinite().all() for t in ours.values())
    plain = in_every_order(lambda: equation(p.to(dtype)))
    verdict = judge_all(ours, plain, equation(p.to(torch.float64)), dtype)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parity(case, dtype, monkeypatch):
    with fenced(monkeypatch):
        check(operands(case, dtype))


@pytest.mark.parametrize("case", CASES[1:5], ids=IDS[1:5])
def test_adapters_are_read_as_they_lie(case):
    """Rounded as they are read: in fp32, in 16 bits and packed they are the same to the bit."""
    p = operands(case, torch.bfloat16)
    once = kernels(p)
    for own in (p.before.to(torch.bfloat16), packed(p.before, torch.bfloat16)):
        again = kernels(replace(p, before=own))
        assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("tile", PACK_GRADS, ids=str)
def test_tiles_that_ship(tile):
    width = tile.block_n
    check(operands(Case("", 70, width, apart(width, 16, 4, 32)), torch.bfloat16), tile)


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
def test_widths_of_models(width):
    """The tile that a device is asked about is the one that runs, and divides every part."""
    assert packs_gradients(width, apart(width, 16, 16, 16))
    assert packs_gradients(width, [Span(0, 3 * width, 32)])
    asked = tile_of("pack_grads", 197, 3 * width, 48, torch.bfloat16, CPU)
    assert asked == pack_grads_candidates(width, 80)[0] and width % asked.block_n == 0
    check(operands(Case("", 5, width, apart(width, 4, 4, 4)), torch.bfloat16), None)


def test_slices_add_up_whatever_their_number(monkeypatch):
    """dy and dh are the same bits."""
    p, found = operands(CASES[1], torch.bfloat16), []
    for processors in (1, 6, 64):
        monkeypatch.setattr(lora_grad_rank, "multiprocessors", lambda device, n=processors: n)
        found.append((lora_grad_rank.pack_and_slices(p.parts, p.h, p.before, SMALL), kernels(p)))
    assert len({made.b.shape[0] for made, _ in found}) == 3
    for made, ours in found:
        assert made.b.shape[1:] == (192, 16) and made.hidden.shape == (3, 197, 16)
        for name, t in ours.items():
            if name in ("dy", "dh"):
                assert torch.equal(t, found[0][1][name])
            torch.testing.assert_close(t, found[0][1][name], rtol=1e-2, atol=1e-3)


def test_infinities_of_one_adapter_stay_its_own():
    """What lies in another's columns, and in nobody's memory, is not read."""
    p = operands(CASES[3], torch.bfloat16)
    p.parts[1][3, 5] = torch.inf
    ours = kernels(p)
    assert not ours["db of 1"].isfinite().all() and not ours["dh"][3].isfinite().all()
    for g in (0, 2):
        assert ours[f"db of {g}"].isfinite().all()
        assert ours["dh"][:, ranks_of(p.before)[g][2]].isfinite().all()


def test_more_blocks_than_are_read_at_once():
    """In order, each adapter's alone."""
    blocks = lora_grad.HIDDEN_PARTS + 3
    spans = (Span(0, 64 * blocks, 5), Span(64 * blocks, 64 * blocks + 128, 3))
    b = [torch.zeros(s.width, s.rank) for s in spans]
    before = Adapters([torch.zeros(s.rank, 8) for s in spans], b, [0.5, 2.0], spans)
    hidden = torch.randn(blocks + 2, 37, 16)
    wide = hidden.double()
    truth = torch.cat([wide[:blocks, :, :5].sum(0) / 2, wide[blocks:, :, :3].sum(0) * 2], 1)
    for dtype in LOW:
        found = lora_grad.add_blocks(hidden, before, dtype, columns=64 * (blocks + 2))
        verdict = judge_all({"dh": found}, [{"dh": truth.to(dtype)}], {"dh": truth}, dtype)
        assert found.dtype is dtype and verdict.passed, str(verdict)


def test_what_it_cannot_take_is_refused():
    assert not packs_gradients(96, apart(96, 4, 4, 4))
    assert not packs_gradients(128, apart(64, 4, 4))  # half a block each
    assert not packs_gradients(64, apart(64, MOST_GRAD_RANKS + 1))
    assert not packs_gradients(64, [Span(0, 128, 4), Span(64, 192, 4)])  # in each other's columns

    def refused(match: str, **how: object) -> None:
        p = replace(operands(CASES[0], torch.bfloat16), **how)
        with pytest.raises(AssertionError, match=match):
            lora_grad_rank.pack_and_slices(p.parts, p.h, p.before, SMALL)

    refused("96", parts=[torch.zeros(32, 96).bfloat16()] * 2)
    refused("32, 15", h=torch.zeros(32, 15).bfloat16())
    refused("float32", h=torch.zeros(32, 48))
    refused("float32", parts=[torch.zeros(32, 64)] * 3)
    refused("32, 32", parts=[torch.zeros(32, size).bfloat16() for size in (64, 32, 64)])
    refused("1, 32", parts=[torch.zeros(64, 32).bfloat16().t()] * 3)


def test_bytes_of_its_calls_in_a_program():
    """Every operand once: the parts read, dy written, and what slices and blocks leave."""
    p = operands(replace(CASES[1], inside=0), torch.bfloat16)
    before = p.before

    def ahead(q, k, v, h, *b):
        own = before._replace(b=list(b))
        dy, sums, hidden = lora_grad_rank.pack_and_slices((q, k, v), h, own, SMALL)
        dh = lora_grad.add_blocks(hidden, own, dy.dtype, columns=dy.shape[1])
        return (dy, sums, dh), ((), None)

    program = build(Op(ahead), [InputSpec.of(t, False) for t in (*p.parts, p.h, *before.b)])
    found = {call.target.__name__: work(call).nbytes for call in program.calls if work(call).nbytes}
    m, n, slices = (
        197,
        192,
        lora_grad_rank.slices_of(197, 192, SMALL, CPU, lora_grad_rank.PACK_BESIDE),
    )
    border, hidden = 4 * n * 4, 4 * 3 * m * 16
    sums = 4 * slices * n * 16
    assert found == {
        "pack_grads": 2 * 2 * m * n + 2 * m * 12 + border + sums + hidden,
        "add_blocks": hidden + border + 2 * m * 12,
    }


def zeroed(own: Adapters) -> Adapters:
    """Adapters of which the first b is zero."""
    first, *others = own.b
    return own._replace(b=[0 * first, *others])


FAULTS = {  # of which operand
    "a part of dy": (0, lambda parts: (*parts[:2], 0 * parts[2])),
    "dk and dv exchanged": (0, lambda parts: (parts[0], parts[2], parts[1])),
    "h of the next row": (1, lambda h: h.roll(1, 0)),
    "a part of b": (2, zeroed),
}


@pytest.mark.parametrize("fault", [*FAULTS, "an element", "a block of dh", "a slice", "a scale"])
def test_a_fault_fails_the_check(fault, monkeypatch):
    right, add = lora_grad_rank.pack_and_slices, lora_grad.add_blocks

    def broken(*how):
        if fault in FAULTS:
            at, spoiled = FAULTS[fault]
            how = (*how[:at], spoiled(how[at]), *how[at + 1 :])
        made = right(*how)
        if fault == "an element":
            made.dy[-1, -1] += 1
        if fault == "a block of dh":
            made.hidden[-1] = 0
        if fault == "a slice":
            made.b[0] = 0
        return made

    def unscaled(hidden, before, dtype, columns):
        ones = before._replace(scales=[1.0] * len(before.scales))
        return add(hidden, ones, dtype, columns=columns)

    monkeypatch.setattr(lora_grad_rank, "pack_and_slices", broken)
    if fault == "a scale":
        monkeypatch.setattr(lora_grad, "add_blocks", unscaled)
    verdict = of_launch(Launch("pack_grads", PACK_GRADS[-1]), "bfloat16").check(CPU)
    assert not verdict.passed and verdict.compared, str(verdict)


def test_every_tile_is_among_what_a_device_checks():
    found = kernel_registry.epilogues(torch.bfloat16, CPU)
    own = pack_grads_candidates(256, 80)
    assert {Launch("pack_grads", tile) for tile in own} <= set(found) and len(own) == 3
    alone = kernel_registry.epilogues(torch.float32, CPU)
    assert "pack_grads" not in {launch.kernel for launch in alone}
