"""Philox's random words in a kernel: stochastic rounding and dropout by seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import Word, disguised
from fused_lora.programs.record import recording
from fused_lora.reference import dropout as reference

# Philox4x32-10 and the stochastic rounding it drives: the bits of reference/philox.py.
#
# Element e at (seed, step) owns 16 random bits: half e mod 8, low halves first, of
#
#     philox(counter = (e // 8 low, e // 8 high, step low, step high), key = (seed low, seed high))
#
# |x| lies t / 65536 of the way from one number of the type to the next, t rounded down, and goes to
# the next exactly when t + random >= 65536.


@triton.jit
def _round(x, y, z, w, key_low, key_high):
    """One of ten."""
    x_high, z_high = tl.umulhi(x, 0xD2511F53), tl.umulhi(z, 0xCD9E8D57)
    x_low, z_low = x * 0xD2511F53, z * 0xCD9E8D57
    return z_high ^ y ^ key_low, z_low, x_high ^ w ^ key_high, x_low


@triton.jit
def _words(block, seed_low, seed_high, step_low, step_high):
    """Four words for each int64 block index; the other arguments are 32 bits each."""
    x, y = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    z, w = tl.zeros_like(x) + step_low, tl.zeros_like(x) + step_high
    key_low, key_high = tl.zeros_like(x) + seed_low, tl.zeros_like(x) + seed_high
    for _ in tl.static_range(10):
        x, y, z, w = _round(x, y, z, w, key_low, key_high)
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return x, y, z, w


@triton.jit
def random16(element, seed_low, seed_high, step_low, step_high):
    """The 16 bits of each int64 element index, as uint32."""
    half = (element & 7).to(tl.uint32)
    x, y, z, w = _words(element >> 3, seed_low, seed_high, step_low, step_high)
    word = tl.where(half < 4, tl.where(half < 2, x, y), tl.where(half < 6, z, w))
    return (word >> (16 * (half & 1))) & 0xFFFF


@triton.jit
def random16_of_blocks(block, seed_low, seed_high, step_low, step_high):
    """[M, 8 B] of int64 blocks [M, B]: those of elements 8 block to 8 block + 7, side by side."""
    x, y, z, w = _words(block, seed_low, seed_high, step_low, step_high)
    words = tl.join(tl.join(x, z), tl.join(y, w))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [block.shape[0], 8 * block.shape[1]])


@triton.jit
def _to_bfloat16(magnitude, random):
    """fp32 bit patterns without sign: t is their low half, at every exponent."""
    return ((magnitude + random) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _to_float16(magnitude, random):
    """fp32 bit patterns without sign, by the spacing 2^e of float16 at each."""
    exponent = tl.maximum((magnitude >> 23).to(tl.int32), 127 - 14) - 10  # biased, of the spacing
    spacing = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = tl.minimum(magnitude.to(tl.float32, bitcast=True) * inverse, 65536.0)
    lower = tl.floor(steps)
    t = ((steps - lower) * 65536.0).to(tl.uint32)
    return (lower + tl.where(t + random >= 65536, 1.0, 0.0)) * spacing


@triton.jit
def stochastic_round(value, random, dtype: tl.constexpr):
    """fp32 to bfloat16 or float16 by 16 bits given for each element; inf and NaN stay."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = _to_bfloat16(magnitude, random)
    else:
        rounded = _to_float16(magnitude, random)
    signed = tl.where(bits >> 31 != 0, -rounded, rounded)
    return tl.where(magnitude < 0x7F800000, signed, value).to(dtype)


# Dropout on the input of a, its mask formed wherever it is needed: reference/dropout.py.
#
#     h  = (keep x) aT / (1 - p)          masked as x is loaded, scaled in fp32 once per output
#     da = dhT (keep x) / (1 - p)         likewise
#     dx = dy w + keep (dh a) / (1 - p)   between the extension and the K loop of one accumulator
#
# No mask is stored and x is never rounded again. One Philox call masks eight elements.


class Dropout(NamedTuple):
    """As a kernel argument; every integer is ``disguised``."""

    inverse: float  # 1 / (1 - p)
    threshold: int
    seed_low: int | Word
    seed_high: int | Word
    step_low: int
    step_high: int


def dropout(p: float, seed: int | Tensor, step: int) -> Dropout | None:
    """None where nothing is dropped. The seed of a program is a tensor, an int64 on the CPU."""
    threshold = reference.threshold(p)
    if not threshold:
        return None
    seeds: tuple[Any, Any]
    if isinstance(seed, Tensor) and recording():
        seeds = Word(seed, 0), Word(seed, 32)
    else:
        seeds = disguised(int(seed)), disguised(int(seed) >> 32)
    inverse, steps = 65536 / (65536 - threshold), (disguised(step), disguised(step >> 32))
    return Dropout(inverse, disguised(threshold), seeds[0], seeds[1], steps[0], steps[1])


@triton.jit
def _word(disguised):
    return (disguised >> 1).to(tl.uint32)


@triton.jit
def kept(dropout, m, first, columns, BLOCK: tl.constexpr):
    """The mask of rows m [M] and BLOCK columns from ``first``, a multiple of 8."""
    eights = first // 8 + tl.arange(0, BLOCK // 8)
    block = m.to(tl.int64)[:, None] * tl.cdiv(columns, 8) + eights[None, :]
    seed_low, seed_high = _word(dropout.seed_low), _word(dropout.seed_high)
    step_low, step_high = _word(dropout.step_low), _word(dropout.step_high)
    random = random16_of_blocks(block, seed_low, seed_high, step_low, step_high)
    return random >= _word(dropout.threshold)
