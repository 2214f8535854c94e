"""What a wrong kernel makes of one problem: each fault alone, in the place of the right result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fused_lora.verify.check import Named, Operands, equations

Run = Callable[[Operands], Named]


def right(p: Operands) -> Named:
    """Every result in the dtype of x."""
    return equations(p.to(p.x.dtype))


def elements(size: float) -> Run:
    """One element in a thousand, at least one, off by ``size`` root mean squares of all."""

    def off(t: Tensor) -> Tensor:
        wrong = t.clone().flatten()
        at = torch.randperm(t.numel(), generator=torch.Generator().manual_seed(3))
        at = at[: max(1, t.numel() // 1000)].to(t.device)
        wrong[at] += (size * t.double().square().mean().sqrt()).to(t.dtype)
        return wrong.view_as(t)

    return lambda p: {name: off(t) for name, t in right(p).items()}


def _adapted(change: Callable[[Operands], Operands]) -> Run:
    """What the equations make of adapters that were read wrongly."""
    return lambda p: right(change(p))


def _without_scales(p: Operands) -> Operands:
    return replace(p, adapters=p.adapters._replace(scales=[1.0] * len(p.adapters.scales)))


def _a_rank_is_dropped(p: Operands) -> Operands:
    a, b = ([t.clone() for t in half] for half in (p.adapters.a, p.adapters.b))
    a[0][-1], b[0][:, -1] = 0.0, 0.0
    return replace(p, adapters=p.adapters._replace(a=a, b=b))


def _a_is_read_by_columns(p: Operands) -> Operands:
    a = [t.contiguous().view(t.shape[1], t.shape[0]).t() for t in p.adapters.a]
    return replace(p, adapters=p.adapters._replace(a=a))


def _b_is_read_by_columns(p: Operands) -> Operands:
    b = [t.contiguous().view(t.shape[1], t.shape[0]).t() for t in p.adapters.b]
    return replace(p, adapters=p.adapters._replace(b=b))


FAINT = "one element in a thousand off by a hundredth"
# Each with the results that it changes.
MUTANTS: dict[str, tuple[Run, tuple[str, ...]]] = {
    FAINT: (
        elements(1e-2),
        ("h", "dh", "y", "dx", "da", "db", "w'"),
    ),
    "a missing scale": (
        _adapted(_without_scales),
        ("dh", "y", "dx", "da", "db", "w'"),
    ),
    "a dropped rank": (_adapted(_a_rank_is_dropped), ("h", "dh", "y", "dx", "da", "db", "w'")),
    "a transposed a": (_adapted(_a_is_read_by_columns), ("h", "y", "dx", "db", "w'")),
    "a transposed b": (_adapted(_b_is_read_by_columns), ("dh", "y", "dx", "da", "w'")),
}
