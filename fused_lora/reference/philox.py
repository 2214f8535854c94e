"""Philox4x32-10 and the stochastic rounding it drives; the kernels give the same bits.

Element e at (seed, step) owns 16 random bits: half e mod 8, low halves first, of

    philox(counter = (e // 8 low, e // 8 high, step low, step high), key = (seed low, seed high))

|x| lies t / 65536 of the way from one number of the type to the next, t rounded down, and goes to
the next exactly when t + random >= 65536. Infinity stands where the number after the largest would
be; inf stays inf and NaN stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF

# Smallest normal exponent and fraction bits.
_FORMATS: dict[torch.dtype, tuple[int, int]] = {
    torch.bfloat16: (-126, 7),
    torch.float16: (-14, 10),
}


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product; int64 wraps but keeps all 64 bits."""
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds over four int64 tensors that hold 32-bit words."""
    x, y, z, w = counter
    key_low, key_high = key
    for _ in range(10):
        x_high, x_low = _multiply(0xD2511F53, x)
        z_high, z_low = _multiply(0xCD9E8D57, z)
        x, y, z, w = z_high ^ y ^ key_low, z_low, x_high ^ w ^ key_high, x_low
        key_low, key_high = (key_low + 0x9E3779B9) & _WORD, (key_high + 0xBB67AE85) & _WORD
    return x, y, z, w


def random16(element: Tensor, seed: int, step: int) -> Tensor:
    """The 16 bits of each element index, as int64 in [0, 65536)."""
    block, half = element >> 3, element & 7
    fixed = [torch.full_like(block, word) for word in (step & _WORD, (step >> 32) & _WORD)]
    counter = (block & _WORD, (block >> 32) & _WORD, *fixed)
    words = torch.stack(philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD)))
    word = words.gather(0, (half >> 1).unsqueeze(0)).squeeze(0)
    return (word >> (16 * (half & 1))) & 0xFFFF


def stochastic_round(
    x: Tensor, dtype: torch.dtype, seed: int = 0, step: int = 0, offset: int = 0
) -> Tensor:
    """Round ``x`` to bfloat16 or float16 without bias; element i of its flat order is offset + i.

    Raises:
        ValueError: ``dtype`` is neither bfloat16 nor float16.
    """
    element = torch.arange(offset, offset + x.numel(), device=x.device).view(x.shape)
    return round_with(x, dtype, random16(element, seed, step))


def round_with(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round ``x`` by 16 bits given for each element."""
    if dtype not in _FORMATS:
        raise ValueError(f"stochastic rounding is to bfloat16 or float16, got {dtype}")
    smallest, fraction_bits = _FORMATS[dtype]
    exact = x.double()
    exponent = (torch.frexp(exact).exponent - 1).clamp(min=smallest)
    spacing = torch.ldexp(torch.ones_like(exact), exponent - fraction_bits)
    lower = (exact.abs() / spacing).floor()
    t = ((exact.abs() / spacing - lower) * 65536).floor()
    goes_up = t + random >= 65536
    rounded = torch.copysign((lower + goes_up) * spacing, exact)
    return torch.where(exact.isfinite(), rounded, exact).to(dtype)
