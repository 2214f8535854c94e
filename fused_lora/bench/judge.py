"""Who decides whether a contender may be timed: truth in float64, naive LoRA as the yardstick."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_lora.bench import gate
from fused_lora.bench.adapters import copy_adapters, initial_values
from fused_lora.bench.registry import CONTENDERS, Contender
from fused_lora.bench.saved import WideCopies
from fused_lora.bench.workload import Workload, share

GATE_BATCH = 1  # images the float64 run is given: it costs twice what it judges
YARDSTICKS = {"separate": "naive", "joint": "naive_joint"}


class Judge:
    """The float64 truth and naive LoRA's own error, computed once for each form."""

    def __init__(self, workload: Workload, rank: int) -> None:
        self.workload, self.rank = workload, rank
        self._known: dict[str, tuple[gate.Outcome, gate.Errors]] = {}

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The first images of the workload, as leaves of their own."""
        parts = [x[:GATE_BATCH].detach() for x in self.workload.inputs]
        return [part.to(dtype or part.dtype, copy=True) for part in parts]

    def of(self, form: str) -> tuple[gate.Outcome, gate.Errors]:
        """Truth and yardstick of ``form``."""
        if form not in self._known:
            naive = CONTENDERS[YARDSTICKS[form]]
            exact = install(naive, share(self.workload.exact), self.rank)
            truth = self.workload.outcome(exact, self.inputs(torch.float64), exact=True)
            plain = install(naive, share(self.workload.base), self.rank)
            found = self.workload.outcome(plain, self.inputs())
            self._known[form] = truth, gate.errors(found, truth)
        return self._known[form]

    def errors(self, contender: Contender, model: nn.Module) -> tuple[gate.Errors, gate.Errors]:
        """The errors of ``model`` and their yardstick; empty for one without adapters."""
        if contender.form not in YARDSTICKS:
            return {}, {}
        truth, yardstick = self.of(contender.form)
        return gate.errors(self.workload.outcome(model, self.inputs()), truth), yardstick

    def wide_copies(self, model: nn.Module) -> int:
        """fp32 copies of x in one forward pass; none can be in fp32."""
        if self.workload.dtype == "fp32":
            return 0
        shape = self.workload.shape
        with WideCopies(GATE_BATCH * shape.tokens * shape.width) as wide, self.workload.precision():
            self.workload.forward(model, self.inputs())
        return wide.count


def install(contender: Contender, model: nn.Module, rank: int) -> nn.Module:
    """Adapt ``model``, with the values every contender begins from."""
    if contender.form not in YARDSTICKS:
        return contender.install(model, rank)
    values = initial_values(model, rank, joint=contender.form == "joint")
    adapted = contender.install(model, rank)
    copy_adapters(values, adapted)
    return adapted
