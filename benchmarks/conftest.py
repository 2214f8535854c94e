"""Steps ready to be timed: judged against float64 first, as everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fused_lora.bench.contenders
import fused_lora.bench.suites  # noqa: F401  both register what can be raced
from fused_lora.bench import gate
from fused_lora.bench.clock import CpuClock, Step
from fused_lora.bench.judge import Judge
from fused_lora.bench.phases import Phases
from fused_lora.bench.race import enter
from fused_lora.bench.registry import CONTENDERS, SUITES
from fused_lora.bench.shapes import Shape


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device`` and ``--dtype`` of everything timed."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help="cpu or cuda")
    parser.addoption("--dtype", default="fp32", choices=["fp32", "bf16", "amp"])


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Callable[[str, Shape, int, int, str], Step]:
    """Makes the step of a contender; skips it where it cannot run, fails it where it is wrong."""
    device, dtype = (request.config.getoption(name) for name in ("--device", "--dtype"))

    def make(suite: str, shape: Shape, batch: int, rank: int, name: str) -> Step:
        contender = CONTENDERS[name]
        if reason := contender.why_not(dtype):
            pytest.skip(reason)
        workload = SUITES[suite](shape, batch, dtype, device)
        entrant = enter(contender, workload, Judge(workload, rank), Phases(CpuClock()))
        if wrong := gate.complaints(entrant.errors, entrant.yardstick, dtype):
            pytest.fail("; ".join(wrong))
        return _finished(entrant.step) if device.startswith("cuda") else entrant.step

    return make


def _finished(step: Step) -> Step:
    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run
