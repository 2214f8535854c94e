"""What a student is asked for: its teacher's tokens, the labels, or both.

loss = c_t mean |T - S| + c_l cross_entropy(logits, labels)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.distill.data.batches import Batch
from fused_lora.distill.taps import tokens_of
from fused_lora.distill.wecolora import token_loss

Terms = dict[str, Tensor]  # "loss", and what it is made of


class Objective(nn.Module):
    """A model and its loss in one module, so that DDP can wrap it."""

    def __init__(
        self, student: nn.Module, blocks: Sequence[str], tokens: float = 1.0, labels: float = 0.0
    ) -> None:
        super().__init__()
        self.student = student
        self.blocks = list(blocks) if tokens else []
        self.tokens, self.labels = tokens, labels

    def forward(self, images: Tensor, labels: Tensor, wanted: Sequence[Tensor]) -> Terms:
        """The terms of one batch; ``wanted`` holds T of each of the blocks."""
        logits, tokens = tokens_of(self.student, images, self.blocks, whole=bool(self.labels))
        terms: Terms = {}
        if self.blocks:
            apart = [token_loss(s, t) for s, t in zip(tokens, wanted, strict=True)]
            terms["tokens"] = torch.stack(apart).mean()
        if self.labels:
            wide = logits if logits.dtype.itemsize > 4 else logits.float()
            terms["labels"] = F.cross_entropy(wide, labels)
        factors = {"tokens": self.tokens, "labels": self.labels}
        terms["loss"] = sum((factors[k] * v for k, v in terms.items()), torch.zeros(()).to(images))
        return terms


def unreached(objective: nn.Module, batch: Batch, wanted: Sequence[Tensor]) -> list[str]:
    """The parameters that train and get no gradient from the loss."""
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    training = objective.training
    loss = objective.eval()(batch.images, batch.labels, wanted)["loss"]
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    objective.train(training)
    return [name for name, grad in zip(trained, grads, strict=True) if grad is None]
