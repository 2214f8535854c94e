"""Whether the compiled module can serve, and the sentence when it cannot."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fused_lora.kernels.cuda import native


def blocked(error: ImportError) -> object:
    def load() -> None:
        raise error

    return load


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_LORA_DISABLE_NATIVE", "1")
    assert native.why_not() == "FUSED_LORA_DISABLE_NATIVE is set"


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", blocked(ModuleNotFoundError("no")))
    assert "not built" in native.why_not()


def test_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", blocked(ImportError("libstdc++ is too old")))
    assert native.why_not() == "the compiled module does not load: libstdc++ is too old"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(archs="80-real,90a-real"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.why_not() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert native.why_not() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert native.why_not() == "the compiled module has code for 80-real, 90a-real, none for 12.0"


@pytest.mark.parametrize(
    "entries, capability, served",
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 9), True),
        (["86-real"], (8, 0), False),
        (["80-real"], (9, 0), False),
        (["80-virtual"], (12, 1), True),
        (["90a-real"], (9, 0), True),
        (["100a-real"], (10, 3), False),
        (["100f-real"], (10, 3), True),
        (["90a-virtual"], (10, 0), False),
        (["80-real", "120-real"], (12, 1), True),
        ([], (8, 0), False),
    ],
)
def test_covers(entries: list[str], capability: tuple[int, int], served: bool) -> None:
    assert native.covers(entries, capability) is served


def test_the_installed_module_loads_and_starts_no_device() -> None:
    if reason := native.why_not_here():
        pytest.skip(reason)
    code = "import torch; from fused_lora import _native; print(torch.cuda.is_initialized())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert native.archs()


def test_the_installed_module_says_what_cuda_says() -> None:
    if reason := native.why_not_here():
        pytest.skip(reason)
    module = native.load()
    types = module.MergeTypes(
        w=module.DType.float32, out=module.DType.float32, adapter=module.DType.float32
    )
    with pytest.raises(RuntimeError, match=r"^lora_merge: .+"):
        module.lora_merge(
            table=0, count=1, tiles=1, types=types, rounding=module.Rounding.nearest,
            seed=0, step=0, device=-1, stream=0,
        )  # fmt: skip
