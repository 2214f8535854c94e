"""Who decides whether a contender may be timed: truth in float64, naive LoRA as the yardstick.

A model is judged by its first blocks, on the whole batch: the very modules that are timed, with
the rows of x that their plans depend on, at a sixth of what judging a ViT's every block costs.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fused_lora.bench import gate
from fused_lora.bench.adapters import copy_adapters, initial_values
from fused_lora.bench.depth import shallow
from fused_lora.bench.registry import CONTENDERS, Contender
from fused_lora.bench.workload import Workload, share

DEPTH = 2  # blocks judged: the first, whose x may need no gradient, and one whose x does
YARDSTICKS = {"separate": "naive", "joint": "naive_joint"}


class Judge:
    """The float64 truth and naive LoRA's own error, computed once for each form."""

    def __init__(self, workload: Workload, rank: int) -> None:
        self.workload, self.rank = workload, rank
        self._known: dict[str, tuple[gate.Outcome, gate.Errors]] = {}

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The inputs of the workload, as leaves of their own."""
        parts = [x.detach() for x in self.workload.inputs]
        return [part.to(dtype or part.dtype, copy=True) for part in parts]

    def of(self, form: str) -> tuple[gate.Outcome, gate.Errors]:
        """Truth and yardstick of ``form``."""
        if form not in self._known:
            naive = CONTENDERS[YARDSTICKS[form]]
            with shallow(self.workload.base, DEPTH) as base:
                plain = install(naive, share(base), self.rank)
                exact = install(naive, copy.deepcopy(base).double(), self.rank)
            truth = self.workload.outcome(exact, self.inputs(torch.float64), exact=True)
            found = self.workload.outcome(plain, self.inputs())
            self._known[form] = truth, gate.errors(found, truth)
        return self._known[form]

    def errors(self, contender: Contender, model: nn.Module) -> tuple[gate.Errors, gate.Errors]:
        """The errors of ``model`` and their yardstick; empty for one without adapters."""
        if contender.form not in YARDSTICKS:
            return {}, {}
        truth, yardstick = self.of(contender.form)
        with shallow(model, DEPTH) as judged:
            found = self.workload.outcome(judged, self.inputs())
        return gate.errors(found, truth), yardstick


def install(contender: Contender, model: nn.Module, rank: int) -> nn.Module:
    """Adapt ``model``, with the values every contender begins from."""
    if contender.form not in YARDSTICKS:
        return contender.install(model, rank)
    values = initial_values(model, rank, joint=contender.form == "joint")
    adapted = contender.install(model, rank)
    copy_adapters(values, adapted)
    return adapted
