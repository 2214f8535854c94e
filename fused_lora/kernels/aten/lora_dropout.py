"""The dropped branch of an adapter, by the library.

    h = (D x) aT      dx = D (dh a)      da = dhT (D x)      D = keep / (1 - p)

                x, dx [M, K]   a, da [R, K]   h, dh [M, R]

keep is drawn anew from its seed wherever it is needed, by torch's generator of the device; by the
counter of reference/dropout.py where another backend began with that. Its zeros and ones are exact
in every dtype, and 1 / (1 - p) is the factor of a product.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fused_lora.kernels.gemm import accumulate, product
from fused_lora.programs.record import opaque
from fused_lora.reference import dropout as reference

Seed = int | Tensor  # a Tensor: an int64 on the CPU


def dropout_shrink(x: Tensor, a: Tensor, p: float, seed: Seed) -> Tensor:
    """h [M, R] in x's dtype."""
    h = x.new_empty(x.shape[0], a.shape[0])
    return accumulate(h, x * kept(x, p, seed), a.to(x.dtype).t(), inverse(p), beta=0)


def dropout_grads(
    dh: Tensor,  # [M, R]
    x: Tensor | None,  # [M, K]; None where a asks for no gradient
    a: Tensor,
    p: float,
    seed: Seed,
    needs_x: bool,
    dx: Tensor | None = None,  # [M, K], what D (dh a) is added to, in place
    counted: bool = False,  # whether keep is the counter's
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] in dh's dtype and da [R, K] in a's, where asked for, of one drawing."""
    if not needs_x and x is None:
        return None, None
    factor = inverse(p, counted)
    like = dh.new_empty(dh.shape[0], a.shape[1]) if x is None else x
    keep = kept(like, p, seed, counted)
    da = None if x is None else product(dh.t(), x * keep, factor, a.dtype)
    if not needs_x:
        return None, da
    through = dh @ a.to(dh.dtype)
    if dx is None:
        return through.mul_(keep).mul_(factor), da
    return dx.addcmul_(through, keep, value=factor), da


def inverse(p: float, counted: bool = False) -> float:
    """1 / (1 - p), of p in 16 bits where the counter's."""
    return 65536 / (65536 - reference.threshold(p)) if counted else 1.0 / (1.0 - p)


def kept(like: Tensor, p: float, seed: Seed, counted: bool = False) -> Tensor:
    """keep, zeros and ones in the shape and dtype of ``like``, the same for the same seed."""
    return opaque(_kept, _as, like, p, seed, counted)  # type: ignore[no-any-return]


def _kept(like: Tensor, p: float, seed: Seed, counted: bool) -> Tensor:
    if like.is_meta:
        return torch.empty_like(like)
    if counted:
        rows, columns = like.shape
        return reference.keep(rows, columns, p, int(seed), 0, like.device).to(like.dtype)
    generator = _generators.of(like.device).manual_seed(int(seed))
    return torch.empty_like(like).bernoulli_(1.0 - p, generator=generator)


class _Generators(threading.local):
    """One of each thread and device, seeded for each mask."""

    def __init__(self) -> None:
        self.made: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """That of ``device``."""
        if device not in self.made:
            self.made[device] = torch.Generator(device)
        return self.made[device]


_generators = _Generators()


def _as(like: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(like)
