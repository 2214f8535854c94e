"""A step of WeCoLoRA: the teacher's forward, the student's step, L1 between their last tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_lora.bench.registry import suite
from fused_lora.bench.shapes import ModelShape
from fused_lora.bench.suites.train_step import TrainStep
from fused_lora.bench.workload import blocks
from fused_lora.distill import copy_layers
from fused_lora.distill.stack import pairs_of, tokens_in, tokens_of
from fused_lora.distill.wecolora import token_loss

REDUCTION = 2


@suite("wecolora_step")
class WeCoLoRAStep(TrainStep):
    """Every other block of the teacher, adapted by the method; AdamW on the adapters."""

    def __init__(self, shape: ModelShape, batch: int, dtype: str, device: str) -> None:
        super().__init__(shape, batch, dtype, device)
        self.teacher = self.base.eval()
        (self.pair,) = pairs_of(self.teacher, REDUCTION)
        self.base = copy_layers(self.teacher, REDUCTION).train()

    def forward(self, model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The student's tokens before the final norm, as far as it goes, and the teacher's."""
        with torch.no_grad(), self.precision():
            _, (wanted,) = tokens_of(self.teacher, self.inputs[0], [self.pair.teacher])
        seen: list[Tensor] = []
        last = blocks(model)[-1]
        hook = last.register_forward_hook(lambda *call: seen.append(tokens_in(call[2])))
        model(*inputs)
        hook.remove()
        self.wanted = wanted
        return (seen[0],)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """mean |T - S|, and its gradient back."""
        token_loss(outputs[0], self.wanted).backward()
