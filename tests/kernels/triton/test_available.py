"""Every reason why Triton cannot serve, in one sentence."""

import pytest
import torch

from fused_lora.kernels.triton import available

triton = pytest.importorskip("triton")


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a GPU this room serves."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return monkeypatch


def test_serves(hopper):
    assert available.why_not(torch.device("cuda", 0), torch.bfloat16) is None


def test_says_what_is_missing(hopper):
    hopper.setenv("TRITON_INTERPRET", "1")
    assert "the interpreter computes bf16 wrongly" in available.why_not()
    hopper.delenv("TRITON_INTERPRET")
    assert "the tensors are on cpu" in available.why_not(torch.device("cpu"))
    assert "not in float64" in available.why_not(dtype=torch.float64)
    hopper.setattr(triton, "__version__", "3.5.1")
    assert "triton is 3.5.1, these kernels are written for 3.6" in available.why_not()


def test_says_what_the_device_lacks(hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert available.why_not() == "the device has compute capability 7.5, these kernels need 8.0"
    hopper.setattr(torch.version, "cuda", None)
    assert available.why_not() == "this torch is not built for CUDA"
    hopper.setattr(torch.cuda, "is_available", lambda: False)
    assert available.why_not() == "torch sees no CUDA device"
