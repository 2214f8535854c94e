"""The dropped branch of an adapter, its mask formed by every kernel that needs it.

    h = (D x) aT      dx = D (dh a)      da = dhT (D x)      D of reference/dropout.py

                x, dx [M, K]   a, da [R, K]   h, dh [M, R]

dx is the extended GEMM over no columns of y at all. The face is that of
``fused_lora.kernels.aten.lora_linear_cases``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_extended, lora_grad, lora_shrink
from fused_lora.kernels.triton.available import DTYPES
from fused_lora.kernels.triton.launches import tile_of
from fused_lora.kernels.triton.philox import dropout
from fused_lora.types import Span

STEP = 0  # a seed is drawn for every call


def dropout_shrink(x: Tensor, a: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """h [M, R] in x's dtype."""
    tile = _tile("shrink_dropout", x, x.shape[0], a.shape[0], x.shape[1])
    return lora_shrink.shrink(x, _alone(a), tile=tile, dropout=dropout(p, seed, STEP))


def dropout_grads(
    dh: Tensor,  # [M, R]
    x: Tensor | None,  # [M, K]; None where a asks for no gradient
    a: Tensor,
    p: float,
    seed: int | Tensor,
    needs_x: bool,
    dx: Tensor | None = None,  # [M, K], what D (dh a) is added to, in place
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] in dh's dtype and da [R, K] in a's, where asked for."""
    if needs_x:
        through = dropout_input_grad(dh, a, p, seed)
        dx = through if dx is None else dx.add_(through)
    return dx, None if x is None else dropout_a_grad(dh, x, a, p, seed)


def dropout_input_grad(dh: Tensor, a: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """dx [M, K] in dh's dtype."""
    columns = a.shape[1]
    tile = _tile("extended_dropout", dh, dh.shape[0], columns, 0)
    dy, w, mask = dh[:, :0], dh.new_empty((0, columns)), dropout(p, seed, STEP)
    return lora_extended.input_grad(dy, w, _alone(a), dh, tile, dropout=mask)[0]


def dropout_a_grad(dh: Tensor, x: Tensor, a: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """da [R, K] in a's dtype."""
    tile = _tile("grad_dropout", x, a.shape[0], x.shape[1], x.shape[0])
    mask = dropout(p, seed, STEP)
    return lora_grad.a_grads(dh, x, _alone(a), tile=tile, dropout=mask)[0].to(a.dtype)


def _alone(a: Tensor) -> Adapters:
    """One adapter of which only a matters."""
    a = a if a.dtype in DTYPES else a.to(torch.float32)
    return Adapters([a], [a.new_empty((0, a.shape[0]))], (1.0,), (Span(0, 0, a.shape[0]),))


def _tile(kernel: str, t: Tensor, rows: int, columns: int, depth: int):
    return tile_of(kernel, rows, columns, depth, t.dtype, t.device)
