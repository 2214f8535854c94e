"""What the compiled lora_merge makes of one problem."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_merge as cuda
from fused_lora.trust.problems import Operands


def merged(p: Operands, noise: tuple[int, int] | None = None) -> Tensor:
    """w', rounded to nearest or by ``noise``."""
    a, b, scales, spans = p.adapters
    out = p.w.clone(memory_format=torch.contiguous_format)
    blocks = [out[span.start : span.stop] for span in spans]
    offsets = [span.start * out.shape[1] for span in spans]
    rounding = "nearest" if noise is None else "stochastic"
    cuda.lora_merge(blocks, blocks, a, b, scales, rounding, *(noise or (0, 0)), offsets)
    return out
