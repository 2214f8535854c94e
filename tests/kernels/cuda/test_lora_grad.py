"""lora_grads: the kernels' own source over an emulated block, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_grad as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.chip import Chip
from fused_lora.kernels.interface import Grads
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import error, judge
from fused_lora.types import Needs

from .grad_cases import CASES, Case, Problem

IDS = [case.why for case in CASES]
ALL = Needs(x=False, bias=True)
BUDGET = 1e-6


@pytest.fixture
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The launcher uses the module whose kernels run on the CPU."""
    monkeypatch.setattr(native, "load", lambda: host)
    yield host
    world(host, False, False)


def world(host: ModuleType, backwards: bool, late: bool) -> None:
    """In which order emulated threads take turns, and when their copies land."""
    ctypes.CDLL(host.__file__).host_world(backwards, late)


def run(p: Problem, needs: Needs, processors: int = 2, **options: object) -> Grads:
    chip = Chip(p.case.arch, processors)
    return cuda.lora_grads(p.x, p.dy, p.adapters, needs, **p.given, **options, chip=chip)


def flat(grads: Grads) -> dict[str, Tensor]:
    """Each kind of gradient as one vector."""
    named = {"a": grads.a, "b": grads.b, "bias": [grads.bias]}
    there = {name: [t.flatten() for t in ts if t is not None] for name, ts in named.items()}
    return {name: torch.cat(ts) for name, ts in there.items() if ts}


def check(ours: Grads, truth: Grads, budget: float = BUDGET) -> None:
    got, wanted = flat(ours), flat(truth)
    assert got.keys() == wanted.keys()
    for name in got:
        assert error(got[name], wanted[name]) <= budget, name


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_emulated_kernel_equals_float64(on_host: ModuleType, case: Case) -> None:
    for backwards, late in [(False, True), (True, False)]:
        world(on_host, backwards, late)
        problem, needs = Problem(case), Needs(x=False)
        check(run(problem, needs), problem.expected(needs))
