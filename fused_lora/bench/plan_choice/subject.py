"""The tensors of one case: what every plan computes with, and what it is judged by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.ops.lora_linear import backward, forward
from fused_lora.plan.problem import Problem
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import Verdict, in_every_order, judge
from fused_lora.types import Impl, Keep, Plan

Outcome = Mapping[str, Tensor]  # y, dx, and da, db of all adapters end to end


class Subject:
    """Random operands of ``question``, seeded, and its truth in float64."""

    def __init__(self, question: Problem, device: str) -> None:
        self.question, self.dtype = question, getattr(torch, question.dtype)
        self.device, self._generator = device, torch.Generator().manual_seed(0)
        m, k, n = question.m, question.k, question.n
        self.x, self.dy = self._draw(m, k), self._draw(m, n)
        self.w, self.bias = self._draw(n, k, std=k**-0.5), self._draw(n)
        a = [self._draw(span.rank, k, std=k**-0.5, dtype=torch.float32) for span in question.spans]
        b = [
            self._draw(span.width, span.rank, std=0.1 * span.rank**-0.5, dtype=torch.float32)
            for span in question.spans
        ]
        self.adapters = Adapters(a, b, [1.0] * len(a), question.spans)
        self.truth = self._by_equations(torch.float64)
        self.plain = in_every_order(lambda: self._by_equations(self.dtype))

    def _draw(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) * std
        return drawn.bfloat16().to(self.device, dtype or self.dtype)  # exact in every dtype

    def _by_equations(self, dtype: torch.dtype) -> Outcome:
        w, x, bias = (tensor.to(dtype) for tensor in (self.w, self.x, self.bias))
        adapters = self.adapters.to(dtype)
        y = reference.forward(x, w, bias, *adapters)
        grads = reference.backward(self.dy.to(dtype), x, w, *adapters, self.question.needs)
        return _outcome(y, grads)

    def run(self, plan: Plan) -> tuple[Tensor, Grads]:
        """Forward and backward by ``plan``; what the clock sees."""
        y, kept = forward(self.x, self.w, self.bias, self.adapters, plan, Impl.AUTO)
        w = None if plan.keep is Keep.MERGED else self.w
        needs = self.question.needs
        return y, backward(self.dy, self.x, kept, w, self.adapters, needs, plan, Impl.AUTO)

    def run_frozen(self) -> tuple[Tensor, Tensor]:
        """The frozen layer's y and dx: the floor."""
        return torch.addmm(self.bias, self.x, self.w.t()), self.dy @ self.w

    def judge(self, plan: Plan) -> list[Verdict]:
        """The verdict on every result of ``plan``; it has run once after this."""
        found = _outcome(*self.run(plan))
        return [
            judge(name, found[name], [run[name] for run in self.plain], true, self.dtype)
            for name, true in self.truth.items()
        ]


def _outcome(y: Tensor, grads: Grads) -> Outcome:
    assert grads.x is not None
    a, b = ([each.flatten() for each in part if each is not None] for part in (grads.a, grads.b))
    return {"y": y, "dx": grads.x, "da": torch.cat(a), "db": torch.cat(b)}
