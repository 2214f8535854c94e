"""Stochastic rounding is checked bit by bit, on numbers whose sums are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fused_lora.reference.philox import stochastic_round
from fused_lora.trust.problems import Operands

NOISE = (2**63 + 5, 2**40 + 1)  # seed and step, with bits in all four words


def stochastic(p: Operands, merged: Callable[[Operands], Tensor]) -> Iterator[str]:
    """A complaint unless ``merged`` draws the reference's bits wherever an adapter acts."""
    exact = _exact(p)
    sums, acts = p.w.double(), torch.zeros(len(p.w), dtype=torch.bool, device=p.w.device)
    for a_g, b_g, s_g, span in zip(*exact.adapters, strict=True):
        sums[span.start : span.stop] += s_g * (b_g.double() @ a_g.double())
        acts[span.start : span.stop] = True
    truth = stochastic_round(sums.float(), p.w.dtype, *NOISE)
    if not torch.equal(merged(exact)[acts], truth[acts]):
        yield "stochastic rounding does not draw the reference's bits"


def _exact(p: Operands) -> Operands:
    """The same problem with a and b in eighths: their products sum exactly in fp32."""
    a, b = ([(4 * t).round() / 8 for t in half] for half in (p.adapters.a, p.adapters.b))
    return replace(p, adapters=p.adapters._replace(a=a, b=b))
