"""LayerNorm as a stage: n = (x - mean) rstd gamma + beta over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fused_lora.ops import layer_norm
from fused_lora.ops.chain.stage import FREE, Asked, Optional, Place, Run, Stage, Tensors


@dataclass(frozen=True)
class LayerNorm(Stage):
    """Owns (gamma, beta), either None. x may be wider than ``dtype``, in which n comes out."""

    eps: float
    dtype: torch.dtype
    operands = 2

    def forward(self, x: Tensors, own: Optional, asked: Asked, place: Place = FREE) -> Run:
        """n [M, K] of x [M, K]."""
        gamma, beta = own
        n, mean, rstd = layer_norm.forward(x[0], gamma, beta, self.eps, place.out)
        return Run((n.to(self.dtype),), (mean, rstd))

    def backward(
        self, dy: Tensors, x: Tensors | None, run: Run, own: Optional, asked: Asked
    ) -> tuple[Tensors | None, Optional]:
        """dx [M, K] in x's dtype, and those of gamma and beta."""
        assert x is not None
        gamma, beta = own
        mean, rstd = run.extra
        assert mean is not None and rstd is not None
        if not any(asked.own):
            dx = layer_norm.input_grad(dy[0].to(x[0].dtype), x[0], gamma, mean, rstd)
            return (dx,), (None, None)
        needs = (asked.x, *asked.own)
        wide, *down = layer_norm.grads(dy[0], x[0], gamma, beta, mean, rstd, needs)
        return None if wide is None else (wide.to(x[0].dtype),), tuple(down)

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gamma, beta = own
        return (F.layer_norm(x[0], x[0].shape[1:], gamma, beta, self.eps),)

    def places(self, x: Tensors) -> bool:
        """As the kernel does."""
        return layer_norm.places(x[0])
