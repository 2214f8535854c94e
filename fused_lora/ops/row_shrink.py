"""What makes x, and h of it, in one pass: by Triton's kernel where this device has found it right.

x = LayerNorm(z) or GELU(z)      h = x aT, [M, sum R]

There is no other server: where it cannot, x is made first and h by whoever reads x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.tiles import MOST_ROW_RANKS
from fused_lora.ops.backends import why_not_launch


class Made(NamedTuple):
    """x, h of it, and the statistics of a LayerNorm."""

    x: Tensor  # [M, C]
    h: Tensor  # [M, sum R]
    statistics: tuple[Tensor, ...] = ()  # mean and rstd [M], fp32


def why_not_shrink(
    kernel: str,  # shrink_norm or shrink_gelu
    z: Tensor,  # [M, C]
    dtype: torch.dtype,  # of x
    rank: int,  # sum R
    *vectors: Tensor | None,  # of a LayerNorm
) -> str | None:
    """One sentence why x and h of it are not made together; None when they are."""
    if dtype.itemsize != 2:
        return f"it forms h of 16-bit rows, not of {dtype}"
    if not 0 < rank <= MOST_ROW_RANKS:
        return f"it holds h of {MOST_ROW_RANKS} ranks in all, and they sum to {rank}"
    if z.stride(1) != 1 or z.dtype not in available.DTYPES:
        return f"it reads contiguous rows of 16 or 32 bits, got {z.dtype} {z.stride()}"
    for vector in vectors:
        if vector is not None and not (vector.dtype in available.DTYPES and vector.is_contiguous()):
            return f"it takes no vector of {vector.dtype} with strides {vector.stride()}"
    return why_not_launch(kernel, z.shape[0], rank, z.shape[1], z, dtype)


def layer_norm_shrink(
    z: Tensor,  # [M, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    adapters: Adapters,
    out: Tensor,  # [M, C], of 16 bits
    h: Tensor | None,  # [M, sum R], the right end of [x | h]
) -> Made:
    """LayerNorm of each row."""
    from fused_lora.kernels.triton import row_shrink
    from fused_lora.kernels.triton.lora_linear import uniform

    x, mean, rstd, h = row_shrink.layer_norm_shrink(z, weight, bias, eps, uniform(adapters), out, h)
    return Made(x, h, (mean, rstd))


def gelu_shrink(z: Tensor, kind: str, adapters: Adapters, out: Tensor, h: Tensor | None) -> Made:
    """GELU of each element."""
    from fused_lora.kernels.triton import row_shrink
    from fused_lora.kernels.triton.lora_linear import uniform

    return Made(*row_shrink.gelu_shrink(z, kind, uniform(adapters), out, h))
