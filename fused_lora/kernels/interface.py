"""What every backend is given and hands back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.reference.lora_linear import Grads
from fused_lora.types import Span

__all__ = [
    "ActivationGrad",
    "Adapters",
    "Epilogue",
    "Grads",
    "HiddenGrad",
    "InputNorm",
    "LowRank",
    "PreviousLinear",
]


class Epilogue(NamedTuple):
    """What follows a product before its one rounding: u = product, y = residual + factor act(u)."""

    activation: str = "none"  # or GELU: erf, tanh
    factor: Tensor | None = None  # [N]: LayerScale
    residual: Tensor | None = None  # [M, N], maybe wider than u; y has the wider dtype
    stores_u: bool = True  # or may leave it out: nobody reads it

    def kernel(self, product: str, dtype: torch.dtype) -> str:
        """Which launch of kernels/triton/launches.py ends so behind a ``product`` of ``dtype``.

        ``product``: extended or one_pass.
        """
        if self.activation != "none":
            return f"{product}_gelu"
        same = all(t is None or t.dtype is dtype for t in (self.factor, self.residual))
        return f"{product}_scale" if same else f"{product}_wide"


class ActivationGrad(NamedTuple):
    """What dx goes on through where x = act(u): du = act'(u) dx, dx itself not written."""

    activation: str  # GELU: erf, tanh
    u: Tensor  # [M, K], rows contiguous
    previous: PreviousLinear | None = None  # where its db is formed in the same pass, and da


class PreviousLinear(NamedTuple):
    """The linear that made u, as its db = s duT h is formed where du is."""

    h: Tensor  # [M, sum R], that it kept
    adapters: Adapters
    b_grads: Sequence[Tensor | None] = ()  # where db goes, each in its own dtype
    dh: Tensor | None = None  # [M, sum R], where dh of its own dy = du goes, if that is formed too


class InputNorm(NamedTuple):
    """What makes x of the z that is given in its place: x = (z - mean) rstd gamma + beta."""

    mean: Tensor  # [M], fp32
    rstd: Tensor  # [M], fp32
    gamma: Tensor | None  # [K], contiguous
    beta: Tensor | None  # [K], contiguous


class HiddenGrad(NamedTuple):
    """dh that is there before dx is formed."""

    dh: Tensor  # [M, sum R], rows contiguous
    bordered: Tensor | None = None  # [M, N + sum R], where it is the right of [dy | dh]


class LowRank(NamedTuple):
    """What adapters add to a product and leave to whoever reads it next: dh a, or s h bT."""

    hidden: Tensor  # [M, sum R], dh or h, rows contiguous
    adapters: Adapters


class Adapters(NamedTuple):
    """The trained operands of one call, and where they act."""

    a: Sequence[Tensor]  # G of [R_g, K], any strides, any float dtype
    b: Sequence[Tensor]  # G of [N_g, R_g], likewise
    scales: Sequence[float]  # G
    spans: Sequence[Span]  # G

    def to(self, dtype: torch.dtype) -> Adapters:
        """The same adapters in the compute dtype."""
        if all(half.dtype is dtype for halves in (self.a, self.b) for half in halves):
            return self
        a = [a_g.to(dtype) for a_g in self.a]
        return self._replace(a=a, b=[b_g.to(dtype) for b_g in self.b])

    def uniform(self, dtypes: Sequence[torch.dtype]) -> Adapters:
        """The same, in fp32 unless all a and b have one of ``dtypes``, the same one."""
        found = {half.dtype for halves in (self.a, self.b) for half in halves}
        return self if len(found) == 1 and found <= set(dtypes) else self.to(torch.float32)

    def ranks(self) -> Iterator[tuple[int, slice, slice]]:
        """Per adapter: its index, its columns of y, its columns of the stacked h."""
        first = 0
        for g, span in enumerate(self.spans):
            yield g, slice(span.start, span.stop), slice(first, first + span.rank)
            first += span.rank

    @property
    def rank(self) -> int:
        """Stacked rank."""
        return sum(span.rank for span in self.spans)

    def widest_a(self) -> torch.dtype:
        """The dtype that holds every a exactly."""
        return reduce(torch.promote_types, (a_g.dtype for a_g in self.a))

    def stacked_a(self) -> Tensor:
        """All a, [sum R, K]."""
        return self.a[0] if len(self.a) == 1 else torch.cat(tuple(self.a))
