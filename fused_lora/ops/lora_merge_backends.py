"""Who merges: the kernels that are not a library's, each with why it may not serve."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.launches import Launch, tile_of
from fused_lora.trust.check import NotNow
from fused_lora.trust.moment import untouchable
from fused_lora.trust.subjects import Checked, of_compiled_merge, of_launch
from fused_lora.trust.verify import verdict

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
    return reason or untouchable(w) or _distrust(_checked(w, adapters, by), w.device)


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


def _distrust(checked: Checked, device: torch.device) -> str | None:
    try:
        found = verdict(checked, device)
    except NotNow as reason:
        return f"it is not checked yet, and {reason}"
    return None if found.passed else str(found)
