"""w' = w + s b a, rounded once.

w [N, K]   a [R, K]   b [N, R]   w' [N, K]
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.reference.philox import stochastic_round


def merge(
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    *,
    dtype: torch.dtype | None = None,
    offset: int = 0,
) -> Tensor:
    """The merged weight in ``dtype`` (default: w's); sums are fp32, or float64 if anything is.

    Args:
        w: frozen weight, [N, K].
        a: [R, K].
        b: [N, R].
        scale: s.
        rounding: ``nearest``, or ``stochastic`` to bfloat16 or float16.
        seed: of the random bits, with ``step``.
        step: a different number gives different bits.
        dtype: of the result.
        offset: random index of element (0, 0); element (n, k) has ``offset + n K + k``.

    Raises:
        ValueError: ``rounding`` is unknown, or stochastic and the result has nothing to round.
    """
    wide = torch.float64 if torch.float64 in {w.dtype, a.dtype, b.dtype} else torch.float32
    merged = w.to(wide) + scale * (b.to(wide) @ a.to(wide))
    dtype = dtype or w.dtype
    if rounding == "nearest":
        return merged.to(dtype)
    if rounding == "stochastic":
        return stochastic_round(merged, dtype, seed, step, offset)
    raise ValueError(f"rounding is 'nearest' or 'stochastic', got {rounding!r}")
