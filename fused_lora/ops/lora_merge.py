"""lora_merge: w' = w + s b a, of one weight or of many, who serves it; and w beside s b or a."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.arguments import one_of
from fused_lora.kernels.aten.lora_linear import lora_merge as aten_merge
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_merge import merged as cuda_merged
from fused_lora.kernels.cuda.lora_merge import merged_together as cuda_merged_together
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.launches import Launch, tile_of
from fused_lora.ops.backends import distrust, why_not_launch
from fused_lora.programs.run import without_autocast
from fused_lora.reference.lora_merge import merge as reference_merge
from fused_lora.types import Backend, Forward, Impl, Plan, Span
from fused_lora.verify.kernel_registry import Checked, of_compiled_merge, of_launch
from fused_lora.verify.verdicts import why_not_concrete

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
    from fused_lora.kernels.triton.lora_merge import merged_together

    return merged_together([rows(w) for w in weights], [uniform(a) for a in adapters], noise)


def triton(w: Tensor, adapters: Adapters, noise: Noise) -> Tensor:
    """w' by Triton's kernel."""
    from fused_lora.kernels.triton.lora_linear import merged

    return merged(w, adapters, noise)


def with_border(
    w: Tensor | None,  # [N, K], in the compute dtype
    adapters: Adapters,
    plan: Plan,
    impl: Impl,
    of_dx: bool = False,
) -> dict[str, Tensor]:
    """``wide`` as the library's BORDERED product is given it, made in one launch.

    [w | s b] of y, and of dx [w ; a]; nothing where there is no such product, or the library makes
    it: in float64, off a GPU, where it alone is asked for, or where the kernel is not trusted.
    """
    strategy = plan.dx if of_dx else plan.forward
    if plan.backend is not Backend.ATEN or strategy is not Forward.BORDERED or impl is Impl.ATEN:
        return {}
    assert w is not None
    n, k = w.shape
    if why_not_launch("border_weight", n, k, adapters.rank, w) is not None:
        return {}
    from fused_lora.kernels.triton import lora_merge as triton
    from fused_lora.kernels.triton.lora_linear import uniform

    make = triton.bordered_weight_rows if of_dx else triton.bordered_weight
    return {"wide": make(w, uniform(adapters))}


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
    return {"cuda": cuda_merged, "triton": triton}[by](w.detach(), adapters, noise)


def check_rounding(rounding: str, dtype: torch.dtype, impl: str) -> None:
    """Raises ValueError for words that ``lora_merge`` does not know, or a dtype too wide."""
    one_of("rounding", rounding, ROUNDINGS)
    one_of("impl", impl, IMPLS)
    if rounding == "stochastic" and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"stochastic rounding serves bfloat16 and float16 weights, not {dtype}")


def _reference(w: Tensor, adapters: Adapters, rounding: str, seed: int, step: int) -> Tensor:
    merged = w.detach().clone()
    for a_g, b_g, s_g, span in zip(*adapters, strict=True):
        rows = slice(span.start, span.stop)
        offset = span.start * w.shape[1]
        merged[rows] = reference_merge(w[rows], a_g, b_g, s_g, rounding, seed, step, offset=offset)
    return merged


class Job(NamedTuple):
    """The operands of one ``lora_merge``."""

    w: Tensor  # [N, K]
    a: Sequence[Tensor]  # G of [R_g, K]
    b: Sequence[Tensor]  # G of [N_g, R_g]
    scales: Sequence[float]  # G
    spans: Sequence[Span]  # G
    seed: int = 0  # of stochastic rounding

    @property
    def adapters(self) -> Adapters:
        """All but w."""
        return Adapters(self.a, self.b, self.scales, self.spans)


def lora_merge_many(
    jobs: Sequence[Job], rounding: str = "nearest", step: int = 0, *, impl: str = "auto"
) -> list[Tensor]:
    """Every w' [N, K], with the bits of one ``lora_merge`` each.

    Layers of one device and the same dtypes share a launch; by stochastic rounding, of one seed.

    Args:
        jobs: the layers.
        rounding: as in ``lora_merge``.
        step: likewise.
        impl: likewise; "auto" takes the first of the compiled kernel, Triton's and the library
            that serves every layer of a launch.

    Raises:
        ValueError: as ``lora_merge``.
        RuntimeError: ``impl`` names a kernel that cannot serve, with the reason.
    """
    done: dict[int, Tensor] = {}
    for together in _groups(jobs, rounding == "stochastic").values():
        group = [jobs[i] for i in together]
        done.update(zip(together, _merged(group, rounding, step, impl), strict=True))
    return [done[i] for i in range(len(jobs))]


def _groups(jobs: Sequence[Job], seeded: bool) -> dict[tuple[object, ...], list[int]]:
    """The indices of the jobs of each launch."""
    found: dict[tuple[object, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        dtypes = (frozenset(t.dtype for t in half) for half in (job.a, job.b))
        key = (job.w.device, job.w.dtype, *dtypes, job.seed if seeded else 0)
        found.setdefault(key, []).append(i)
    return found


def _merged(group: Sequence[Job], rounding: str, step: int, impl: str) -> list[Tensor]:
    first = group[0]
    check_rounding(rounding, first.w.dtype, impl)
    weights, adapters = [job.w for job in group], [job.adapters for job in group]
    by = impl if impl in ("aten", "reference") else server_of_many(weights, adapters, impl)
    if by in ("aten", "reference") or len(group) == 1:
        alone = (rounding, first.seed, step) if rounding == "stochastic" else (rounding,)
        return [lora_merge(*job[:5], *alone, impl=by) for job in group]
    noise = (first.seed, step) if rounding == "stochastic" else None
    weights = [w.detach() for w in weights]
    with torch.no_grad():
        return {"cuda": cuda_merged_together, "triton": triton_many}[by](weights, adapters, noise)
