"""Steps ready to be timed: compared with float64 first, as everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fused_lora.bench.methods
import fused_lora.bench.suites  # noqa: F401  both register what can be timed
from fused_lora.bench import correctness_gate
from fused_lora.bench.clock import CpuClock, Step
from fused_lora.bench.correctness_gate import Gate
from fused_lora.bench.registry import METHODS, SUITES
from fused_lora.bench.runner import Phases, enter
from fused_lora.bench.shapes import ModelShape


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device`` and ``--dtype`` of everything timed."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help="cpu or cuda")
    parser.addoption("--dtype", default="fp32", choices=["fp32", "bf16", "amp"])


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Callable[[str, ModelShape, int, int, str], Step]:
    """Makes the step of a method; skips it where it cannot run, fails it where it is wrong."""
    device, dtype = (request.config.getoption(name) for name in ("--device", "--dtype"))

    def make(suite: str, shape: ModelShape, batch: int, rank: int, name: str) -> Step:
        method = METHODS[name]
        if reason := method.why_not(dtype):
            pytest.skip(reason)
        workload = SUITES[suite](shape, batch, dtype, device)
        method_run = enter(method, workload, Gate(workload, rank), Phases(CpuClock()))
        if wrong := correctness_gate.complaints(method_run.errors, method_run.yardstick, dtype):
            pytest.fail("; ".join(wrong))
        return _finished(method_run.step) if device.startswith("cuda") else method_run.step

    return make


def _finished(step: Step) -> Step:
    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run
