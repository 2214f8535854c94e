"""LayerNorm as a stage: n = (x - mean) rstd gamma + beta over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops.chain.stage import Asked, Optional, Run, Stage, Tensors


@dataclass(frozen=True)
class LayerNorm(Stage):
    """Owns (gamma, beta), either None. x may be wider than ``dtype``, in which n comes out."""

    eps: float
    dtype: torch.dtype
    operands = 2

    def forward(self, x: Tensors, own: Optional, asked: Asked) -> Run:
        """n [M, K] of x [M, K]."""
        wide = _wide(x[0], own[0])
        n, mean, rstd = torch.native_layer_norm(wide, wide.shape[1:], *own, self.eps)
        return Run((n.to(self.dtype),), (mean, rstd))

    def backward(
        self, dy: Tensors, x: Tensors | None, run: Run, own: Optional, asked: Asked
    ) -> tuple[Tensors | None, Optional]:
        """dx [M, K] in x's dtype, and those of gamma and beta."""
        assert x is not None
        wide = _wide(x[0], own[0])
        dx, *down = torch.ops.aten.native_layer_norm_backward(
            dy[0].to(wide.dtype), wide, wide.shape[1:], *run.extra, *own, [asked.x, *asked.own]
        )
        return (dx.to(x[0].dtype),) if asked.x else None, tuple(down)

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        return (F.layer_norm(x[0], x[0].shape[1:], *own, self.eps),)


def _wide(x: Tensor, gamma: Tensor | None) -> Tensor:
    """x in gamma's dtype where the kernels take no mixture of the two."""
    return x if gamma is None or x.device.type == "cpu" else x.to(gamma.dtype)
