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
        wide, gamma, beta = _alike(x[0], own)
        n, mean, rstd = torch.native_layer_norm(wide, wide.shape[1:], gamma, beta, self.eps)
        return Run((n.to(self.dtype),), (mean, rstd))

    def backward(
        self, dy: Tensors, x: Tensors | None, run: Run, own: Optional, asked: Asked
    ) -> tuple[Tensors | None, Optional]:
        """dx [M, K] in x's dtype, and those of gamma and beta."""
        assert x is not None
        wide, gamma, beta = _alike(x[0], own)
        mask, dn = [asked.x, *asked.own], dy[0].to(wide.dtype)
        dx, *down = torch.ops.aten.native_layer_norm_backward(
            dn, wide, wide.shape[1:], *run.extra, gamma, beta, mask
        )
        pairs = zip(down, own, strict=True)
        own_grads = tuple(d if d is None or t is None else d.to(t.dtype) for d, t in pairs)
        return (dx.to(x[0].dtype),) if asked.x else None, own_grads

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gamma, beta = own
        return (F.layer_norm(x[0], x[0].shape[1:], gamma, beta, self.eps),)


def _alike(x: Tensor, own: Optional) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, gamma and beta in one dtype, but on the CPU, whose kernels take a narrow x as it is."""
    gamma, beta = own
    if gamma is None or gamma.dtype is x.dtype or x.is_cpu:
        return x, gamma, beta
    dtype = torch.promote_types(x.dtype, gamma.dtype)
    return x.to(dtype), gamma.to(dtype), None if beta is None else beta.to(dtype)
