"""What prepare compiles in other processes is what the step would: the same, to the hash."""

from __future__ import annotations

import pickle

import pytest
import torch
from triton.runtime.jit import JITFunction

import fused_lora
from fused_lora.kernels.triton import available, launch
from fused_lora.kernels.triton.launch import BoundLaunch, _formed
from fused_lora.ops import backends, planning
from fused_lora.plan import cost_kernels
from fused_lora.programs import run
from fused_lora.programs.record import Value
from fused_lora.verify import verdicts
from tests.kernels.triton.compiler import compiled
from tests.patching.models import build, images

ARCH = 90


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Of a block's halves with Triton's launches, on a CPU that passes for a GPU; none runs."""
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(available, "why_not", lambda device=None, dtype=None: None)
    monkeypatch.setattr(cost_kernels, "TRITON_EFFICIENCY", 1e6)
    monkeypatch.setattr(cost_kernels, "TRITON_LAUNCH_CALLS", 0.0)
    forget()
    model = build().bfloat16()
    fused_lora.patch(model, 4)
    with verdicts.collecting(), run.looking() as seen:
        model(images(model).bfloat16()).float().mean().backward()
    yield list(seen.values())
    forget()


def forget():
    run.forget()
    planning._plan_for.cache_clear()
    backends._triton.cache_clear()


def launched(program):
    """Each launch with operands of the sizes and places that a step would give."""
    for call in (*program.calls, *program.calls_back):
        if isinstance(call.target, BoundLaunch):
            yield call.target, [real(arg) for arg in call.args]


def real(arg):
    if isinstance(arg, Value):
        extent = sum((n - 1) * s for n, s in zip(arg.shape, arg.stride, strict=True)) + 1
        room = torch.empty(arg.offset + extent, dtype=arg.dtype)
        return room.as_strided(arg.shape, arg.stride, arg.offset)
    return tuple(real(each) for each in arg) if isinstance(arg, tuple) else arg


def test_the_same_kernels(programs, monkeypatch):
    hashes = []
    with compiled(ARCH):
        compile_only = JITFunction.run

        def seen(self, *args, **kwargs):
            kernel = compile_only(self, *args, **kwargs)
            hashes.append(kernel.hash)
            return kernel

        monkeypatch.setattr(JITFunction, "run", seen)
        wanted = [one for program in programs for one in launch.requests(program)]
        for one in wanted:
            launch.compile_one(*pickle.loads(pickle.dumps(one)))
        there, known = list(hashes), len(set(hashes))
        hashes.clear()
        for program in programs:
            for bound, args in launched(program):
                named = [_formed(f, arg) for f, arg in zip(bound.forms, args, strict=True)]
                bound.kernel[bound.grid](*named, **bound.constants)
        monkeypatch.undo()
    assert len(there) == len(wanted) > 8 and known > 4
    assert hashes == there
