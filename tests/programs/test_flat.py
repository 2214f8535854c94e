"""After the first step nobody is asked: no plan, no verdict, no reason, no environment."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from fused_lora import env
from fused_lora.nn import block, block_modules, stand_in
from fused_lora.ops import backends, elementwise, epilogues, measured, planning
from fused_lora.ops import lora_linear as op
from fused_lora.plan import choose, strategies, timing
from fused_lora.programs import run
from fused_lora.programs.describe import name_of
from fused_lora.verify import check, own_process, verdicts
from tests.patching.models import build, images
from tests.programs.test_signature import patched

DECIDERS = (choose, strategies, planning, backends, epilogues, elementwise)
DECIDERS += (verdicts, check, env, own_process, measured, timing)


def forbid(monkeypatch):
    """Every function that decides raises; those that other modules took by name too."""

    def asked(*args, **kwargs):
        raise AssertionError("somebody decided again")

    forbidden = []
    for module in DECIDERS:
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                forbidden.append(function)
    for module in (block, block_modules, stand_in, op, run):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("why_") or name in (
                "find",
                "call_plan",
                "compute",
                "attention_spec",
                "mlp_spec",
            ):
                forbidden.append(function)
    for name, module in list(sys.modules.items()):
        if name.startswith("fused_lora"):
            for key, value in list(vars(module).items()):
                if any(value is function for function in forbidden):
                    monkeypatch.setattr(module, key, asked)
    return forbidden


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("level", ["linear", "block"])
@pytest.mark.parametrize("recompute", ["elementwise", "gemm"])
def test_ten_steps_on(level, recompute, amp, monkeypatch):
    options = {} if level == "linear" else {"recompute": recompute}
    model, x = patched(level, dtype=torch.float32, **options), images(build())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(), step()]
    assert len(forbid(monkeypatch)) > 50
    losses += [step() for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("level, most", [("linear", 3), ("block", 6)])
def test_a_warm_call_runs_through_few_files(level, most):
    """One linear, and the MLP half of a block, forward and backward: files of the package."""
    model = patched(level, dtype=torch.float32)
    owner = model.blocks[0].mlp.fc1 if level == "linear" else model.blocks[0]
    x, files = torch.randn(2, 5, 48, requires_grad=True), set()

    def half():
        y = owner(x) if level == "linear" else owner.__dict__["_halves"][1](owner, x)
        y.backward(y)

    def seen(frame, event, argument):
        if event == "call" and "fused_lora" in frame.f_code.co_filename:
            files.add(frame.f_code.co_filename.rpartition("/")[2])

    owner(x)
    half()
    sys.setprofile(seen)
    try:
        half()
    finally:
        sys.setprofile(None)
    files.discard("<fused_lora program>")
    assert len(files) <= most, files


ON_THE_HOST = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}


@pytest.mark.parametrize("recompute", ["none", "elementwise", "gemm"])
def test_programs_only_compute_and_allocate(recompute):
    """So that a step can be captured: nothing is read on the host, copied there or waited for."""
    run.forget()
    model = patched(dtype=torch.float32, recompute=recompute)
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(images(model)).float().sum().backward()
    calls = [call for p in run.programs() for call in (*p.calls, *p.calls_back)]
    assert len(calls) > 100
    assert not {name_of(call) for call in calls} & ON_THE_HOST
    devices = {each for call in calls for each in call.kwargs.values()}
    assert not {d for d in devices if isinstance(d, torch.device)}
