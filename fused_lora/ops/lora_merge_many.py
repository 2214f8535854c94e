"""lora_merge_many: w' = w + s b a of many layers, in one launch where a kernel serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.cuda.merged import merged_together as compiled
from fused_lora.kernels.interface import Adapters
from fused_lora.ops.lora_merge import check_rounding, lora_merge
from fused_lora.ops.lora_merge_backends import server_of_many, triton_many
from fused_lora.types import Span


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
        return {"cuda": compiled, "triton": triton_many}[by](weights, adapters, noise)
