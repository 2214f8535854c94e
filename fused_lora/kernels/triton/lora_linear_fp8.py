"""LoRA linear on a base in FP8 from this room's kernels: shrink, quantise, EXTENDED on the codes.

The face and its meaning are those of ``fused_lora.kernels.aten.lora_linear_fp8``.
"""

from __future__ import annotations

from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_extended_fp8
from fused_lora.kernels.triton.launches import tile_of
from fused_lora.kernels.triton.lora_linear import rows, shrink, uniform
from fused_lora.kernels.triton.quantise import quantise
from fused_lora.reference.lora_linear_fp8 import Quantised


def forward_fp8(
    x: Tensor,  # [M, K], bf16 or fp16
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, sum R], in x's dtype."""
    adapters = uniform(adapters)
    x, bias = rows(x), None if bias is None else bias.contiguous()
    w = Quantised(rows(w.codes), w.scales.contiguous())
    m, (n, k) = x.shape[0], w.codes.shape
    h = shrink(x, adapters)
    x8 = quantise(x, tile_of("quantise", m, k, 0, x.dtype, x.device))
    tile = tile_of("extended_fp8", m, n, k, x.dtype, x.device)
    y = lora_extended_fp8.forward_extended_fp8(x8, w, bias, adapters, h, tile)
    return y, h
