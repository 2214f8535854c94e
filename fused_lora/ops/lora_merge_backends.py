"""Who merges: the kernels that are not a library's, each with why it may not serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.launches import Launch, tile_of
from fused_lora.ops.backends import distrust, why_not_launch
from fused_lora.trust.kernel_registry import Checked, of_compiled_merge, of_launch
from fused_lora.trust.verify import why_not_concrete

SERVED = (torch.float32, torch.bfloat16, torch.float16)
Noise = tuple[int, int] | None  # seed and step of stochastic rounding
INT32 = 1 << 31


def server(w: Tensor, adapters: Adapters, impl: str) -> str:
    """ "cuda", "triton" or "aten", as ``impl`` says or, for auto, the first that serves.

    Raises:
        RuntimeError: ``impl`` cannot serve, with the reason.
    """
    if impl == "auto":
        others = ("cuda", "triton") if w.is_cuda else ()
        return next((by for by in others if why_not(w, adapters, by) is None), "aten")
    if reason := why_not(w, adapters, impl):
        raise RuntimeError(f"impl={impl!r} cannot serve: {reason}")
    return impl


def why_not(w: Tensor, adapters: Adapters, by: str) -> str | None:
    """One sentence why ``by`` cannot merge these operands; None when it can."""
    reason = _compiled(w, adapters) if by == "cuda" else _triton(w, adapters)
    return reason or why_not_concrete(w) or distrust(_checked(w, adapters, by), w.device)


def server_of_many(weights: Sequence[Tensor], adapters: Sequence[Adapters], impl: str) -> str:
    """As ``server``, of who merges all of them in one launch; they are of one device and dtype.

    Raises:
        RuntimeError: ``impl`` cannot serve, with the reason.
    """
    if len(weights) == 1:
        return server(weights[0], adapters[0], impl)
    if impl == "auto":
        others = ("cuda", "triton") if weights[0].is_cuda else ()
        serving = (by for by in others if why_not_many(weights, adapters, by) is None)
        return next(serving, "aten")
    if reason := why_not_many(weights, adapters, impl):
        raise RuntimeError(f"impl={impl!r} cannot serve: {reason}")
    return impl


def why_not_many(weights: Sequence[Tensor], adapters: Sequence[Adapters], by: str) -> str | None:
    """One sentence why ``by`` cannot merge all of these in one launch; None when it can."""
    own = _compiled if by == "cuda" else _triton
    for w, group in zip(weights, adapters, strict=True):
        if reason := own(w, group) or why_not_concrete(w):
            return reason
    first = weights[0]
    if by == "cuda":
        return distrust(_checked(first, adapters[0], by), first.device)
    n, k = first.shape
    return why_not_launch("merge_many", n, k, adapters[0].rank, first)


def triton_many(
    weights: Sequence[Tensor], adapters: Sequence[Adapters], noise: Noise
) -> list[Tensor]:
    """Every w' by Triton's kernel, in one launch."""
    from fused_lora.kernels.triton.lora_linear import rows, uniform
    from fused_lora.kernels.triton.merged import merged_together

    return merged_together([rows(w) for w in weights], [uniform(a) for a in adapters], noise)


def triton(w: Tensor, adapters: Adapters, noise: Noise) -> Tensor:
    """w' by Triton's kernel."""
    from fused_lora.kernels.triton.lora_linear import merged

    return merged(w, adapters, noise)


def _compiled(w: Tensor, adapters: Adapters) -> str | None:
    if reason := native.why_not(w.device if w.is_cuda else None):
        return reason
    if not w.is_cuda:
        return f"w is on {w.device}"
    dtypes = {half.dtype for halves in (adapters.a, adapters.b) for half in halves}
    if w.dtype not in SERVED or len(dtypes) > 1 or not dtypes <= set(SERVED):
        return f"it takes w and one dtype of adapters out of {SERVED}, got {w.dtype} and {dtypes}"
    return None


def _triton(w: Tensor, adapters: Adapters) -> str | None:
    if adapters.rank * max(w.shape) >= INT32:
        return f"it counts in 32 bits, w is {tuple(w.shape)} and the ranks sum to {adapters.rank}"
    return available.why_not(w.device, w.dtype)


def _checked(w: Tensor, adapters: Adapters, by: str) -> Checked:
    key = str(w.dtype).removeprefix("torch.")
    if by == "cuda":
        return of_compiled_merge(key)
    tile = tile_of("merge", *w.shape, adapters.rank, w.dtype, w.device)
    return of_launch(Launch("merge", tile), key)
