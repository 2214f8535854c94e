"""One weight and all of its adapters by the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.cuda.lora_merge import lora_merge
from fused_lora.kernels.interface import Adapters


def merged(w: Tensor, adapters: Adapters, noise: tuple[int, int] | None = None) -> Tensor:
    """w' [N, K], a new tensor, rounded to nearest or stochastically by (seed, step)."""
    a, b, scales, spans = adapters
    out = w.clone(memory_format=torch.contiguous_format)
    blocks = [out[span.start : span.stop] for span in spans]
    offsets = [span.start * w.shape[1] for span in spans]
    rounding, words = ("nearest", (0, 0)) if noise is None else ("stochastic", noise)
    lora_merge(blocks, blocks, a, b, scales, rounding, *words, offsets)
    return out
