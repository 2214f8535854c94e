"""No row without it: a method's output and gradients beside the float64 reference's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fused_lora.bench.registry import METHODS, Method
from fused_lora.bench.workload import (
    Outcome,
    Workload,
    copy_adapters,
    initial_values,
    shallow,
    share,
)

# No time without its error: what a method computes, against float64.
#
# A method passes when, for its output and for each kind of gradient,
#
#     error(method) <= 2 error(naive LoRA in the same dtype) + eps(dtype)
#
# with errors as relative Frobenius distances to the float64 run of the same equations.


Errors = dict[str, float]  # by quantity: y, dx, da, db

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


# Who decides whether a method may be timed: truth in float64, naive LoRA as the yardstick.
#
# A model is judged by its first blocks, on the whole batch: the very modules that are timed, with
# the rows of x that their plans depend on, at a sixth of what judging a ViT's every block costs.


DEPTH = 2  # blocks judged: the first, whose x may need no gradient, and one whose x does
YARDSTICKS = {"separate": "naive", "joint": "naive_joint"}


class Gate:
    """The float64 truth and naive LoRA's own error, computed once for each form."""

    def __init__(self, workload: Workload, rank: int) -> None:
        self.workload, self.rank = workload, rank
        self._known: dict[str, tuple[Outcome, Errors]] = {}

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The inputs of the workload, as leaves of their own."""
        parts = [x.detach() for x in self.workload.inputs]
        return [part.to(dtype or part.dtype, copy=True) for part in parts]

    def of(self, form: str) -> tuple[Outcome, Errors]:
        """Truth and yardstick of ``form``."""
        if form not in self._known:
            naive = METHODS[YARDSTICKS[form]]
            with shallow(self.workload.base, DEPTH) as base:
                plain = install(naive, share(base), self.rank)
                exact = install(naive, copy.deepcopy(base).double(), self.rank)
            truth = self.workload.outcome(exact, self.inputs(torch.float64), exact=True)
            found = self.workload.outcome(plain, self.inputs())
            self._known[form] = truth, errors(found, truth)
        return self._known[form]

    def errors(self, method: Method, model: nn.Module) -> tuple[Errors, Errors]:
        """The errors of ``model`` and their yardstick; empty for one without adapters."""
        if method.form not in YARDSTICKS:
            return {}, {}
        truth, yardstick = self.of(method.form)
        with shallow(model, DEPTH) as judged:
            found = self.workload.outcome(judged, self.inputs())
        return errors(found, truth), yardstick


def install(method: Method, model: nn.Module, rank: int) -> nn.Module:
    """Adapt ``model``, with the values every method begins from."""
    if method.form not in YARDSTICKS:
        return method.install(model, rank)
    values = initial_values(model, rank, joint=method.form == "joint")
    adapted = method.install(model, rank)
    copy_adapters(values, adapted)
    return adapted
