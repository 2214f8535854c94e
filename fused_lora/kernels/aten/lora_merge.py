"""w' = w + s b a by a library GEMM: formed in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.kernels.gemm import accumulate
from fused_lora.reference.philox import stochastic_round
from fused_lora.types import Span


def lora_merge(
    w: Tensor,  # [N, K]
    a: Sequence[Tensor],  # G of [R_g, K], any strides, any float dtype
    b: Sequence[Tensor],  # G of [N_g, R_g], any strides, any float dtype
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
    noise: tuple[int, int] | None = None,  # (seed, step) of stochastic rounding
) -> Tensor:
    """w' [N, K], a new tensor in w's dtype, rounded to nearest unless ``noise`` is given."""
    wide = torch.promote_types(w.dtype, torch.float32)
    if w.dtype is wide and spans[0].width == w.shape[0]:  # one pass over w instead of two
        return torch.addmm(w, b[0].to(wide), a[0].to(wide), alpha=scales[0])
    merged = w.to(wide, copy=True)
    for a_g, b_g, s_g, span in zip(a, b, scales, spans, strict=True):
        accumulate(merged[span.start : span.stop], b_g.to(wide), a_g.to(wide), s_g)
    return merged.to(w.dtype) if noise is None else stochastic_round(merged, w.dtype, *noise)
