"""FULL gradients: db = s dw aT and da = s bT dw, from dw = dyT x; library GEMMs in any backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.gemm import columns, dense, product
from fused_lora.kernels.interface import Adapters
from fused_lora.types import Needs


def full_grads(
    dy: Tensor,  # [M, N], rows contiguous
    x: Tensor | None,  # [M, K]; None where dw is given
    dw: Tensor | None,  # [N, K]; None where nobody formed it
    adapters: Adapters,
    low: Adapters,  # the same in dy's dtype
    needs: Needs,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """da and db of every adapter, each in its own dtype."""
    a: list[Tensor | None] = [None] * len(low.spans)
    b: list[Tensor | None] = [None] * len(low.spans)
    for g, cols, _ in low.ranks():
        dw_g = dw[cols] if dw is not None else _weight_grad(columns(dy, cols), x)
        s = low.scales[g]
        if needs.b:
            b[g] = product(dw_g, low.a[g].t(), s, adapters.b[g].dtype)
        if needs.a:
            a[g] = product(low.b[g].t(), dw_g, s, adapters.a[g].dtype)
    return a, b


def _weight_grad(dy: Tensor, x: Tensor | None) -> Tensor:
    assert x is not None
    return torch.mm(dense(dy.t()), x)
