"""Expand: the low-rank term of a product, added by the kernel that reads that product next."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    Packed,
    column_scales,
    load_border,
    of_a,
    of_b,
)
from fused_lora.kernels.triton.elementwise import column_of
from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.tiles import MOST_ROW_RANKS, ThinTile, expand_tile

# What a product left out, and who adds it.
#
#     g = (dy + dh a) weight   dx = rstd (g - average(g) - x^ average(g x^)) + residual
#     y = residual + factor (z + s h bT)
#
#         x, dy, dx [M, D]   dh [M, sum R]   a [sum R, D]   weight [D]   mean, rstd [M] fp32
#         z, residual, y [M, N]   h [M, sum R]   b [N, sum R]   factor [N]
#
# dy and z are products as the library rounded them. The term is of matrix instructions, all else is
# fp32, and what is written is rounded once. a and b are read as they lie, in the dtype of dh and h.
# A program of LayerNorm's has some rows whole and walks their columns twice, backwards the second
# time, since a cache has the columns that were read last.


@triton.jit
def _hidden(h, h_row, border, m, r, rows):
    """A tile of h, or of dh, of every rank."""
    inside = (m < rows)[:, None] & (r < border.firsts[len(border.scales)])[None, :]
    return tl.load(h + m.to(tl.int64)[:, None] * h_row + r[None, :], mask=inside, other=0.0)


@triton.jit
def _norm_columns(
    dy_rows, x_rows, hidden, border, weight, average, inverse, r, c, inside_m, columns
):
    """x^ and g of columns c."""
    inside = inside_m & (c < columns)[None, :]
    right = load_border(border, r[:, None], c[None, :], hidden.dtype)
    g = tl.load(dy_rows + c[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.load(x_rows + c[None, :], mask=inside, other=0.0).to(tl.float32)
    g = (g + tl.dot(hidden, right)) * column_of(weight, c, columns, 1.0)
    return tl.where(inside, (z - average) * inverse, 0.0), g, inside


@triton.jit
def _norm_expand(
    dy,  # [M, D]
    dy_row,
    dh,  # [M, R]
    dh_row,
    border,  # [R, D]
    x,  # [M, D]
    x_row,
    weight,  # [D] or None
    mean,  # [M]
    rstd,  # [M]
    residual,  # [M, D] or None
    residual_row,
    dx,  # [M, D]
    dx_row,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m64, inside_m, r = m.to(tl.int64)[:, None], (m < rows)[:, None], tl.arange(0, BLOCK_R)
    average = tl.load(mean + m, mask=m < rows, other=0.0)[:, None]
    inverse = tl.load(rstd + m, mask=m < rows, other=0.0)[:, None]
    hidden = _hidden(dh, dh_row, border, m, r, rows)
    dy_rows, x_rows, dx_rows = dy + m64 * dy_row, x + m64 * x_row, dx + m64 * dx_row
    along = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    blocks = tl.cdiv(columns, BLOCK_C)
    for i in range(0, blocks):
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        z, g, _ = _norm_columns(
            dy_rows, x_rows, hidden, border, weight, average, inverse, r, c, inside_m, columns
        )
        along += tl.sum(g * z, axis=1)
        total += tl.sum(g, axis=1)
    along, total = along[:, None] / columns, total[:, None] / columns
    for i in range(0, blocks):
        c = (blocks - 1 - i) * BLOCK_C + tl.arange(0, BLOCK_C)
        z, g, inside = _norm_columns(
            dy_rows, x_rows, hidden, border, weight, average, inverse, r, c, inside_m, columns
        )
        out = inverse * (g - total - z * along)
        if residual is not None:
            at = residual + m64 * residual_row + c[None, :]
            out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_rows + c[None, :], out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _residual_expand(
    z,  # [M, N]
    z_row,
    h,  # [M, R]
    h_row,
    border,  # [R, N]
    factor,  # [N] or None
    residual,  # [M, N]
    residual_row,
    y,  # [M, N], maybe z
    y_row,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m64, r = m.to(tl.int64)[:, None], tl.arange(0, BLOCK_R)
    inside = (m < rows)[:, None] & (c < columns)[None, :]
    right = load_border(border, r[:, None], c[None, :], h.dtype.element_ty)
    out = tl.dot(_hidden(h, h_row, border, m, r, rows), right) * column_scales(border, c)[None, :]
    out += tl.load(z + m64 * z_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    out *= column_of(factor, c, columns, 1.0)
    at = residual + m64 * residual_row + c[None, :]
    out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m64 * y_row + c[None, :], out.to(y.dtype.element_ty), mask=inside)


def layer_norm_expand(
    dy: Tensor,  # [M, D], rows contiguous, any float dtype
    x: Tensor,  # [M, D], likewise
    weight: Tensor | None,  # [D], contiguous, any float dtype
    mean: Tensor,  # [M], fp32
    rstd: Tensor,  # [M], fp32
    hidden: Tensor,  # dh [M, sum R], rows contiguous, of 16 bits
    adapters: Adapters | Packed,
    residual: Tensor | None = None,  # [M, D], rows contiguous, any float dtype; added
    out: Tensor | None = None,  # [M, D], rows contiguous, any float dtype
    tile: ThinTile | None = None,
) -> Tensor:
    """dx of a LayerNorm of x, whose output's gradient is dy + dh a; in dy's dtype or ``out``'s."""
    dx = dy.new_empty(tuple(dy.shape)) if out is None else out
    border, (rows, columns) = of_a(adapters), dy.shape
    _check_expand(hidden, border, [weight], dy, x, residual, dx)
    if dx.numel() == 0:
        return dx
    tile = tile or expand_tile(border.rank)
    args = (
        *(dy, dy.stride(0), hidden, hidden.stride(0), border, x, x.stride(0), weight, mean, rstd),
        *(residual, 0 if residual is None else residual.stride(0), dx, dx.stride(0)),
    )
    grid = (triton.cdiv(rows, tile.block_m),)
    _launch_expand(_norm_expand, "expand_norm", grid, (*args, rows, columns), tile, hidden, dx)
    return dx


def residual_expand(
    z: Tensor,  # [M, N], rows contiguous, any float dtype
    hidden: Tensor,  # h [M, sum R], rows contiguous, of 16 bits
    adapters: Adapters | Packed,
    residual: Tensor,  # [M, N], rows contiguous, any float dtype
    factor: Tensor | None = None,  # [N], contiguous, any float dtype
    out: Tensor | None = None,  # [M, N], rows contiguous, any float dtype; may be z
    tile: ThinTile | None = None,
) -> Tensor:
    """y = residual + factor (z + s h bT), in the wider dtype of z and residual, or ``out``'s."""
    dtype = torch.promote_types(z.dtype, residual.dtype)
    y = z.new_empty(tuple(z.shape), dtype=dtype) if out is None else out
    border, (rows, columns) = of_b(adapters), z.shape
    _check_expand(hidden, border, [factor], z, residual, y)
    if y.numel() == 0:
        return y
    tile = tile or expand_tile(border.rank)
    args = (
        *(z, z.stride(0), hidden, hidden.stride(0), border, factor),
        *(residual, residual.stride(0), y, y.stride(0), rows, columns),
    )
    grid = (triton.cdiv(rows, tile.block_m), triton.cdiv(columns, tile.block_c))
    _launch_expand(_residual_expand, "expand_residual", grid, args, tile, hidden, y)
    return y


def _check_expand(
    hidden: Tensor, border: Border, vectors: list[Tensor | None], *matrices: Tensor | None
) -> None:
    shape = matrices[0].shape  # type: ignore[union-attr]
    for matrix in matrices:
        assert matrix is None or (matrix.shape == shape and matrix.stride(1) == 1), matrix.stride()
    for vector in vectors:
        assert vector is None or (vector.shape == shape[1:] and vector.is_contiguous())
    assert hidden.shape == (shape[0], border.rank) and hidden.stride(1) == 1, hidden.shape
    assert hidden.element_size() == 2, hidden.dtype
    assert 0 < border.rank <= MOST_ROW_RANKS, border.rank


def _launch_expand(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    tile: ThinTile,
    hidden: Tensor,
    out: Tensor,
) -> None:
    assert tile.block_r >= hidden.shape[1], (tile, hidden.shape)
    compiled = launch(kernel, grid, hidden.device, args, tile.arguments(), [out])
    if not spills.seen(compiled):
        spills.look(compiled, name, tile, hidden)
