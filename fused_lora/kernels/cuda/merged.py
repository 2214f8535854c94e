"""Weights, each with all of its adapters, by the compiled kernel in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.kernels.cuda.lora_merge import lora_merge
from fused_lora.kernels.interface import Adapters


def merged(w: Tensor, adapters: Adapters, noise: tuple[int, int] | None = None) -> Tensor:
    """w' [N, K], a new tensor, rounded to nearest or stochastically by (seed, step)."""
    (out,) = merged_together([w], [adapters], noise)
    return out


def merged_together(
    weights: Sequence[Tensor],  # [N, K] each, one dtype
    adapters: Sequence[Adapters],  # of each, all of one dtype
    noise: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Every w', likewise."""
    made = [w.clone(memory_format=torch.contiguous_format) for w in weights]
    pairs = [(out, span) for out, group in zip(made, adapters, strict=True) for span in group.spans]
    blocks = [out[span.start : span.stop] for out, span in pairs]
    offsets = [span.start * out.shape[1] for out, span in pairs]
    a, b, scales = ([t for group in adapters for t in group[i]] for i in range(3))
    rounding, words = ("nearest", (0, 0)) if noise is None else ("stochastic", noise)
    lora_merge(blocks, blocks, a, b, scales, rounding, *words, offsets)  # type: ignore[arg-type]
    return made
