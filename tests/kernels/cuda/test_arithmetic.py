"""Conversions, rounding and random bits of csrc/common against torch and the reference."""

from __future__ import annotations

import ctypes
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.reference.philox import random16, round_with

# Beside every upper half of an fp32 number: exact, just off, ties and just off ties of both types.
LOWER = [0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
RANDOM = [0, 1, 7, 8, 0x7FFF, 0x8000, 0xFFF8, 0xFFFF]

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture
def library(host: ModuleType) -> ctypes.CDLL:
    """The parts of the module that only tests see."""
    return ctypes.CDLL(host.__file__)


def every_upper_half() -> Tensor:
    """fp32 numbers with every sign, exponent and upper fraction, [65536 len(LOWER)]."""
    upper = np.arange(65536, dtype=np.uint32)[:, None] << 16
    bits = (upper | np.array(LOWER, dtype=np.uint32)).reshape(-1)
    return torch.from_numpy(bits.view(np.float32))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def as_bits(x: Tensor) -> Tensor:
    """Bits, every NaN the same."""
    return torch.where(x.isnan(), torch.full_like(x, float("nan")), x).view(torch.int16)


@TYPES
def test_widen_every_number(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(65536)
    library.host_widen(
        pointer(numbers), ctypes.c_int64(65536), dtype is torch.bfloat16, pointer(wide)
    )
    torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)


@TYPES
def test_nearest(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = every_upper_half()
    rounded = torch.empty(x.numel(), dtype=dtype)
    library.host_nearest(
        pointer(x), ctypes.c_int64(x.numel()), dtype is torch.bfloat16, pointer(rounded)
    )
    assert torch.equal(as_bits(rounded), as_bits(x.to(dtype)))


def test_nearest_tf32(library: ctypes.CDLL) -> None:
    """Ten bits of fraction; of two as near, the larger magnitude. NaN stays NaN."""
    x = every_upper_half()
    rounded = torch.empty_like(x)
    library.host_nearest_tf32(pointer(x), ctypes.c_int64(x.numel()), pointer(rounded))
    bits = x.view(torch.int32)
    below = bits & ~0x1FFF
    away = below.view(torch.float32).double(), (below + 0x2000).view(torch.float32).double()
    nearer_above = (x.double() - away[0]).abs() >= (away[1] - x.double()).abs()
    finite = x.isfinite() & away[1].isfinite()
    wanted = torch.where(nearer_above, *reversed(away))
    assert torch.equal(rounded[finite].double(), wanted[finite])
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded[x.isinf()], x[x.isinf()])


@TYPES
@pytest.mark.parametrize("bits", RANDOM)
def test_stochastic(library: ctypes.CDLL, dtype: torch.dtype, bits: int) -> None:
    x = every_upper_half()
    random = torch.full((x.numel(),), bits)
    rounded = torch.empty(x.numel(), dtype=dtype)
    library.host_stochastic(
        pointer(x),
        pointer(random),
        ctypes.c_int64(x.numel()),
        dtype is torch.bfloat16,
        pointer(rounded),
    )
    assert torch.equal(as_bits(rounded), as_bits(round_with(x, dtype, random)))


@pytest.mark.parametrize("seed, step", [(0, 0), (1, 2), (2**63 + 5, 2**40 + 1), (2**64 - 1, 7)])
@pytest.mark.parametrize("start", [0, 2**35 - 4])  # the second crosses a 32-bit block number
def test_random_bits(library: ctypes.CDLL, seed: int, step: int, start: int) -> None:
    for e in range(start, start + 16):
        got = torch.empty(8, dtype=torch.int64)
        library.host_random8(
            ctypes.c_int64(e), ctypes.c_uint64(seed), ctypes.c_uint64(step), pointer(got)
        )
        assert torch.equal(got, random16(torch.arange(e, e + 8), seed, step))


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("grad", [False, True])
def test_gelu_of_every_bfloat16(library: ctypes.CDLL, kind: str, grad: bool) -> None:
    """Within 4e-7 of |u|, or of a derivative of 1; numbers as long as u^2 is one."""
    u = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    u = u[u.abs() <= 1e18].contiguous()
    found, at = torch.empty_like(u), u.double().requires_grad_()
    library.host_gelu(pointer(u), ctypes.c_int64(u.numel()), kind == "tanh", grad, pointer(found))
    truth = F.gelu(at, approximate=kind)
    if grad:
        (truth,) = torch.autograd.grad(truth.sum(), at)
    wrong = (found.double() - truth.detach()).abs()
    scale = torch.ones_like(wrong) if grad else u.double().abs().clamp(min=1)
    assert (wrong / scale).max() <= 4e-7
