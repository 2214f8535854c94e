"""LoRA linear on a base in FP8, from library products.

    y = s_x s_w (x8 w8T) + bias + s h bT        x8, s_x of x row by row; h = x aT of x itself

``torch._scaled_mm`` forms the base product where the device has it by rows, in bf16: y is rounded
after it and again after the expand. Elsewhere the codes are widened, which is exact, and products,
scales, bias and expand meet in fp32, rounded once; a CPU is not fast at it. x is quantised by way
of an fp32 copy, freed before the product is formed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.kernels.aten.lora_linear import shrink
from fused_lora.kernels.gemm import accumulate, columns
from fused_lora.kernels.interface import Adapters
from fused_lora.reference.lora_linear_fp8 import CODES, Quantised, quantise

LEAST_CAPABILITY = (9, 0)  # of the library's product by rows
MULTIPLE = 16  # that K and N must be of


def forward_fp8(
    x: Tensor,  # [M, K], rows contiguous
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, sum R], in x's dtype."""
    low = adapters.to(x.dtype)
    h = shrink(x, low)
    y = _base(x, w)
    if bias is not None:
        y += bias
    wide = h.to(y.dtype)
    for g, cols, ranks in low.ranks():
        b = low.b[g].to(y.dtype).t()
        accumulate(columns(y, cols), columns(wide, ranks), b, low.scales[g])
    return y.to(x.dtype), h


def _base(x: Tensor, w: Quantised) -> Tensor:
    """x^ w^T [M, N]: in bf16 by rows of the library's, else in fp32 or wider."""
    x8 = quantise(x)
    if scales_rows(x, w.codes):
        return _by_rows(x8, w)
    y = _widened(x8.codes, w.codes, torch.promote_types(x.dtype, torch.float32))
    return y.mul_(x8.scales[:, None]).mul_(w.scales)


def _widened(x: Tensor, w: Tensor, wide: torch.dtype) -> Tensor:
    """x wT [M, N] in ``wide``: e4m3 lies in bf16 whole, and CUDA's products of it come in fp32."""
    if x.is_cuda and wide is torch.float32:
        return torch.mm(x.bfloat16(), w.bfloat16().t(), out_dtype=wide)
    return torch.mm(x.to(wide), w.to(wide).t())


def _by_rows(x: Quantised, w: Quantised) -> Tensor:
    scales = x.scales[:, None], w.scales[None, :]
    return torch._scaled_mm(x.codes, w.codes.t(), *scales, out_dtype=torch.bfloat16)


def scales_rows(x: Tensor, codes: Tensor) -> bool:
    """Whether the library has a product by rows for x [M, K] and codes [N, K]."""
    whole = codes.shape[0] % MULTIPLE == codes.shape[1] % MULTIPLE == 0
    if not (x.is_cuda and x.dtype is torch.bfloat16 and whole and x.numel() and codes.numel()):
        return False
    return torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY and _tried(x.device)


@lru_cache(maxsize=64)
def _tried(device: torch.device) -> bool:
    """Whether the least product of all runs on ``device``; versions of torch differ."""
    one = Quantised(
        torch.zeros(MULTIPLE, MULTIPLE, device=device).to(CODES),
        torch.ones(MULTIPLE, device=device),
    )
    try:
        _by_rows(one, one)
    except (RuntimeError, ValueError):
        return False
    return True
