"""GELU and LayerNorm of rows and their gradients, by the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# GELU and its derivative by the library, with the face of the Triton kernel's: erf or tanh.
#
# torch 2.15's erf form on CPUs leaves a strided ``out`` unwritten in fp32 and bf16, without a word;
# there the result is copied, which also takes half the time of the kernel that would write it.


APPROXIMATE = {"erf": "none", "tanh": "tanh"}


def gelu_places(u: Tensor, kind: str = "erf") -> bool:
    """Whether ``out`` costs nothing beside a new tensor."""
    return not u.is_cpu or kind == "tanh"


def gelu_forward(u: Tensor, kind: str = "erf", out: Tensor | None = None) -> Tensor:
    """GELU(u) [M, N]; ``out`` may be the left of a bordered buffer. Rows are contiguous."""
    approximate = APPROXIMATE[kind]
    if out is None:
        return torch.ops.aten.gelu(u, approximate=approximate)
    if not gelu_places(u, kind):
        return out.copy_(torch.ops.aten.gelu(u, approximate=approximate))
    return torch.ops.aten.gelu(u, approximate=approximate, out=out)


def gelu_input_grad(dy: Tensor, u: Tensor, kind: str = "erf", out: Tensor | None = None) -> Tensor:
    """du = GELU'(u) dy [M, N], likewise."""
    approximate = APPROXIMATE[kind]
    if out is None:
        return torch.ops.aten.gelu_backward(dy, u, approximate=approximate)
    return torch.ops.aten.gelu_backward(dy, u, approximate=approximate, grad_input=out)


# LayerNorm over the last dimension by the library, with the face of the Triton kernel's.
#
#     x^ = (x - mean) rstd     y = x^ weight + bias     rstd = (variance + eps)^-1/2, of each row
#     g = dy weight            dx = rstd (g - average(g) - x^ average(g x^)) + residual
#
#                 x, y, dy, dx [M, D]   weight, bias [D]   mean, rstd [M]
#
# The library has no LayerNorm that writes where it is told: ``out`` costs a pass over y.


class Normed(NamedTuple):
    """What one forward hands back."""

    y: Tensor  # [M, D]
    mean: Tensor  # [M], in the dtype that the library's backward takes
    rstd: Tensor  # [M], likewise


def layer_norm_places(x: Tensor) -> bool:
    """Whether ``out`` costs nothing beside a new tensor."""
    return False


def layer_norm_forward(
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D], any float dtype
    bias: Tensor | None,  # likewise
    eps: float,
    out: Tensor | None = None,  # [M, D], any float dtype
) -> Normed:
    """LayerNorm of each row, in x's dtype or ``out``'s, and its statistics."""
    wide, weight, bias = _alike(x, weight, bias)
    y, mean, rstd = torch.native_layer_norm(wide, wide.shape[1:], weight, bias, eps)
    y = y.to(x.dtype) if out is None else out.copy_(y)
    return Normed(y, mean.view(-1), rstd.view(-1))


def layer_norm_rebuild(
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D], any float dtype
    bias: Tensor | None,  # likewise
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    out: Tensor | None = None,  # [M, D], any float dtype
) -> Tensor:
    """What ``forward`` made of x, from its statistics; rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(dtype) - mean[:, None]).mul_(rstd[:, None])
    y = y if weight is None else y.mul_(weight)
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype) if out is None else out.copy_(y)


def layer_norm_input_grad(
    dy: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D]
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    residual: Tensor | None = None,  # [M, D]; added
    out: Tensor | None = None,  # [M, D], any float dtype
) -> Tensor:
    """dx, in dy's dtype or ``out``'s."""
    dx, _, _ = layer_norm_grads(dy, x, weight, None, mean, rstd, (True, False, False))
    assert dx is not None
    dx = dx if residual is None else dx.add_(residual)
    return dx.to(dy.dtype) if out is None else out.copy_(dx)


def layer_norm_grads(
    dy: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    needs: Sequence[bool],  # of x, weight and bias
) -> list[Tensor | None]:
    """dx in the wider dtype of dy and x, dweight and dbias in those of weight and bias."""
    dtype = torch.promote_types(dy.dtype, x.dtype)
    wide, *vectors = _alike(x.to(dtype), weight, bias)
    statistics = (mean[:, None], rstd[:, None])
    dx, *down = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide.dtype), wide, wide.shape[1:], *statistics, *vectors, list(needs)
    )
    pairs = zip(down, (weight, bias), strict=True)
    own = [None if d is None or t is None else d.to(t.dtype) for d, t in pairs]
    return [None if dx is None else dx.to(dtype), *own]


def _alike(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three in one dtype; of a 16-bit x on a CPU, vectors and so statistics in fp32."""
    if x.is_cpu and x.dtype.itemsize == 2:
        weight = x.new_ones(x.shape[1]) if weight is None else weight
        return x, weight.float(), None if bias is None else bias.float()
    dtype = x.dtype
    for vector in (weight, bias):
        dtype = dtype if vector is None else torch.promote_types(dtype, vector.dtype)
    weight, bias = (None if vector is None else vector.to(dtype) for vector in (weight, bias))
    return x.to(dtype), weight, bias
