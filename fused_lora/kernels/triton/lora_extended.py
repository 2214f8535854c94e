"""EXTENDED: base and low-rank products in one fp32 accumulator.

    u[m, n] = s_n sum_r h[m, r] border[r, n] + sum_k x[m, k] w[n, k] + bias[n]
    y[m, n] = residual[m, n] + factor[n] act(u[m, n])                see epilogue.py

    forward   h = x aT, border = bT, each column n by the ranks of its own group only
    dx        h = dh,   border = a,  x = dy, w read through transposed strides: dx = dy w + dh a

                      x [M, K]   w [N, K]   h [M, sum R]   border [sum R, N]   y [M, N]

The extension comes first, so that its scale is one fp32 product per column and s b is never
rounded; the K loop continues in the same accumulator. y is rounded once, and where an activation
follows so is the pre-activation u, stored beside it if asked for. Where x is act(u) of the layer
before, dx goes on to du = act'(u) dx in its epilogue: dx itself is never written. The border is
in x's dtype, packed before where it was not; along K the copies of later steps fly, and on sm_90
one product runs on.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_extended_bulk, spills
from fused_lora.kernels.triton.border import Border, Packed, of_a, of_b, packed
from fused_lora.kernels.triton.dropout import Dropout
from fused_lora.kernels.triton.epilogue import EpilogueOperands, epilogue_operands, finish
from fused_lora.kernels.triton.launch import input_precision, launch
from fused_lora.kernels.triton.lora_shrink import shrink, shrink_grad
from fused_lora.kernels.triton.primitives import expand, grouped_tile
from fused_lora.kernels.triton.tiles import BulkTile, Tile, gemm_tile


class Output(NamedTuple):
    """What one forward hands back."""

    y: Tensor  # [M, N]
    h: Tensor  # [M, sum R]
    u: Tensor | None  # [M, N], the pre-activation where there is an activation, and it is stored


@triton.jit
def _extended(
    x,  # [M, K]
    x_row,
    w,  # [N, K]
    w_row,
    w_column,
    h,  # [M, R]
    h_row,
    border,  # [R, N]
    y,  # [M, N]
    y_row,
    epilogue,
    dropout,  # of the extension's columns, or None
    rows,
    columns,
    depth,
    ACTIVATION: tl.constexpr,  # none, erf or tanh
    SLOPE: tl.constexpr,  # act'(u) rather than act
    PRECISION: tl.constexpr,  # of fp32 products
    WHOLE_K: tl.constexpr,  # BLOCK_K divides depth
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m64 = m.to(tl.int64)[:, None]
    inside_m, inside_n = (m < rows)[:, None], (n < columns)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = expand(
        *(acc, h, h_row, border, m, n, rows, tile_n * BLOCK_N, columns, dropout),
        *(PRECISION, BLOCK_R),
    )

    x_tile = x + m64 * x_row + k[None, :]
    w_tile = w + n.to(tl.int64)[None, :] * w_row + k.to(tl.int64)[:, None] * w_column
    for k0 in range(0, depth, BLOCK_K):
        inside_k = k < (BLOCK_K if WHOLE_K else depth - k0)
        left = tl.load(x_tile, mask=inside_m & inside_k[None, :], other=0.0)
        right = tl.load(w_tile, mask=inside_k[:, None] & inside_n, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w_column
    finish(acc, epilogue, y, y_row, m, n, rows, columns, ACTIVATION, SLOPE)


def forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype, any strides
    bias: Tensor | None,  # [N], contiguous
    adapters: Adapters | Packed,
    activation: str = "none",  # or gelu: erf, tanh
    h: Tensor | None = None,  # [M, sum R] where the shrink is done already
    tile: Tile | None = None,
    *,
    factor: Tensor | None = None,  # [N], contiguous: LayerScale
    residual: Tensor | None = None,  # [M, N], rows contiguous
    out: Tensor | None = None,  # [M, N], rows contiguous: the left of a bordered buffer
    dropout: Dropout | None = None,  # of the shrink
    stores_u: bool = True,  # where there is an activation
) -> Output:
    """y = residual + factor act(x wT + bias + s h bT), and what a backward pass may keep."""
    adapters = packed(adapters, x.dtype)
    h = shrink(x, adapters, dropout=dropout) if h is None else h
    y = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    u = x.new_empty(x.shape[0], w.shape[0]) if stores_u and activation != "none" else None
    ending = epilogue_operands(bias, factor, residual, u)
    _launch(x, w, h, of_b(adapters), y, ending, None, activation, False, tile)
    return Output(y, h, u)


def input_grad(
    dy: Tensor,  # [M, N], rows contiguous
    w: Tensor,  # [N, K], dy's dtype, any strides
    adapters: Adapters | Packed,
    dh: Tensor | None = None,  # [M, sum R] where it is formed already
    tile: Tile | None = None,
    *,
    activation: str = "none",  # what made x of u: x = act(u)
    u: Tensor | None = None,  # [M, K], rows contiguous, with an activation
    residual: Tensor | None = None,  # [M, K], rows contiguous: a gradient that joins
    out: Tensor | None = None,  # [M, K], rows contiguous: the left of a bordered buffer
    dropout: Dropout | None = None,  # that the forward's shrink had
) -> tuple[Tensor, Tensor]:
    """dx = dy w + D (dh a) [M, K], and dh; with an activation du = act'(u) dx in its place."""
    assert (u is None) == (activation == "none"), activation
    adapters = packed(adapters, dy.dtype)
    dh = shrink_grad(dy, adapters) if dh is None else dh
    dx = dy.new_empty(dy.shape[0], w.shape[1]) if out is None else out
    ending = epilogue_operands(residual=residual, u=u)
    _launch(dy, w.t(), dh, of_a(adapters), dx, ending, dropout, activation, True, tile)
    return dx, dh


def _launch(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    border: Border,
    y: Tensor,
    ending: EpilogueOperands,
    dropout: Dropout | None,
    activation: str,
    slope: bool,
    tile: Tile | None,
) -> None:
    (rows, depth), columns = x.shape, w.shape[0]
    assert w.shape[1] == depth and h.shape == (rows, border.rank), (w.shape, h.shape)
    assert x.dtype is w.dtype is h.dtype, (x.dtype, w.dtype, h.dtype)
    assert x.stride(1) == h.stride(1) == y.stride(1) == 1, (x.stride(), h.stride(), y.stride())
    assert y.shape == (rows, columns), y.shape
    assert all(t is None or t.shape == y.shape for t in (ending.residual, ending.u)), y.shape
    assert all(t is None or t.shape == (columns,) for t in (ending.bias, ending.factor)), columns
    assert activation in ("none", "erf", "tanh"), activation
    if y.numel() == 0:
        return
    bulk = dropout is None and lora_extended_bulk.describable(x, w)  # Philox takes registers
    active = activation != "none"
    heavy = ending.heavy or active or dropout is not None
    tile = tile or gemm_tile(rows, columns, x.element_size(), heavy, x.device, bulk, active)
    if isinstance(tile, BulkTile):
        assert bulk, (x.stride(), w.stride())
        lora_extended_bulk.launch_bulk(x, w, h, border, y, ending, activation, slope, tile)
        return
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)
    args = (x, x.stride(0), w, w.stride(0), w.stride(1), h, h.stride(0), border)
    constants = dict(
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=input_precision(x.dtype),
        WHOLE_K=depth % tile.block_k == 0,
        BLOCK_R=border.rank_block(64 // x.element_size()),
        **tile.arguments(),
    )
    compiled = launch(
        *(_extended, grid, x.device),
        (*args, y, y.stride(0), ending, dropout, rows, columns, depth),
        constants,
        [y, None if slope else ending.u],
    )
    if not spills.seen(compiled):
        name = "extended_dropout" if dropout else ending.kernel(x.dtype, active)
        spills.look(compiled, name + border.word, tile, x)
