"""Self-attention of packed q|k|v as a stage, so that a chain can let go of q, k and v.

out = softmax(q kT scale) v per head. The forward's own output and log-sum-exp are handed to the
backward kernel where torch takes a fused one; elsewhere (its plain form, heads that it pads)
backward runs scaled_dot_product_attention once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.aten import attention as kernels
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
class Attention(Stage):
    """out [M, H D] of qkv [M, 3 H D]; every sample has ``tokens`` rows."""

    heads: int  # H
    tokens: int  # T, rows of one sample
    kernel: kernels.Key | None = None  # torch's own choice, where its backward is known

    def forward(self, x: Tensors, own: Optional, asked: Asked, place: Place = FREE) -> StageRun:
        """One pass; extra is what a fused backward takes: out, log-sum-exp and their like."""
        qkv = split(x[0].view(-1, self.tokens, x[0].shape[1]), self.heads)
        if self.kernel is None:
            return StageRun((_rows(F.scaled_dot_product_attention(*qkv)),))
        out, kept, numbers = kernels.forward(self.kernel, qkv)
        return StageRun((_rows(out),), kept, numbers)

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: Asked,
        epilogue: GradEpilogue = PLAIN,
    ) -> tuple[Tensors | None, Optional]:
        """The gradient of qkv, packed as qkv is."""
        assert x is not None
        qkv = split(x[0].view(-1, self.tokens, x[0].shape[1]), self.heads)
        d_out = dy[0].view(-1, self.tokens, self.heads, qkv[0].shape[-1]).transpose(1, 2)
        if self.kernel:
            out = run.extra[0]
            assert out is not None
            done = kernels.Attended(out, run.extra, run.note)
            dqkv = kernels.backward(self.kernel, d_out, qkv, done)
        else:
            dqkv = _again(qkv, d_out)
        return (packed(dqkv).flatten(0, 1),), ()

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        q, k, v = split(x[0].view(-1, self.tokens, x[0].shape[1]), self.heads)
        return (_rows(F.scaled_dot_product_attention(q, k, v)),)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, H, T, D], views of qkv [B, T, 3 H D]."""
    batch, tokens, width = qkv.shape
    parts = qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind(0)
    return q, k, v


def packed(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[B, T, 3 H D] of three [B, H, T, D]: a view where they are slices of one, else one copy."""
    q, k, v = parts
    batch, heads, tokens, depth = q.shape
    step = heads * depth
    strides = (tokens * 3 * step, depth, 3 * step, 1)
    origin, address = q.untyped_storage()._cdata, q.storage_offset()
    if all(
        part.stride() == strides
        and part.untyped_storage()._cdata == origin
        and part.storage_offset() == address + i * step
        for i, part in enumerate(parts)
    ):
        return q.as_strided((batch, tokens, 3 * step), (3 * step * tokens, 3 * step, 1))
    return torch.cat([part.transpose(1, 2) for part in (q, k, v)], 2).view(batch, tokens, 3 * step)


class Split(torch.autograd.Function):
    """``split`` whose backward is ``packed``: one copy of dq, dk and dv at most, often none."""

    @staticmethod
    def forward(ctx: object, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return split(qkv, heads)

    @staticmethod
    def backward(ctx: object, *parts: Tensor) -> tuple[Tensor, None]:
        """The gradient of qkv."""
        return packed(parts), None  # type: ignore[arg-type]


def _rows(out: Tensor) -> Tensor:
    batch, heads, tokens, depth = out.shape
    return out.transpose(1, 2).reshape(batch * tokens, heads * depth)


def _again(qkv: Tensors, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (part.detach().requires_grad_() for part in qkv)
        out = F.scaled_dot_product_attention(q, k, v)
    return torch.autograd.grad(out, (q, k, v), dy)  # type: ignore[return-value]
