"""The least time of a step: its products at the measured peak, its bytes at the measured bandwidth.

Of one linear, forward and backward, with M rows and stacked rank R:

    products  2 M N K for y and for dx; 2 M R (K + N) for h and what it adds, for dh, for da and db
    bytes     x twice; y, dy and dx once each; w twice
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fused_lora.bench.clock import Clock

PEAK_SIZE = {"cuda": 8192, "cpu": 1024}  # of a square product
COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
RUNS = 8


@dataclass(frozen=True)
class Linear:
    """The sizes of one adapted projection."""

    m: int
    k: int
    n: int
    rank: int  # of all its adapters together
    adapters: int = 1

    @property
    def flops(self) -> int:
        """Multiply-adds, counted as two; each adapter expands into its own columns alone."""
        m, k, n, r = self.m, self.k, self.n, self.rank
        return 4 * m * n * k + 6 * m * r * (k + n // self.adapters)

    def elements(self) -> int:
        """Elements that must pass."""
        return self.m * (3 * self.k + 2 * self.n) + 2 * self.n * self.k


@dataclass(frozen=True)
class Roof:
    """What a device reaches, measured now."""

    peak_gflops: float
    bandwidth_gbs: float

    def least_ms(self, linears: Iterable[Linear], itemsize: int) -> float:
        """No step over ``linears`` is faster."""
        return sum(self._least_ms(linear, itemsize) for linear in linears)

    def _least_ms(self, linear: Linear, itemsize: int) -> float:
        products_ms = linear.flops / self.peak_gflops * 1e-6
        return max(products_ms, linear.elements() * itemsize / self.bandwidth_gbs * 1e-6)


def measured(device: str, dtype: torch.dtype, clock: Clock) -> Roof:
    """The best of a few runs of a large product and of a long copy."""
    kind = torch.device(device).type
    size = PEAK_SIZE[kind]
    p, q = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    product_ms = _best_ms(lambda: torch.mm(p, q), clock)
    source = torch.ones(COPY_BYTES[kind], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_ms = _best_ms(lambda: target.copy_(source), clock)
    return Roof(2 * size**3 / product_ms * 1e-6, 2 * source.numel() / copy_ms * 1e-6)


def _best_ms(call: Callable[[], object], clock: Clock) -> float:
    def step() -> None:
        call()

    return min(clock.measure_ms(step) for _ in range(RUNS))
