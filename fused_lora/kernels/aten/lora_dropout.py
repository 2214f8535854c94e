"""The dropped branch of an adapter, by the library.

    h = (D x) aT      dx = D (dh a)      da = dhT (D x)

                x, dx [M, K]   a, da [R, K]   h, dh [M, R]

D is drawn anew from its seed wherever it is needed, by torch's generator of the device; by the
counter of reference/dropout.py where another backend began with that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.reference import dropout as reference


def shrink(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """h [M, R] in x's dtype."""
    return F.linear(dropped(x, p, seed), a.to(x.dtype))


def input_grad(dh: Tensor, a: Tensor, p: float, seed: int, counted: bool = False) -> Tensor:
    """dx [M, K] in dh's dtype; ``counted``: by the counter."""
    return dropped(dh @ a.to(dh.dtype), p, seed, counted)


def a_grad(dh: Tensor, x: Tensor, a: Tensor, p: float, seed: int, counted: bool = False) -> Tensor:
    """da [R, K] in a's dtype."""
    return (dh.t() @ dropped(x, p, seed, counted)).to(a.dtype)


def dropped(x: Tensor, p: float, seed: int, counted: bool = False) -> Tensor:
    """D x, the same D for the same seed and shape."""
    if x.is_meta:
        return torch.empty_like(x)
    if counted:
        return reference.dropout(x, p, seed, 0)
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1.0 - p, generator=generator)
    return mask.mul_(x).mul_(1.0 / (1.0 - p))
