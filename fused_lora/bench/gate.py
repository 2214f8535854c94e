"""No time without its error: what a contender computes, against float64.

A contender passes when, for its output and for each kind of gradient,

    error(contender) <= 2 error(naive LoRA in the same dtype) + eps(dtype)

with errors as relative Frobenius distances to the float64 run of the same equations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Errors = dict[str, float]  # by quantity: y, dx, da, db
Outcome = dict[str, list[Tensor]]  # the tensors of each quantity

FACTOR = 2.0
ROUNDING = {
    "fp32": torch.finfo(torch.float32).eps,
    "bf16": torch.finfo(torch.bfloat16).eps,
    "amp": torch.finfo(torch.bfloat16).eps,
}


def distance(ours: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Relative Frobenius distance of the tensors taken together; infinite when not finite."""
    difference = size = 0.0
    for mine, true in zip(ours, truth, strict=True):
        true = true.double()
        difference += (mine.double() - true).square().sum().item()
        size += true.square().sum().item()
    error = math.sqrt(difference / size) if size else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf


def errors(ours: Mapping[str, list[Tensor]], truth: Mapping[str, list[Tensor]]) -> Errors:
    """The distance to ``truth`` of every quantity it has."""
    return {quantity: distance(ours[quantity], true) for quantity, true in truth.items()}


def limit(yardstick: float, dtype: str) -> float:
    """The largest error that passes beside a naive error of ``yardstick``."""
    return FACTOR * yardstick + ROUNDING[dtype]


def complaints(found: Errors, yardstick: Errors, dtype: str) -> list[str]:
    """One sentence for each quantity whose error is over its limit; NaN never passes."""
    return [
        f"error of {quantity} is {found[quantity]:.2e}, limit {limit(naive, dtype):.2e}"
        for quantity, naive in yardstick.items()
        if not found[quantity] <= limit(naive, dtype)
    ]
