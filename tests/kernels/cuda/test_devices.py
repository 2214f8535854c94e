"""Devices: a launch goes to that of its tensors, and the current one is what it was afterwards."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_lora.kernels.cuda import lora_extended, lora_grad, lora_merge, native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters
from fused_lora.types import Needs, Span

from .conftest import CSRC

GUARD = r"""
#include <cstdio>
#include <stdexcept>

#include "common/device_guard.h"

char contexts[3];
void* current = nullptr;

struct Driver {
  static void* context() { return current; }
  static void set_context(void* context) { current = context; }
  static int set_device(int device) {
    if (device < 0) return 101;
    current = contexts + device;
    return 0;
  }
};

int on(int device, bool fails) {
  const fused_lora::ContextGuard<Driver> guard(device);
  if (const int error = guard.error()) return error;
  if (current != contexts + device) return 1;
  if (fails) throw std::runtime_error("a launch");
  return 0;
}

int main() {
  if (on(1, false) || current) return 2;  // no device was current, and none is
  current = contexts;
  if (on(1, false) || current != contexts) return 3;
  if (on(0, false) || current != contexts) return 4;
  if (on(-1, false) != 101 || current != contexts) return 5;
  try {
    on(2, true);
    return 6;
  } catch (const std::runtime_error&) {
  }
  return current == contexts ? 0 : 7;
}
"""


def test_the_current_device_is_put_back(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "guard.cpp", tmp_path / "guard"
    source.write_text(GUARD)
    command = [compiler, "-std=c++17", "-Wall", "-Werror", f"-I{CSRC}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    assert subprocess.run([str(program)]).returncode == 0


def test_every_launcher_has_the_guard() -> None:
    """No other place chooses a device, and no function that is given one is outside of it."""
    launchers = [path for path in CSRC.glob("*/*.cu") if "launch_" in path.read_text()]
    assert len(launchers) == 4
    for path in launchers:
        text = path.read_text()
        given = len(re.findall(r"\bint device\b", text))
        assert text.count("const DeviceGuard guard(device);") == given > 0, path
    chosen = [p for p in CSRC.rglob("*") if p.is_file() and "cudaSetDevice(" in p.read_text()]
    assert [path.name for path in chosen] == ["device_guard.cu"]


@contextmanager
def two_gpus(monkeypatch: pytest.MonkeyPatch, host):
    """Tensors on cuda:1 without data, cuda:0 current, and a module that writes calls down."""
    calls = []

    def named(device: int, stream: int) -> dict[str, int]:
        return {"device": device, "stream": stream}

    class Module(SimpleNamespace):
        def __getattr__(self, name):
            return getattr(host, name)

        def BoundLinear(self, **layout):
            return lambda at, *queue: calls.append(named(*queue))

        def BoundGrad(self, **layout):
            return lambda at, *queue: calls.append(named(*queue))

        def BoundSums(self, pieces):
            return lambda at, *queue: calls.append(named(*queue))

        def lora_merge(self, **call):
            calls.append(call)

    entered = []

    @contextmanager
    def device(which):
        entered.append(which)
        yield

    # A stream of each device, that of cuda:1 twice as far on.
    stream = lambda index: 1000 * (1 + index)  # noqa: E731
    monkeypatch.setattr(native, "load", lambda: Module())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 132)))
    monkeypatch.setattr("fused_lora.kernels.cuda.lora_extended.begins_at", lambda t: 0)
    monkeypatch.setattr("fused_lora.kernels.cuda.lora_grad_shape.begins_at", lambda t: 0)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: 4096)
    with FakeTensorMode():
        yield calls


def operands():
    m, k, n, rank = 64, 128, 128, 16
    how = dict(device="cuda:1", dtype=torch.bfloat16)
    x, w, dy = (torch.empty(*shape, **how) for shape in ((m, k), (n, k), (m, n)))
    a, b = torch.empty(rank, k, **how), torch.empty(n, rank, **how)
    return x, w, dy, Adapters([a], [b], [1.0], (Span(0, n, rank),))


def test_launches_go_to_the_device_and_stream_of_their_tensors(monkeypatch, host) -> None:
    with two_gpus(monkeypatch, host) as calls:
        x, w, dy, adapters = operands()
        y = lora_extended.forward(x, w, None, adapters).y
        dx, _ = lora_extended.input_grad(dy, w, adapters)
        grads = lora_grad.lora_grads(x, dy, adapters, Needs())
        table = lora_merge.CompiledMergeTable(
            (), torch.empty(64, dtype=torch.uint8, device="cuda:1"), 1, None
        )
        lora_merge.launch(table)
        made = (y, dx, *grads.a, *grads.b)
        assert {t.device for t in made if t is not None} == {torch.device("cuda:1")}
    assert len(calls) == 5
    assert {(call["device"], call["stream"]) for call in calls} == {(1, 2000)}
