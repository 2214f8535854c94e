"""RANK gradients: of z and t alone.

    db_g = s_g dy[:, span_g]T h_g     da_g = dh_gT (D x), D dropout or 1

    border[r, c] = s_r sum_m t[m, r] z[m, c]     t [M, sum R]   z [M, C]   for c in r's group's span

    da    t = dh, z = D x         db, transposed    t = h, z = dy

         columns
    rows [ z | z | z ]   Pass 1: one program per (column block, rank block, slice of rows), fp32
         [ z | z | z ]           partial sums.   Pass 2: slices added in a fixed order, scaled, and
         [ z | z | z ]           written into the blocks where they are, or added to them.

All groups share both launches and x and dy are read once while sum R <= 64. No atomics; sums are
fp32 and each gradient is rounded once, to its block's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    column_range,
    of_a,
    of_b,
    rank_scales,
    store_border,
)
from fused_lora.kernels.triton.launch import input_precision, launch, multiprocessors
from fused_lora.kernels.triton.philox import Dropout, kept
from fused_lora.kernels.triton.tiles import (
    CONTRACTED,
    GradTile,
    grad_tile,
    power_of_two,
)

MOST_SLICES = 64  # what pass 2 holds in registers
REDUCE_BLOCK = 128  # elements per program of pass 2


@triton.jit
def _partial_sums(
    t,  # [M, R]
    t_row,
    z,  # [M, C]
    z_row,
    border,  # [R, C], only its shape
    partial,  # [slices, R, C] fp32
    dropout,  # of z, or None
    rows,
    ranks,
    columns,
    slice_rows,
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    first_c, first_r = tl.program_id(0) * BLOCK_C, tl.program_id(1) * BLOCK_R
    low, high = column_range(border, first_r, first_r + BLOCK_R)
    if first_c + BLOCK_C <= low or first_c >= high:
        return  # no group has these ranks and these columns; pass 2 reads none of them
    r, c = first_r + tl.arange(0, BLOCK_R), first_c + tl.arange(0, BLOCK_C)
    begin = tl.program_id(2).to(tl.int64) * slice_rows
    end = tl.minimum(begin + slice_rows, rows)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        t_tile = tl.load(
            t + m[None, :] * t_row + r[:, None],
            mask=(r < ranks)[:, None] & (m < end)[None, :],
            other=0.0,
        )
        z_tile = tl.load(
            z + m[:, None] * z_row + c[None, :],
            mask=(m < end)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        if dropout is not None:
            z_tile = tl.where(kept(dropout, m, first_c, columns, BLOCK_C), z_tile, 0.0)
        acc = tl.dot(t_tile, z_tile, acc, input_precision=PRECISION)
    if dropout is not None:
        acc *= dropout.inverse
    partial += tl.program_id(2).to(tl.int64) * ranks * columns
    inside = (r < ranks)[:, None] & (c < columns)[None, :]
    tl.store(partial + r[:, None] * columns + c[None, :], acc, mask=inside)


@triton.jit
def _add_slices(
    partial,  # [slices, R, C] fp32
    border,  # [R, C]
    slices,
    ranks,
    columns,
    ADD: tl.constexpr,  # to what the blocks hold
    SLICES: tl.constexpr,  # the first power of two that holds slices
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SLICES)
    at = partial + s.to(tl.int64)[:, None] * (ranks * columns) + e[None, :]
    inside = (s < slices)[:, None] & (e < ranks * columns)[None, :]
    total = tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    r, c = e // columns, e % columns
    store_border(border, r, c, total * rank_scales(border, r), ADD)


def a_grads(
    dh: Tensor,  # [M, sum R], rows contiguous
    x: Tensor,  # [M, K], rows contiguous
    adapters: Adapters,
    into: Sequence[Tensor] | None = None,  # G of [R_g, K], any strides: add to these
    tile: GradTile | None = None,
    *,
    dropout: Dropout | None = None,  # on x, that the forward's shrink had
) -> list[Tensor]:
    """da_g = dh_gT (D x), in a's dtype or added ``into`` given tensors."""
    grads = [torch.empty_like(a_g) for a_g in adapters.a] if into is None else list(into)
    _launch(dh, x, of_a(adapters, grads), into is not None, dropout, tile)
    return grads


def b_grads(
    h: Tensor,  # [M, sum R], rows contiguous
    dy: Tensor,  # [M, N], rows contiguous
    adapters: Adapters,
    into: Sequence[Tensor] | None = None,  # G of [N_g, R_g], any strides: add to these
    tile: GradTile | None = None,
) -> list[Tensor]:
    """db_g = s_g dy[:, span_g]T h_g, in b's dtype or added ``into`` given tensors."""
    grads = [torch.empty_like(b_g) for b_g in adapters.b] if into is None else list(into)
    _launch(h, dy, of_b(adapters, grads), into is not None, None, tile)
    return grads


def _launch(
    t: Tensor,
    z: Tensor,
    border: Border,
    add: bool,
    dropout: Dropout | None,
    tile: GradTile | None,
) -> None:
    (rows, ranks), columns = t.shape, z.shape[1]
    assert z.shape[0] == rows and ranks == border.rank, (t.shape, z.shape)
    assert t.stride(1) == 1 and z.stride(1) == 1 and t.dtype is z.dtype, (t.stride(), z.stride())
    if ranks * columns == 0:
        return
    tile = tile or grad_tile(ranks, z.element_size(), dropout is not None)
    blocks = (triton.cdiv(columns, tile.block_c), triton.cdiv(ranks, tile.block_r))
    slices, slice_rows = _slices(rows, blocks[0] * blocks[1], tile.block_m, t.device)
    grid = (*blocks, slices)
    partial = t.new_empty((slices, ranks, columns), dtype=torch.float32)
    args = (t, t.stride(0), z, z.stride(0), border, partial, dropout)
    constants = dict(PRECISION=input_precision(t.dtype), **tile.arguments())
    sizes = (rows, ranks, columns, slice_rows)
    compiled = launch(_partial_sums, grid, t.device, (*args, *sizes), constants, [partial])
    constants = dict(ADD=add, SLICES=power_of_two(slices, 1, MOST_SLICES), BLOCK=REDUCE_BLOCK)
    launch(
        *(_add_slices, (triton.cdiv(ranks * columns, REDUCE_BLOCK),), t.device),
        (partial, border, slices, ranks, columns),
        constants | dict(num_warps=4, **CONTRACTED),
        border.blocks,
    )
    if not spills.seen(compiled):
        spills.look(compiled, "grad_dropout" if dropout else "grad", tile, t)


def _slices(rows: int, blocks: int, block_m: int, device: torch.device) -> tuple[int, int]:
    """How many slices of how many rows give every multiprocessor two programs."""
    steps = triton.cdiv(rows, block_m)
    wanted = triton.cdiv(2 * multiprocessors(device), blocks)
    slices = max(1, min(wanted, steps, MOST_SLICES))
    slice_rows = max(1, triton.cdiv(steps, slices)) * block_m
    return max(1, triton.cdiv(rows, slice_rows)), slice_rows
