"""lora_merge: w' = w + s b a, formed in fp32 and rounded once, w itself untouched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.kernels.aten.lora_merge import lora_merge as aten_merge
from fused_lora.kernels.cuda.merged import merged as compiled
from fused_lora.kernels.interface import Adapters
from fused_lora.ops.lora_merge_backends import server, triton
from fused_lora.programs.run import without_autocast
from fused_lora.reference.lora_merge import merge as reference_merge
from fused_lora.types import Span

IMPLS = ("auto", "aten", "reference", "triton", "cuda")
ROUNDINGS = ("nearest", "stochastic")


def lora_merge(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[Span],
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    *,
    impl: str = "auto",
) -> Tensor:
    """w' [N, K] in w's dtype.

    Args:
        w: [N, K].
        a: G tensors [R_g, K].
        b: G tensors [N_g, R_g].
        scales: G factors.
        spans: the rows of w each adapter acts on; other rows are copied.
        rounding: "nearest", or "stochastic": up with the probability of the part cut off,
            so that the mean is exact (DESIGN.md section 3); for bfloat16 and float16.
        seed: key of the counter-based generator (Philox4x32-10, Salmon et al. 2011).
        step: another draw with the same seed.
        impl: "auto" takes the first of the compiled kernel ("cuda"), Triton's ("triton") and
            library GEMMs ("aten") that this device has found right.

    Raises:
        ValueError: an unknown ``rounding`` or ``impl``, or stochastic rounding to a wide dtype.
        RuntimeError: ``impl`` names a kernel that cannot serve, with the reason.
    """
    check_rounding(rounding, w.dtype, impl)
    adapters = Adapters(a, b, scales, spans)
    noise = (seed, step) if rounding == "stochastic" else None
    by = impl if impl in ("aten", "reference") else server(w, adapters, impl)
    if by == "reference":
        with without_autocast(w.device):
            return _reference(w, adapters, rounding, seed, step)
    if by == "aten":
        return aten_merge(w, a, b, scales, spans, noise)
    return {"cuda": compiled, "triton": triton}[by](w.detach(), adapters, noise)


def check_rounding(rounding: str, dtype: torch.dtype, impl: str) -> None:
    """Raises ValueError for words that ``lora_merge`` does not know, or a dtype too wide."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if rounding == "stochastic" and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"stochastic rounding serves bfloat16 and float16 weights, not {dtype}")


def _reference(w: Tensor, adapters: Adapters, rounding: str, seed: int, step: int) -> Tensor:
    merged = w.detach().clone()
    for a_g, b_g, s_g, span in zip(*adapters, strict=True):
        rows = slice(span.start, span.stop)
        offset = span.start * w.shape[1]
        merged[rows] = reference_merge(w[rows], a_g, b_g, s_g, rounding, seed, step, offset=offset)
    return merged
