"""Dropout whose mask is a function of a counter, so that nobody stores it.

    keep[m, k] = random16(m ceil(K / 8) 8 + k) >= t        t = 65536 p, rounded
    dropped    = keep x / (1 - t / 65536)                   x [M, K]

With the adapter's branch alone behind it, D = keep / (1 - p), elementwise:

    h = (D x) aT    y = x wT + bias + s h bT    da = dhT (D x)    dx = dy w + D (dh a)

Every row begins a block of 8 random numbers, whatever K is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.reference.philox import random16


def threshold(p: float) -> int:
    """Random numbers below it drop their element.

    Raises:
        ValueError: p is not in [0, 1), or so near to 1 that nothing would be kept.
    """
    if not 0.0 <= p < 1 - 2**-17:
        raise ValueError(f"dropout must lie in [0, 1 - 2^-17), got {p}")
    return round(65536 * p)


def keep(
    rows: int, columns: int, p: float, seed: int, step: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask [rows, columns], True where an element stays."""
    pitch = (columns + 7) // 8 * 8
    m = torch.arange(rows, device=device)[:, None]
    element = m * pitch + torch.arange(columns, device=device)
    return random16(element, seed, step) >= threshold(p)


def dropout(x: Tensor, p: float, seed: int, step: int) -> Tensor:
    """D x for x [M, K]."""
    mask = keep(*x.shape, p, seed, step, x.device)
    return torch.where(mask, x * (65536 / (65536 - threshold(p))), 0)
