"""DoRA (Liu et al. 2024): y = (m / |w + s b a|) (x w'T) + bias, one m per output.

w' = w + s b a, |.| the norm of each row; the norm takes no gradient (their section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.programs.run import without_autocast
from fused_lora.types import Span


def row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """|w + s b a| of each row, [N], without a second [N, K].

    |w|² + 2 s (w aT) . b + s² (b a aT) . b, in fp32 or wider.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    a, b = a.detach().to(wide), b.detach().to(wide)
    own = torch.linalg.vector_norm(w, dim=1, dtype=wide).square()
    cross = ((w @ a.to(w.dtype).t()).to(wide) * b).sum(1)
    low = (b @ (a @ a.t()) * b).sum(1)
    return (own + 2 * scale * cross + scale * scale * low).clamp_min(0).sqrt()


def output_factors(
    w: Tensor,  # [N, K]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float] | Tensor,  # G
    spans: Sequence[Span],  # G
    magnitudes: Sequence[Tensor],  # G of [N_g]
) -> Tensor:
    """m / |w + s b a|, [N]; 1 for columns that no adapter owns."""
    pieces, last = [], 0
    groups = zip(a, b, scales, spans, magnitudes, strict=True)
    for a_g, b_g, s, span, m in sorted(groups, key=lambda group: group[3].start):
        with torch.no_grad(), without_autocast(w.device):
            norm = row_norms(w[span.start : span.stop], a_g, b_g, s)
        pieces += [norm.new_ones(span.start - last), m / norm]
        last = span.stop
    return torch.cat([*pieces, pieces[-1].new_ones(w.shape[0] - last)])
