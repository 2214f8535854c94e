"""The yardstick rule (DESIGN.md section 3).

    error(ours) <= FACTOR x error(plain torch in the same dtype) + one rounding band

Errors are relative to the float64 truth, in the Frobenius norm. The band is the dtype's epsilon:
what one rounding of every element may cost where plain torch happens to make none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Verdict:
    """One comparison: two errors and the budget they make."""

    name: str
    ours: float
    plain: float
    budget: float

    @property
    def passed(self) -> bool:
        """Whether ours is within budget; NaN never is."""
        return self.ours <= self.budget

    def __str__(self) -> str:
        word = "within" if self.passed else "over"
        return f"{self.name}: {self.ours:.3e} is {word} {self.budget:.3e} (plain {self.plain:.3e})"


def error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error of ``value`` against ``truth``; 0 for two empty tensors."""
    if value.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(value.double() - truth.double())
    return float(difference / torch.linalg.vector_norm(truth.double()).clamp_min(1e-300))


def judge(
    name: str,
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    band: float | None = None,
) -> Verdict:
    """The verdict on ``ours``, computed in ``dtype``, beside ``plain``, computed likewise.

    ``band`` stands for the dtype's epsilon where products round more than the dtype does.
    """
    theirs = error(plain, truth)
    budget = FACTOR * theirs + (torch.finfo(dtype).eps if band is None else band)
    return Verdict(name, error(ours, truth), theirs, budget)
