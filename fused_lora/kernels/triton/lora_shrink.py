"""Shrink: h = x aT from x, and from the rows that LayerNorm or GELU makes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    Packed,
    Pieces,
    column_range,
    load_border,
    of_a,
    of_b,
    pack_beside,
    packed,
    rank_scales,
)
from fused_lora.kernels.triton.elementwise import column_of
from fused_lora.kernels.triton.elementwise import gelu as gelu_of
from fused_lora.kernels.triton.launch import input_precision, launch
from fused_lora.kernels.triton.philox import Dropout, kept
from fused_lora.kernels.triton.tiles import (
    MOST_ROW_RANKS,
    PACK,
    ThinTile,
    row_shrink_tile,
    thin_tile,
)

# The thin products with a border: h = x aT and dh_g = s_g dy[:, span_g] b_g.
#
#     out[m, r] = s_r sum_c D x[m, c] border[r, c]     x [M, C]   border [sum R, C]   out [M, sum R]
#
# All groups in one launch, x read once while sum R <= 64. The border is in x's dtype, packed before
# where it was not; sums and the scale are fp32, and each output is rounded once. D is dropout, see
# dropout.py; without it D x is x.


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


# What makes x, and h of it, in one pass: LayerNorm or GELU of rows, then their thin product.
#
#     x^ = (z - mean) rstd weight + bias, or GELU(z)     h = x^ aT, of x^ as it was rounded
#
#         z, x^ [M, C]   weight, bias [C]   a [sum R, C]   h [M, sum R]   mean, rstd [M] fp32
#
# A program has some rows whole, block by block of their columns. For LayerNorm it walks them twice,
# and finds z in a cache the second time: mean and variance of the blocks are combined by their
# counts, so that no square of a mean is taken off a mean of squares. x^ may be the left and h the
# right of one bordered buffer [M, C + sum R]. Sums are fp32, x^ and h are rounded once, to 16 bits.
# The adapters of the products behind it are packed by further programs of the same launch, where a
# program joins both (programs/once): a itself is read as it lies.
#
# Source of the combination: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise
# algorithm for computing sample variances" (STAN-CS-79-773).


NO_PIECES = (None, None, None)


class Shrunk(NamedTuple):
    """What one LayerNorm hands back."""

    x: Tensor  # [M, C]
    mean: Tensor  # [M], fp32
    rstd: Tensor  # [M], fp32
    h: Tensor  # [M, sum R]


@triton.jit
def _statistics(z_rows, inside_m, columns, eps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean of each row, and 1 / sqrt(variance + eps)."""
    average = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)  # of what is beside it, summed
    for c0 in range(0, columns, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = inside_m & (c < columns)[None, :]
        z = tl.load(z_rows + c[None, :], mask=inside, other=0.0).to(tl.float32)
        many = tl.minimum(columns - c0, BLOCK_C).to(tl.float32)
        share = many / (c0 + many)
        own = tl.sum(z, axis=1) / many
        z = tl.where(inside, z - own[:, None], 0.0)
        apart = own - average
        average += apart * share
        squares += tl.sum(z * z, axis=1) + apart * apart * (share * c0)
    return average, 1.0 / tl.sqrt_rn(squares / columns + eps)


@triton.jit
def _row_shrink(
    z,  # [M, C]
    z_row,
    weight,  # [C] or None, of LayerNorm
    bias,  # likewise
    x,  # [M, C]
    x_row,
    mean,  # [M], of LayerNorm
    rstd,  # [M]
    border,  # [R, C]
    h,  # [M, R]
    h_row,
    rows,
    columns,
    ranks,
    eps,
    borders,  # packed by the programs past those of rows, as border.py's ``Pieces``; or None
    outs,
    lengths,
    KIND: tl.constexpr,  # norm, or GELU's erf or tanh
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACK_M: tl.constexpr,
    PACK_N: tl.constexpr,
):
    if lengths is not None:
        past = tl.program_id(0) - tl.cdiv(rows, BLOCK_M)
        if past >= 0:
            pack_beside(borders, outs, lengths, past, PACK_M, PACK_N)
            return
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m64, inside_m = m.to(tl.int64)[:, None], (m < rows)[:, None]
    r = tl.arange(0, BLOCK_R)
    z_rows, x_rows = z + m64 * z_row, x + m64 * x_row
    if KIND == "norm":
        average, inverse = _statistics(z_rows, inside_m, columns, eps, BLOCK_M, BLOCK_C)
        tl.store(mean + m, average, mask=m < rows)
        tl.store(rstd + m, inverse, mask=m < rows)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for c0 in range(0, columns, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = inside_m & (c < columns)[None, :]
        made = tl.load(z_rows + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if KIND == "norm":
            made = (made - average[:, None]) * inverse[:, None]
            made = made * column_of(weight, c, columns, 1.0) + column_of(bias, c, columns, 0.0)
        else:
            made = gelu_of(made, KIND)
        low = tl.where(inside, made, 0.0).to(x.dtype.element_ty)
        tl.store(x_rows + c[None, :], low, mask=inside)
        right = load_border(border, r[None, :], c[:, None], x.dtype.element_ty)
        acc = tl.dot(low, right, acc, input_precision=PRECISION)
    h_tile = h + m64 * h_row + r[None, :]
    tl.store(h_tile, acc.to(h.dtype.element_ty), mask=inside_m & (r < ranks)[None, :])


def layer_norm_shrink(
    z: Tensor,  # [M, C], rows contiguous, any float dtype
    weight: Tensor | None,  # [C], contiguous, any float dtype
    bias: Tensor | None,  # likewise
    eps: float,
    adapters: Adapters,
    out: Tensor,  # [M, C], rows contiguous, of 16 bits
    h: Tensor | None = None,  # [M, sum R], rows contiguous: the right end of [x | h]
    tile: ThinTile | None = None,
    pieces: Pieces | None = None,  # packed in the same launch
) -> Shrunk:
    """LayerNorm of each row and its statistics, and h of the result."""
    mean, rstd = (z.new_empty((z.shape[0],), dtype=torch.float32) for _ in range(2))
    how = (eps, "norm", adapters, h, tile, pieces)
    h = _launch_rows(z, (weight, bias), out, (mean, rstd), *how)
    return Shrunk(out, mean, rstd, h)


def gelu_shrink(
    z: Tensor,  # [M, C], rows contiguous
    kind: str,  # erf or tanh
    adapters: Adapters,
    out: Tensor,  # [M, C], rows contiguous, of 16 bits
    h: Tensor | None = None,  # [M, sum R], as above
    tile: ThinTile | None = None,
    pieces: Pieces | None = None,  # packed in the same launch
) -> tuple[Tensor, Tensor]:
    """GELU of each element, and h of the result."""
    assert kind in ("erf", "tanh"), kind
    how = (0.0, kind, adapters, h, tile, pieces)
    return out, _launch_rows(z, (None, None), out, (None, None), *how)


def _launch_rows(
    z: Tensor,
    vectors: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    eps: float,
    kind: str,
    adapters: Adapters,
    h: Tensor | None,
    tile: ThinTile | None,
    pieces: Pieces | None,
) -> Tensor:
    border, (rows, columns) = of_a(adapters), z.shape
    h = x.new_empty((rows, border.rank)) if h is None else h
    assert x.shape == z.shape and h.shape == (rows, border.rank), (x.shape, h.shape)
    assert z.stride(1) == x.stride(1) == h.stride(1) == 1, (z.stride(), x.stride(), h.stride())
    assert x.element_size() == 2 and h.dtype is x.dtype, (x.dtype, h.dtype)
    assert 0 < border.rank <= MOST_ROW_RANKS, border.rank
    for vector in vectors:
        assert vector is None or (vector.shape == z.shape[1:] and vector.is_contiguous())
    if z.numel() == 0:
        return h
    tile = tile or row_shrink_tile(border.rank, kind == "norm")
    assert tile.block_r >= border.rank, (tile, border.rank)
    args = (
        *(z, z.stride(0), *vectors, x, x.stride(0), *statistics, border, h, h.stride(0)),
        *(rows, columns, border.rank, float(eps), *(pieces or NO_PIECES)),
    )
    constants = dict(KIND=kind, PRECISION=input_precision(x.dtype), **tile.arguments())
    constants |= {"PACK_M": PACK.block_m, "PACK_N": PACK.block_n}
    written = [t for t in (x, *statistics, h, *(pieces.outs if pieces else ())) if t is not None]
    grid = (triton.cdiv(rows, tile.block_m) + (math.prod(pieces.grid) if pieces else 0),)
    room = None if pieces else len(args) - len(NO_PIECES)
    compiled = launch(_row_shrink, grid, z.device, args, constants, written, room=room)
    if not spills.seen(compiled):
        spills.look(compiled, "shrink_norm" if kind == "norm" else "shrink_gelu", tile, x)
    return h
