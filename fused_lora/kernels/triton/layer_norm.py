"""LayerNorm over the last dimension, its rebuilding from saved statistics, and its input gradient.

    x^ = (x - mean) rstd     y = x^ weight + bias     rstd = (variance + eps)^-1/2, of each row
    g = dy weight            dx = rstd (g - average(g) - x^ average(g x^)) + residual

                x, y, dy, dx [M, D]   weight, bias [D]   mean, rstd [M] fp32

A row is held whole in fp32 registers, read once and rounded once. ``out`` may be the left columns
of a bordered buffer [M, D + sum R], so that the next product finds its operand where it needs it.
``rebuild`` is the forward with the statistics it handed back: nothing but x is kept for backward.
``residual`` is the gradient that passed by the branch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.tiles import MOST_WIDTH, RowTile, row_tile


class NormedRows(NamedTuple):
    """What one forward hands back."""

    y: Tensor  # [M, D]
    mean: Tensor  # [M], fp32
    rstd: Tensor  # [M], fp32


@triton.jit
def _row_tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, columns and mask of one program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    return m, m.to(tl.int64)[:, None], d, (m < rows)[:, None] & (d < columns)[None, :]


@triton.jit
def column_of(vector, d, columns, default):
    """[1, D] of it in fp32; a vector that is absent is its neutral element."""
    if vector is not None:
        return tl.load(vector + d, mask=d < columns, other=0.0).to(tl.float32)[None, :]
    else:
        return default


@triton.jit
def _layer_norm(
    x,  # [M, D]
    x_row,
    weight,  # [D] or None
    bias,  # [D] or None
    y,  # [M, D]
    y_row,
    mean,  # [M]
    rstd,  # [M]
    rows,
    columns,
    eps,
    GIVEN: tl.constexpr,  # mean and rstd are read, not written
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m, m64, d, inside = _row_tile(rows, columns, BLOCK_M, BLOCK_D)
    z = tl.load(x + m64 * x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        average = tl.load(mean + m, mask=m < rows, other=0.0)
        inverse = tl.load(rstd + m, mask=m < rows, other=0.0)
        z = z - average[:, None]
    else:
        average = tl.sum(z, axis=1) / columns
        z = tl.where(inside, z - average[:, None], 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(z * z, axis=1) / columns + eps)
        tl.store(mean + m, average, mask=m < rows)
        tl.store(rstd + m, inverse, mask=m < rows)
    out = z * inverse[:, None] * column_of(weight, d, columns, 1.0) + column_of(
        bias, d, columns, 0.0
    )
    tl.store(y + m64 * y_row + d[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_grad(
    dy,  # [M, D]
    dy_row,
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
    BLOCK_D: tl.constexpr,
):
    m, m64, d, inside = _row_tile(rows, columns, BLOCK_M, BLOCK_D)
    average = tl.load(mean + m, mask=m < rows, other=0.0)[:, None]
    inverse = tl.load(rstd + m, mask=m < rows, other=0.0)[:, None]
    z = tl.load(x + m64 * x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + m64 * dy_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, (z - average) * inverse, 0.0)
    g = g * column_of(weight, d, columns, 1.0)
    along = tl.sum(g * z, axis=1)[:, None] / columns
    out = inverse * (g - tl.sum(g, axis=1)[:, None] / columns - z * along)
    if residual is not None:
        at = residual + m64 * residual_row + d[None, :]
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + m64 * dx_row + d[None, :], out.to(dx.dtype.element_ty), mask=inside)


def layer_norm_forward(
    x: Tensor,  # [M, D], rows contiguous
    weight: Tensor | None,  # [D], contiguous, any float dtype
    bias: Tensor | None,  # likewise
    eps: float,
    out: Tensor | None = None,  # [M, D], rows contiguous, any float dtype
    tile: RowTile | None = None,
) -> NormedRows:
    """LayerNorm of each row, in x's dtype or ``out``'s, and its statistics."""
    mean, rstd = (x.new_empty((x.shape[0],), dtype=torch.float32) for _ in range(2))
    return _launch_forward(x, weight, bias, eps, mean, rstd, False, out, tile)


def layer_norm_rebuild(
    x: Tensor,  # [M, D], rows contiguous
    weight: Tensor | None,  # [D], contiguous
    bias: Tensor | None,  # [D], contiguous
    mean: Tensor,  # [M], fp32
    rstd: Tensor,  # [M], fp32
    out: Tensor | None = None,  # [M, D], rows contiguous
    tile: RowTile | None = None,
) -> Tensor:
    """What ``forward`` made of x, from its statistics."""
    return _launch_forward(x, weight, bias, 0.0, mean, rstd, True, out, tile).y


def layer_norm_input_grad(
    dy: Tensor,  # [M, D], rows contiguous
    x: Tensor,  # [M, D], rows contiguous
    weight: Tensor | None,  # [D], contiguous
    mean: Tensor,  # [M], fp32
    rstd: Tensor,  # [M], fp32
    residual: Tensor | None = None,  # [M, D], rows contiguous; added
    out: Tensor | None = None,  # [M, D], rows contiguous
    tile: RowTile | None = None,
) -> Tensor:
    """dx, in dy's dtype or ``out``'s."""
    dx = dy.new_empty(tuple(dy.shape)) if out is None else out
    _check([weight], dy, x, dx, *(() if residual is None else (residual,)))
    if dx.numel() == 0:
        return dx
    rows, columns = dy.shape
    tile = tile or row_tile(columns)
    assert columns <= tile.block_d, (columns, tile)
    args = (
        *(dy, dy.stride(0), x, x.stride(0), weight, mean, rstd),
        *(residual, 0 if residual is None else residual.stride(0), dx, dx.stride(0)),
        *(rows, columns),
    )
    grid = (triton.cdiv(rows, tile.block_m),)
    launch(_layer_norm_grad, grid, dy.device, args, tile.arguments(), [dx])
    return dx


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    out: Tensor | None,
    tile: RowTile | None,
) -> NormedRows:
    y = x.new_empty(tuple(x.shape)) if out is None else out
    _check([weight, bias], x, y)
    if y.numel() == 0:
        return NormedRows(y, mean, rstd)
    rows, columns = x.shape
    tile = tile or row_tile(columns)
    assert columns <= tile.block_d, (columns, tile)
    args = (x, x.stride(0), weight, bias, y, y.stride(0), mean, rstd, rows, columns, float(eps))
    constants = dict(GIVEN=given, **tile.arguments())
    written = [y] if given else [y, mean, rstd]
    launch(_layer_norm, (triton.cdiv(rows, tile.block_m),), x.device, args, constants, written)
    return NormedRows(y, mean, rstd)


def _check(vectors: list[Tensor | None], *matrices: Tensor) -> None:
    for vector in vectors:
        assert vector is None or (vector.shape == matrices[0].shape[1:] and vector.is_contiguous())
    for matrix in matrices:
        assert matrix.shape == matrices[0].shape and matrix.stride(1) == 1, matrix.stride()
    assert matrices[0].shape[1] <= MOST_WIDTH, matrices[0].shape
