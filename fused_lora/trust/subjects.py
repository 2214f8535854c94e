"""Everything that is checked, each with what it takes to check it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fused_lora.kernels.cuda.merged import merged as compiled_merge
from fused_lora.kernels.triton.launches import Launch
from fused_lora.testing.yardstick import Verdict as Comparison
from fused_lora.trust import triton_checks, triton_partners
from fused_lora.trust.check import check, compare
from fused_lora.trust.equations import Named, equations
from fused_lora.trust.problems import Operands, problems
from fused_lora.trust.rounding import NOISE, stochastic
from fused_lora.trust.verdict import Subject, Verdict

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TF32_BAND = 2.0**-10  # a library may form a small product in full precision where ours may round


@dataclass(frozen=True)
class Checked:
    """A subject and what it takes to check it."""

    subject: Subject
    run: Callable[[Operands], Named]  # every result by name
    noisy: Callable[[Operands], Tensor] | None = None  # w' of stochastic rounding
    aligned: bool = False  # rows of whole 16 bytes alone
    width: int = 0  # of blocks of whole rows

    def check(self, device: torch.device) -> Verdict:
        """The verdict of ``device``, found now."""
        return check(self._comparisons, DTYPES[self.subject.dtype], device)

    def _comparisons(self, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison | str]:
        band = TF32_BAND if self.subject.dtype == "tf32" else None
        kernel = self.subject.kernel
        for p in problems(dtype, device, self.aligned, self.width):
            plain, truth = (equations(p.to(kind), kernel) for kind in (dtype, torch.float64))
            yield from compare(partial(self.run, p), plain, truth, dtype, band)
            if self.noisy and dtype is not torch.float32:
                yield from stochastic(p, self.noisy)


def of_launch(launch: Launch, dtype: str) -> Checked:
    """A Triton kernel in one tile."""
    subject = Subject("triton", launch.kernel, launch.configuration, dtype)
    merged = {"merge": triton_checks.merged, "merge_many": triton_partners.merged}
    draws = merged.get(launch.kernel)
    noisy = None if draws is None else partial(draws, tile=launch.tile, noise=NOISE)
    return Checked(subject, partial(triton_checks.run, launch), noisy, launch.bulk, launch.width)


def of_compiled_merge(dtype: str) -> Checked:
    """The compiled kernel for weights of ``dtype``."""

    def merged(p: Operands, noise: tuple[int, int] | None = None) -> Tensor:
        return compiled_merge(p.w, p.adapters, noise)

    subject = Subject("cuda", "lora_merge", "any", dtype)
    return Checked(subject, lambda p: {"w'": merged(p)}, partial(merged, noise=NOISE))
