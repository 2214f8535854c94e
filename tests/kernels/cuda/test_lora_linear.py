"""lora_linear on sm_90: the kernel's own source over an emulated block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_linear as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.chip import Chip

from .linear_cases import CASES, Case, Problem

IDS = [case.why for case in CASES]
WORLDS = [(False, True), (True, False)]  # threads backwards, copies and products late


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
    """To the bit: fp32 sums of few-bit numbers are exact, and so is one rounding."""
    assert torch.equal(ours, truth.float().to(ours.dtype)), (ours.double() - truth).abs().max()


@pytest.mark.parametrize("tile", cuda.TILES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward(on_host: ModuleType, case: Case, tile: cuda.Tile) -> None:
    p, chip = Problem(case), Chip(90, case.processors)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        out = p.out(case.n)
        found = cuda.forward(p.x, p.w, p.bias, p.adapters, h=p.h, tile=tile, out=out, chip=chip)
        assert found.y is out and found.u is None
        equal(out, p.u())


@pytest.mark.parametrize("tile", cuda.TILES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_input_grad(on_host: ModuleType, case: Case, tile: cuda.Tile) -> None:
    p, chip = Problem(case), Chip(90, case.processors)
    for backwards, late in WORLDS:
        world(on_host, backwards, late)
        dx, _ = cuda.input_grad(p.dy, p.w, p.adapters, dh=p.dh, tile=tile, chip=chip)
        equal(dx, p.dx())
