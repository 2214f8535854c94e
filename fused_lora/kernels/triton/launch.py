"""What every launcher asks of torch: the device to launch on, and how fp32 products are formed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from fused_lora.kernels.precision import is_tf32


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside go to ``device``; tensors of Triton's interpreter are on no device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def input_precision(dtype: torch.dtype) -> str:
    """``tf32`` only for fp32 products that torch may form so; narrower types are exact."""
    return "tf32" if is_tf32(dtype) else "ieee"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of ``device``; a small chip's for what is only interpreted or compiled."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; 80, the least, for what is only interpreted."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def words(noise: tuple[int, int] | None) -> tuple[int, ...]:
    """Seed and step as two 32-bit words each, low first, signed: an int32 whatever the bits."""
    seed, step = noise or (0, 0)
    halves = (seed, seed >> 32, step, step >> 32)
    return tuple((half + (1 << 31)) % (1 << 32) - (1 << 31) for half in halves)
