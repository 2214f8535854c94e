"""Dropout on the input of a, its mask formed wherever it is needed: reference/dropout.py.

    h  = (keep x) aT / (1 - p)          masked as x is loaded, scaled in fp32 once per output
    da = dhT (keep x) / (1 - p)         likewise
    dx = dy w + keep (dh a) / (1 - p)   between the extension and the K loop of one accumulator

No mask is stored and x is never rounded again. One Philox call masks eight elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import Word, disguised
from fused_lora.kernels.triton.philox import random16_of_blocks
from fused_lora.programs.record import recording
from fused_lora.reference import dropout as reference


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
