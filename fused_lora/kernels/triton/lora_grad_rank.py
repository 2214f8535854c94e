"""RANK gradients: of z and t alone; and those formed where dy is packed of its parts.

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
from math import gcd
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
    column_range,
    load_border,
    of_a,
    of_b,
    rank_scales,
    store_border,
)
from fused_lora.kernels.triton.launch import input_precision, launch, multiprocessors
from fused_lora.kernels.triton.launches import tile_of
from fused_lora.kernels.triton.philox import Dropout, kept
from fused_lora.kernels.triton.tiles import (
    CONTRACTED,
    MOST_GRAD_RANKS,
    DerivativeTile,
    ElementTile,
    GradTile,
    Tile,
    grad_tile,
    packs_gradients,
    power_of_two,
)

MOST_SLICES = 64  # of rows, each with sums of its own: what pass 2 holds in registers
REDUCE_BLOCK = 128  # elements per program of pass 2
PACK_BESIDE = 2  # steps of a program that packs dy: it writes its sums, which others read


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


# dq, dk and dv lie apart, and dy of a fused qkv is one matrix of all three: where they are written
# into it, they are operands of db and of dh.
#
#     dy [M, N] = [dq | dk | dv]     db_g = s_g dy[:, span_g]T h_g     dh_g = s_g dy[:, span_g] b_g
#
# One program per block of columns and slice of rows: it walks its row blocks in order, and leaves
# the sums of its slice, which others add in a fixed order. Each block of columns lies in one part
# and in the span of one adapter, or of none, whose ranks alone it reads and writes.


class PackSlices(NamedTuple):
    """What one pass over the parts of dy leaves."""

    dy: Tensor  # [M, N]
    b: Tensor  # [slices, N, whole 16 >= sum R], fp32: parts of db, before its scale
    hidden: Tensor  # [blocks, M, most ranks of one adapter], fp32: of dh, before its scale


@triton.jit
def _pack_grads(
    parts,  # P of [M, N / P]
    part_rows,
    h,  # [M, R]
    h_row,
    before,  # b, transposed, [R, N]
    dy,  # [M, N], contiguous
    b_sums,  # [slices, N, sums]
    hidden,  # [blocks, M, BLOCK_R]
    rows,
    columns,  # N
    width,  # N / P, whole blocks of it
    sums,  # sum R in whole 16
    slices,
    RANKS: tl.constexpr,  # what the first of every adapter, and their number, are multiples of
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # holds the ranks of any adapter
    STAGES: tl.constexpr,  # which loads outside products have where the loop names it
    WARPS: tl.constexpr,
):
    dtype: tl.constexpr = h.dtype.element_ty
    PART: tl.constexpr = BLOCK_N // WARPS  # columns of a share
    blocks = columns // BLOCK_N
    first, own = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n0 = own * BLOCK_N
    part, part_row = parts[0], part_rows[0]
    for p in tl.static_range(1, len(part_rows)):
        part = tl.where(n0 >= p * width, parts[p], part)
        part_row = tl.where(n0 >= p * width, part_rows[p], part_row)
    part += tl.multiple_of(n0 % width, BLOCK_N)
    low, ranks = 0, 0  # of the adapter whose columns these are
    for g in tl.static_range(len(before.scales)):
        inside = (before.starts[g] <= n0) & (n0 < before.stops[g])
        low = tl.where(inside, before.firsts[g], low)
        ranks = tl.where(inside, before.firsts[g + 1] - before.firsts[g], ranks)
    low, ranks = tl.multiple_of(low, RANKS), tl.multiple_of(ranks, RANKS)
    i, j, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    shares = n0 + tl.arange(0, WARPS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    left = load_border(before, low + r[None, :, None], shares, dtype)
    b_sum = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    hidden += own.to(tl.int64) * rows * BLOCK_R
    last = tl.where(ranks > 0, rows, 0)  # of dh: columns of no adapter have none
    for block in tl.range(
        first, tl.cdiv(rows, BLOCK_M), slices, num_stages=STAGES, disable_licm=True
    ):
        m0 = block * BLOCK_M
        base = m0.to(tl.int64)
        inside_m = m0 + i < rows
        at = part + base * part_row + (i * part_row)[None, :] + j[:, None]
        tile = tl.load(at, mask=inside_m[None, :], other=0.0)
        at = h + (base * h_row + low) + (i * h_row)[:, None] + r[None, :]
        thin = tl.load(at, mask=inside_m[:, None] & (r < ranks)[None, :], other=0.0)
        b_sum = tl.dot(tile, thin, b_sum)
        at = dy + (base * columns + n0) + (i * columns)[None, :] + j[:, None]
        tl.store(at, tile, mask=inside_m[None, :])
        products = tl.dot(left, tl.reshape(tile, [WARPS, PART, BLOCK_M]))
        at = hidden + base * BLOCK_R + (i * BLOCK_R)[None, :] + r[:, None]
        tl.store(at, tl.sum(products, axis=0), mask=(m0 + i < last)[None, :])
    at = b_sums + (first * columns + n0 + j).to(tl.int64)[:, None] * sums + (low + r)[None, :]
    tl.store(at, b_sum, mask=(r < ranks)[None, :])


def pack_and_slices(
    parts: Sequence[Tensor],  # 1 to 3 of [M, N / P] of 16 bits, rows contiguous
    h: Tensor,  # [M, sum R], of their dtype, likewise
    before: Adapters | Packed,  # of the linear whose y they are gradients of
    tile: ElementTile | None = None,
) -> PackSlices:
    """dy of its parts, and what its rows and columns are parts of: db of h, and dh = dy b."""
    (rows, width), like, border = parts[0].shape, parts[0], of_b(before)
    columns = width * len(parts)
    for matrix, size in (*((part, width) for part in parts), (h, border.rank)):
        assert matrix.shape == (rows, size), (tuple(matrix.shape), rows, size)
        assert matrix.stride(1) == 1, matrix.stride()
        assert matrix.dtype is like.dtype and like.element_size() == 2, matrix.dtype
    assert packs_gradients(width, before.spans), (width, before.spans)
    given = ("pack_grads", rows, columns, border.rank, like.dtype, like.device)
    tile = tile or tile_of(*given)
    assert width % tile.block_n == 0, (width, tile)
    slices = slices_of(rows, columns, tile, like.device, PACK_BESIDE)
    sums = triton.cdiv(border.rank, 16) * 16
    block_r = power_of_two(max(span.rank for span in before.spans), 16, MOST_GRAD_RANKS)
    dy = like.new_empty(rows, columns)
    b, hidden = (
        like.new_empty(sizes, dtype=torch.float32)
        for sizes in ((slices, columns, sums), (columns // tile.block_n, rows, block_r))
    )
    args = (
        *(tuple(parts), tuple(part.stride(0) for part in parts), h, h.stride(0), border),
        *(dy, b, hidden, rows, columns, width, sums, slices),
    )
    constants = dict(
        RANKS=gcd(16, *border.firsts),
        **tile.arguments(),
        BLOCK_R=block_r,
        STAGES=tile.stages,
        WARPS=tile.warps,
    )
    grid = (columns // tile.block_n * slices,)
    compiled = launch(_pack_grads, grid, like.device, args, constants, [dy, b, hidden])
    if not spills.seen(compiled):
        spills.look(compiled, "pack_grads", tile, like)
    return PackSlices(dy, b, hidden)


def slices_of(
    rows: int,
    columns: int,
    tile: Tile | DerivativeTile | ElementTile,
    device: torch.device,
    beside: int = 0,  # steps that a program's sums take, and its first loads
) -> int:
    """The fewest slices of rows whose programs end soonest, one at a time a multiprocessor."""
    blocks, steps = columns // tile.block_n, triton.cdiv(rows, tile.block_m)
    processors = multiprocessors(device)

    def time(slices: int) -> int:
        return triton.cdiv(blocks * slices, processors) * (triton.cdiv(steps, slices) + beside)

    return min(range(1, max(1, min(steps, MOST_SLICES)) + 1), key=time)
