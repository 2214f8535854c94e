"""Stages beside lora_linear: LayerNorm, attention, activations plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.aten import attention as kernels
from fused_lora.kernels.interface import Adapters, InputNorm
from fused_lora.ops import elementwise
from fused_lora.ops.chain.stage import (
    FREE,
    PLAIN,
    FormedGrads,
    GradEpilogue,
    Optional,
    Placement,
    Previous,
    Stage,
    StageGrads,
    StageNeeds,
    StageRun,
    Tensors,
)
from fused_lora.ops.epilogues import why_not_packed
from fused_lora.ops.lora_grad_backends import packed_gradients

Forward = Callable[[Tensor, Tensor | None], Tensor]  # of what goes in, and where to write
Backward = Callable[[Tensor, Tensor], Tensor]  # of the gradient and of what went in


def _gelu(kind: str) -> tuple[Forward, Backward]:
    return (
        lambda u, out: elementwise.gelu_forward(u, kind, out),
        lambda dg, u: elementwise.gelu_input_grad(dg, u, kind),
    )


def _silu(u: Tensor, out: Tensor | None) -> Tensor:
    return F.silu(u) if out is None else torch.ops.aten.silu(u, out=out)


def _sigmoid_backward(dg: Tensor, u: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(dg, u.sigmoid())


KINDS = {"gelu": "erf", "gelu_tanh": "tanh"}
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    **{name: _gelu(kind) for name, kind in KINDS.items()},
    "silu": (_silu, torch.ops.aten.silu_backward),
    "sigmoid": (lambda u, out: torch.sigmoid(u, out=out), _sigmoid_backward),
}
COMPOSED: dict[str, Callable[[Tensor], Tensor]] = {  # what autograd and the compiler know
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Activation(Stage):
    """g [M, N] = act(u [M, N])."""

    name: str  # a key of ACTIVATIONS

    leaves = False

    def forward(
        self, x: Tensors, own: Optional, asked: StageNeeds, place: Placement = FREE
    ) -> StageRun:
        """g of u."""
        if place.makes and place.makes.adapters:
            assert self.gelu is not None
            out = torch.empty_like(x[0]) if place.out is None else place.out
            given = (x[0], self.gelu, place.makes.adapters, out, place.makes.right)
            made = elementwise.gelu_shrink(*given)
            return StageRun((made.x,), h=made.h)
        return StageRun((ACTIVATIONS[self.name][0](x[0], place.out),))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
        epilogue: GradEpilogue = PLAIN,
    ) -> StageGrads:
        """du = act'(u) dg."""
        assert x is not None
        return StageGrads((ACTIVATIONS[self.name][1](dy[0], x[0]),), ())

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        return (COMPOSED[self.name](x[0]),)

    def places(self, x: Tensors) -> bool:
        """As the kernel does; silu's and sigmoid's do."""
        return self.gelu is None or elementwise.gelu_places(x[0], self.gelu)

    def shrinks(self, x: Tensors, own: Optional, adapters: Adapters) -> bool:
        """As GELU's kernel does."""
        asked = ("shrink_gelu", x[0], x[0].dtype, adapters.rank)
        return self.gelu is not None and elementwise.why_not_shrink(*asked) is None

    @property
    def gelu(self) -> str | None:  # type: ignore[override]
        """Which form of it."""
        return KINDS.get(self.name)


@dataclass(frozen=True)
class Gated(Stage):
    """g [M, N] = act(gate) value, of two tensors [M, N] or of one [M, 2 N] that holds both."""

    name: str  # a key of ACTIVATIONS
    gate_last: bool = False  # which half of the one tensor is the gate

    def _halves(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """(gate, value)."""
        first, second = x if len(x) == 2 else x[0].chunk(2, dim=-1)
        return (second, first) if self.gate_last else (first, second)

    def forward(
        self, x: Tensors, own: Optional, asked: StageNeeds, place: Placement = FREE
    ) -> StageRun:
        """g of gate and value."""
        gate, value = self._halves(x)
        act, out = ACTIVATIONS[self.name][0](gate, None), place.out
        return StageRun((act.mul_(value) if out is None else torch.mul(act, value, out=out),))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
        epilogue: GradEpilogue = PLAIN,
    ) -> StageGrads:
        """dgate = act'(gate) value dg and dvalue = act(gate) dg, laid out as x is."""
        assert x is not None
        gate, value = self._halves(x)
        du = tuple(torch.empty_like(part) for part in x)
        dgate, dvalue = self._halves(du)
        act, act_backward = ACTIVATIONS[self.name]
        torch.mul(act(gate, None), dy[0], out=dvalue)
        dgate.copy_(act_backward(dy[0] * value, gate))
        return StageGrads(du, ())

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gate, value = self._halves(x)
        return (COMPOSED[self.name](gate) * value,)

    def places(self, x: Tensors) -> bool:
        """The product does."""
        return True


# Self-attention of packed q|k|v as a stage, so that a chain can let go of q, k and v.
#
# out = softmax(q kT scale) v per head. The forward's own output and log-sum-exp are handed to the
# backward kernel where torch takes a fused one; elsewhere (its plain form, heads that it pads)
# backward runs scaled_dot_product_attention once more.


@dataclass(frozen=True)
class Attention(Stage):
    """out [M, H D] of qkv [M, 3 H D]; every sample has ``tokens`` rows."""

    heads: int  # H
    tokens: int  # T, rows of one sample
    kernel: kernels.Key | None = None  # torch's own choice, where its backward is known

    packs = True

    def forward(
        self, x: Tensors, own: Optional, asked: StageNeeds, place: Placement = FREE
    ) -> StageRun:
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
        asked: StageNeeds,
        epilogue: GradEpilogue = PLAIN,
    ) -> StageGrads:
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
        lies = [part.transpose(1, 2).is_contiguous() for part in dqkv]
        if (before := epilogue.previous) and all(lies):
            whole = packed_gradients([_rows(part) for part in dqkv], before)
            return StageGrads((whole,), (), formed=FormedGrads(before.b_grads, before.dh))
        return StageGrads((packed(dqkv).flatten(0, 1),), ())

    def forms(self, previous: Previous, dy: Tensors) -> bool:
        """As the kernel does that packs dq, dk and dv."""
        return why_not_packed(previous, dy[0]) is None

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


# LayerNorm as a stage: n = (x - mean) rstd gamma + beta over the last dimension.
#
# Triton's kernel writes n, in whatever dtype the next product reads, into the left of [n | h] where
# that is one GEMM's operand, and dx, with the gradient that passed by, in x's dtype. Another of its
# kernels forms h as well, where the product reads one. The library's writes a tensor of its own:
# torch's ``native_layer_norm.out`` makes that too and copies, so nothing is asked of it.


@dataclass(frozen=True)
class LayerNorm(Stage):
    """Owns (gamma, beta), either None. x may be wider than ``dtype``, in which n comes out."""

    eps: float
    dtype: torch.dtype
    operands = 2

    def forward(
        self, x: Tensors, own: Optional, asked: StageNeeds, place: Placement = FREE
    ) -> StageRun:
        """n [M, K] of x [M, K]."""
        gamma, beta = own
        if place.makes and place.makes.adapters:
            n = torch.empty_like(x[0], dtype=self.dtype) if place.out is None else place.out
            norm = (x[0], gamma, beta, self.eps)
            made = elementwise.layer_norm_shrink(*norm, place.makes.adapters, n, place.makes.right)
            return StageRun((made.x,), made.statistics, h=made.h)
        out = self._as(x[0], self.dtype) if place.out is None else place.out
        n, mean, rstd = elementwise.layer_norm_forward(x[0], gamma, beta, self.eps, out)
        return StageRun((n.to(self.dtype),), (mean, rstd))

    def backward(
        self,
        dy: Tensors,
        x: Tensors | None,
        run: StageRun,
        own: Optional,
        asked: StageNeeds,
        epilogue: GradEpilogue = PLAIN,
    ) -> StageGrads:
        """dx [M, K] in x's dtype, with what passed by added and rounded once; of gamma and beta."""
        assert x is not None
        gamma, beta = own
        mean, rstd = run.extra
        assert mean is not None and rstd is not None
        if not any(asked.own):
            out = self._as(dy[0], x[0].dtype)
            given = (x[0], gamma, mean, rstd)
            if epilogue.low_rank:
                out = torch.empty_like(x[0]) if out is None else out
                beside = (epilogue.low_rank, epilogue.residual_grad, out)
                dx = elementwise.layer_norm_expand(dy[0], *given, *beside)
            else:
                dz = dy[0].to(x[0].dtype) if out is None else dy[0]
                dx = elementwise.layer_norm_input_grad(dz, *given, epilogue.residual_grad, out)
            return StageGrads((dx,), (None, None))
        needs = (asked.x, *asked.own)
        wide, *down = elementwise.layer_norm_grads(dy[0], x[0], gamma, beta, mean, rstd, needs)
        return StageGrads(None if wide is None else (wide.to(x[0].dtype),), tuple(down))

    def input_norm(self, run: StageRun, own: Optional) -> InputNorm | None:
        """From the statistics that forward left."""
        mean, rstd = run.extra
        assert mean is not None and rstd is not None
        return InputNorm(mean, rstd, *own)

    def expands(self, x: Tensors, own: Optional, asked: StageNeeds, rank: int) -> bool:
        """As a kernel of dx alone does."""
        gamma, _ = own
        given = ("expand_norm", x[0], self.dtype, rank, gamma)
        return not any(asked.own) and elementwise.why_not_expand(*given) is None

    def joins(self, asked: StageNeeds) -> bool:
        """The kernel of dx alone does."""
        return not any(asked.own)

    def compose(self, x: Tensors, own: Optional) -> Tensors:
        """As torch has it."""
        gamma, beta = own
        return (F.layer_norm(x[0], x[0].shape[1:], gamma, beta, self.eps),)

    def _as(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Where the kernel writes rows like these in ``dtype``, if a pass to cast is saved so."""
        casts = like.dtype is not dtype and elementwise.layer_norm_places(like)
        return torch.empty_like(like, dtype=dtype) if casts else None

    def places(self, x: Tensors) -> bool:
        """As the kernel does."""
        return elementwise.layer_norm_places(x[0])

    def shrinks(self, x: Tensors, own: Optional, adapters: Adapters) -> bool:
        """As a kernel does."""
        return (
            elementwise.why_not_shrink("shrink_norm", x[0], self.dtype, adapters.rank, *own) is None
        )
