"""One call of a plan: what it multiplies and moves, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

from fused_lora.plan.device import Ceilings


@dataclass(frozen=True)
class Step:
    """One call: a GEMM of m x n x k, or, with k = 0, a pass over ``m * n`` elements."""

    name: str
    m: int
    n: int
    k: int = 0
    accumulates: bool = False  # reads its output as well
    extra_flops: int = 0  # beyond the GEMM's
    extra_elements: int = 0  # likewise, read or written
    efficiency: float = 1.0  # of its products, beside the library's
    calls: float = 1.0  # what a launch costs, in library calls
    host_calls: float | None = None  # what it costs the host, where that is another number

    @property
    def flops(self) -> int:
        """Multiply-adds, counted as two."""
        return 2 * self.m * self.n * self.k + self.extra_flops

    def elements(self) -> int:
        """Elements read and written."""
        if not self.k:
            return 2 * self.m * self.n + self.extra_elements
        result = (1 + self.accumulates) * self.m * self.n
        return self.m * self.k + self.k * self.n + result + self.extra_elements

    def time_us(self, itemsize: int, ceilings: Ceilings) -> float:
        """Estimated time: of the device alone where the host queues work for it."""
        inner = max(1, min(self.m, self.n, self.k or 1))
        rate = self.efficiency * ceilings.matmul_gflops * inner / (inner + ceilings.half_rank)
        compute_us = self.flops / rate * 1e-3
        memory_us = self.elements() * itemsize / ceilings.bandwidth_gbs * 1e-3
        between_us = ceilings.call_us if ceilings.gap_us is None else ceilings.gap_us
        return max(compute_us, memory_us) + self.calls * between_us

    def host_us(self, ceilings: Ceilings) -> float:
        """Estimated time of the host, where it queues work for a device; else 0."""
        if ceilings.gap_us is None:
            return 0.0
        return (self.calls if self.host_calls is None else self.host_calls) * ceilings.call_us
