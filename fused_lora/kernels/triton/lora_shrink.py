"""The thin products with a border: h = x aT and dh_g = s_g dy[:, span_g] b_g.

    out[m, r] = s_r sum_c D x[m, c] border[r, c]     x [M, C]   border [sum R, C]   out [M, sum R]

All groups in one launch, x read once while sum R <= 64. The border is in x's dtype, packed before
where it was not; sums and the scale are fp32, and each output is rounded once. D is dropout, see
dropout.py; without it D x is x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import Border, Packed, of_a, of_b, packed
from fused_lora.kernels.triton.dropout import Dropout, kept
from fused_lora.kernels.triton.launch import input_precision, launch
from fused_lora.kernels.triton.primitives import column_range, load_border, rank_scales
from fused_lora.kernels.triton.tiles import ThinTile, thin_tile


@triton.jit
def _shrink(
    x,  # [M, C]
    x_row,
    border,  # [R, C]
    out,  # [M, R]
    out_row,
    dropout,  # of x, or None
    rows,
    columns,
    ranks,
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    low, high = column_range(border, first, first + BLOCK_R)
    x_rows = x + m.to(tl.int64)[:, None] * x_row
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for c0 in range(low, high, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x_tile = tl.load(
            x_rows + c[None, :], mask=(m < rows)[:, None] & (c < high)[None, :], other=0.0
        )
        if dropout is not None:
            x_tile = tl.where(kept(dropout, m, c0, columns, BLOCK_C), x_tile, 0.0)
        border_tile = load_border(border, r[None, :], c[:, None], x.dtype.element_ty)
        acc = tl.dot(x_tile, border_tile, acc, input_precision=PRECISION)
    acc *= rank_scales(border, r)[None, :]
    if dropout is not None:
        acc *= dropout.inverse
    out_tile = out + m.to(tl.int64)[:, None] * out_row + r[None, :]
    mask = (m < rows)[:, None] & (r < ranks)[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=mask)


def shrink(
    x: Tensor,  # [M, K], rows contiguous
    adapters: Adapters | Packed,
    out: Tensor | None = None,  # [M, sum R], rows contiguous: the right end of [x | h]
    tile: ThinTile | None = None,
    *,
    dropout: Dropout | None = None,  # on x
) -> Tensor:
    """h = (D x) aT, [M, sum R], in x's dtype."""
    return _launch(x, of_a(packed(adapters, x.dtype)), out, dropout, tile)


def shrink_grad(
    dy: Tensor,  # [M, N], rows contiguous
    adapters: Adapters | Packed,
    out: Tensor | None = None,  # [M, sum R], rows contiguous: the right end of [dy | dh]
    tile: ThinTile | None = None,
) -> Tensor:
    """dh = s dy b, [M, sum R], in dy's dtype."""
    return _launch(dy, of_b(packed(adapters, dy.dtype)), out, None, tile)


def _launch(
    x: Tensor,
    border: Border,
    out: Tensor | None,
    dropout: Dropout | None,
    tile: ThinTile | None,
) -> Tensor:
    (rows, columns), ranks = x.shape, border.rank
    out = x.new_empty(rows, ranks) if out is None else out
    assert x.stride(1) == 1 and out.stride(1) == 1, (x.stride(), out.stride())
    assert out.shape == (rows, ranks) and out.dtype is x.dtype, (out.shape, out.dtype)
    if out.numel() == 0:
        return out
    tile = tile or thin_tile(rows, ranks, x.element_size(), x.device, dropout is not None)
    grid = (triton.cdiv(rows, tile.block_m), triton.cdiv(ranks, tile.block_r))
    args = (x, x.stride(0), border, out, out.stride(0), dropout, rows, columns, ranks)
    constants = dict(PRECISION=input_precision(x.dtype), **tile.arguments())
    compiled = launch(_shrink, grid, x.device, args, constants, [out])
    if not spills.seen(compiled):
        spills.look(compiled, "shrink_dropout" if dropout else "shrink", tile, x)
    return out
