"""Random adapted matrices, and the block operations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops.operand import Adapted, Norm
from fused_lora.types import Span

ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def matrix(
    n: int, k: int, rank: int, groups: int = 1, dtype: torch.dtype = torch.float64, **trains: bool
) -> Adapted:
    """An adapted [n, k], every operand a leaf; ``trains`` switches w, bias, a or b off."""
    width = n // groups
    spans = tuple(Span(g * width, (g + 1) * width, rank) for g in range(groups))

    def leaf(name: str, *shape: int) -> Tensor:
        value = (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)
        return value.requires_grad_(trains.get(name, True))

    a = [leaf("a", rank, k) for _ in spans]
    b = [leaf("b", width, rank) for _ in spans]
    return Adapted(leaf("w", n, k), leaf("bias", n), a, b, (0.5,) * groups, spans)


def norm(k: int, dtype: torch.dtype = torch.float64, trains: bool = True) -> Norm:
    """A LayerNorm that is not the identity."""
    gamma, beta = (torch.randn(k).to(dtype).requires_grad_(trains) for _ in range(2))
    return Norm(gamma, beta, 1e-6)


def plain_linear(x: Tensor, m: Adapted) -> Tensor:
    """lora_linear in plain torch."""
    y = F.linear(x, m.w, m.bias)
    pieces = [
        F.pad(s * F.linear(F.linear(x, a), b), (span.start, y.shape[-1] - span.stop))
        for a, b, s, span in zip(m.a, m.b, m.scales, m.columns(), strict=True)
    ]
    return y + sum(pieces)


def plain_norm(x: Tensor, n: Norm) -> Tensor:
    """LayerNorm in plain torch."""
    return F.layer_norm(x, x.shape[-1:], *n)


def plain_mlp(x: Tensor, fc1, fc2: Adapted, activation: str, gated: str | None) -> Tensor:
    """lora_mlp without norm and residual."""
    act = ACTS[activation]
    if isinstance(fc1, Adapted) and not gated:
        return plain_linear(act(plain_linear(x, fc1)), fc2)
    if isinstance(fc1, Adapted):
        first, second = plain_linear(x, fc1).chunk(2, -1)
        gate, value = (first, second) if gated == "first" else (second, first)
    else:
        gate, value = (plain_linear(x, part) for part in fc1)
    return plain_linear(act(gate) * value, fc2)


def plain_attention(x: Tensor, n: Norm, qkv: Adapted, proj: Adapted, heads: int) -> Tensor:
    """lora_attention without gamma and mask."""
    batch, tokens, _ = x.shape
    y = plain_linear(plain_norm(x, n), qkv).view(batch, tokens, 3, heads, -1)
    q, k, v = y.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return x + plain_linear(out.transpose(1, 2).reshape(batch, tokens, -1), proj)


def cast(t, dtype: torch.dtype):
    """Operands in ``dtype``, as leaves that ask for what the originals ask for."""
    if isinstance(t, Tensor):
        return t.detach().to(dtype).requires_grad_(t.requires_grad)
    if isinstance(t, Adapted):
        halves = ([cast(half, dtype) for half in side] for side in (t.a, t.b))
        return t._replace(
            w=cast(t.w, dtype), bias=cast(t.bias, dtype), **dict(zip("ab", halves, strict=True))
        )
    if isinstance(t, Norm):
        return Norm(cast(t.gamma, dtype), cast(t.beta, dtype), t.eps)
    return tuple(cast(part, dtype) for part in t)


def leaves(*operands) -> list[Tensor]:
    """Every tensor inside that asks for a gradient."""
    found: list[Tensor] = []
    for t in operands:
        if isinstance(t, Tensor):
            found += [t] if t.requires_grad else []
        elif isinstance(t, tuple | list):
            found += leaves(*t)
    return found
