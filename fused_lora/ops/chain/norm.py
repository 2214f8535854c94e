"""LayerNorm as a stage: n = (x - mean) rstd gamma + beta over the last dimension.

Triton's kernel writes n, in whatever dtype the next product reads, into the left of [n | h] where
that is one GEMM's operand, and dx, with the gradient that passed by, in x's dtype. Another of its
kernels forms h as well, where the product reads one. The library's writes a tensor of its own:
torch's ``native_layer_norm.out`` makes that too and copies, so nothing is asked of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.interface import Adapters
from fused_lora.ops import layer_norm, row_shrink
from fused_lora.ops.chain.stage import (
    FREE,
    PLAIN,
    Asked,
    GradEpilogue,
    Optional,
    Place,
    Stage,
    StageRun,
    Tensors,
)


@dataclass(frozen=True)
class LayerNorm(Stage):
    """Owns (gamma, beta), either None. x may be wider than ``dtype``, in which n comes out."""

    eps: float
    dtype: torch.dtype
    operands = 2

    def forward(self, x: Tensors, own: Optional, asked: Asked, place: Place = FREE) -> StageRun:
        """n [M, K] of x [M, K]."""
        gamma, beta = own
        if place.makes and place.makes.adapters:
            n = torch.empty_like(x[0], dtype=self.dtype) if place.out is None else place.out
            norm = (x[0], gamma, beta, self.eps)
            made = row_shrink.layer_norm_shrink(*norm, place.makes.adapters, n, place.makes.right)
            return StageRun((made.x,), made.statistics, h=made.h)
        out = self._as(x[0], self.dtype) if place.out is None else place.out
        n, mean, rstd = layer_norm.layer_norm_forward(x[0], gamma, beta, self.eps, out)
        return StageRun((n.to(self.dtype),), (mean, rstd))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: Asked,
        epilogue: GradEpilogue = PLAIN,
    ) -> tuple[Tensors | None, Optional]:
        """dx [M, K] in x's dtype, with what passed by added and rounded once; of gamma and beta."""
        assert x is not None
        gamma, beta = own
        mean, rstd = run.extra
        assert mean is not None and rstd is not None
        if not any(asked.own):
            out = self._as(dy[0], x[0].dtype)
            dz = dy[0].to(x[0].dtype) if out is None else dy[0]
            dx = layer_norm.layer_norm_input_grad(dz, x[0], gamma, mean, rstd, epilogue.beside, out)
            return (dx,), (None, None)
        needs = (asked.x, *asked.own)
        wide, *down = layer_norm.layer_norm_grads(dy[0], x[0], gamma, beta, mean, rstd, needs)
        return None if wide is None else (wide.to(x[0].dtype),), tuple(down)

    def joins(self, asked: Asked) -> bool:
        """The kernel of dx alone does."""
        return not any(asked.own)

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gamma, beta = own
        return (F.layer_norm(x[0], x[0].shape[1:], gamma, beta, self.eps),)

    def _as(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Where the kernel writes rows like these in ``dtype``, if a pass to cast is saved so."""
        casts = like.dtype is not dtype and layer_norm.layer_norm_places(like)
        return torch.empty_like(like, dtype=dtype) if casts else None

    def places(self, x: Tensors) -> bool:
        """As the kernel does."""
        return layer_norm.layer_norm_places(x[0])

    def shrinks(self, x: Tensors, own: Optional, adapters: Adapters) -> bool:
        """As a kernel does."""
        return row_shrink.why_not_shrink("shrink_norm", x[0], self.dtype, adapters.rank, *own) is None
