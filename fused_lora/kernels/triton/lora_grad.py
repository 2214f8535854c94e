"""Gradients formed where GELU's derivative is taken: behind dx, or alone.

EXTENDED dx on its way through GELU's derivative, and the gradients whose operands lie in its
tiles: x = act(u) need not be read again, nor du once it is written.

    du [M, K] = act'(u) (dy w + dh a)
    da = dhT act(u)          of this linear
    db' = s' duT h'          of the linear that made u, h' [M, sum R'] what it formed

           columns of u      One program per block of columns and slice of rows. It walks its row
    rows [ z | z | z ]       blocks in order and holds both sums in registers; what it leaves are
         [ z | z | z ]       the sums of its slice, fp32, which others add in a fixed order.

Tiles lie transposed, [columns, rows]: so an accumulator is, register for register, the left
operand of the next product, and neither x nor du passes through shared memory for it. Both are
rounded as they are stored before the gradients read them.

Where the library writes dg = dy w, the derivative is a pass of its own, which adds what is left:

    du [M, K] = act'(u) (dg + dh a)
    da = dhT act(u)     db' = s' duT h'     dh' = s' du b', b' [K, sum R']

Its programs are those above without the product, of more columns; each leaves fp32 sums of dh'
over its own, which ``add_blocks`` adds in a fixed order. dg and u are held a step ahead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Packed,
    load_border,
    of_a,
    of_b,
    packed,
    rank_scales,
)
from fused_lora.kernels.triton.elementwise import gelu, gelu_grad
from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.launches import extended_grads, gelu_grads
from fused_lora.kernels.triton.lora_grad_rank import slices_of
from fused_lora.kernels.triton.tiles import (
    CONTRACTED,
    MOST_GRAD_RANKS,
    DerivativeTile,
    Tile,
    extended_grads_tile,
    gelu_grads_tile,
    holds_gradients,
    power_of_two,
)

HIDDEN_BLOCK, HIDDEN_PARTS = 512, 16  # of dh': elements per program, blocks it reads at a time


class GradSlices(NamedTuple):
    """What one pass leaves; ranks in whole 16."""

    du: Tensor  # [M, K]
    a: Tensor  # [slices, K, sum R], fp32: parts of da, transposed
    b: Tensor  # [slices, K, sum R'], fp32: parts of db', before its scale
    hidden: Tensor | None = None  # [blocks, M, sum R'], fp32: parts of dh', before its scale


@triton.jit
def _held_as(x, like):
    """x by the threads that hold ``like``: else GELU is formed in each layout that reads it."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f,f", [x, like], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _grads_of_tile(
    acc,  # [BLOCK_N, BLOCK_M] fp32: dx, transposed
    a_sum,  # [BLOCK_N, ranks of dh] fp32
    b_sum,  # [BLOCK_N, ranks of h]
    dh,  # [M, R] from the first row of the tile, as are the next three
    dh_row,
    h,  # [M, R']
    h_row,
    u,  # [M, K] from the first column too, as is the next
    u_row,
    du,  # [M, K], contiguous
    inside_m,  # whether there is such a row
    columns,
    ranks,
    ranks_before,
    ACTIVATION: tl.constexpr,
    ONCE: tl.constexpr,  # GELU is formed so; beside a large accumulator its registers spill
):
    """du of one tile, as it is rounded and stored, and both sums with its own in them."""
    dtype: tl.constexpr = dh.dtype.element_ty
    i, j = tl.arange(0, acc.shape[1]), tl.arange(0, acc.shape[0])
    r, r_before = tl.arange(0, a_sum.shape[1]), tl.arange(0, b_sum.shape[1])
    at = u + (i * u_row)[None, :] + j[:, None]
    value = tl.load(at, mask=inside_m[None, :], other=0.0).to(tl.float32)
    value = _held_as(value, acc) if ONCE else value
    out = (acc * gelu_grad(value, ACTIVATION)).to(dtype)
    x = gelu(value, ACTIVATION)
    x = (_held_as(x, acc) if ONCE else x).to(dtype)
    at = h + (i * h_row)[:, None] + r_before[None, :]
    h_tile = tl.load(at, mask=inside_m[:, None] & (r_before < ranks_before)[None, :], other=0.0)
    at = dh + (i * dh_row)[:, None] + r[None, :]
    dh_tile = tl.load(at, mask=inside_m[:, None] & (r < ranks)[None, :], other=0.0)
    a_sum = tl.dot(x, dh_tile, a_sum)
    b_sum = tl.dot(out, h_tile, b_sum)
    tl.store(du + (i * columns)[None, :] + j[:, None], out, mask=inside_m[None, :])
    return out, a_sum, b_sum


@triton.jit
def _extended_grads(
    dy,  # [M, N]
    dy_row,
    w,  # [N, K]
    w_row,
    w_column,
    dh,  # [M, R]
    dh_row,
    border,  # a, [R, K]
    h,  # [M, R']
    h_row,
    u,  # [M, K]
    u_row,
    du,  # [M, K], contiguous
    a_sums,  # [slices, K, BLOCK_A]
    b_sums,  # [slices, K, BLOCK_B]
    rows,
    columns,  # K, whole blocks of it
    depth,  # N, likewise
    ranks,
    ranks_before,  # R'
    slices,
    ACTIVATION: tl.constexpr,  # erf or tanh
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,  # holds all ranks
    BLOCK_B: tl.constexpr,  # likewise R'
):
    dtype: tl.constexpr = dy.dtype.element_ty
    blocks = columns // BLOCK_N
    first = tl.program_id(0) // blocks
    n0 = tl.program_id(0) % blocks * BLOCK_N
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    r, r_before = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    n = n0 + j
    a_sum = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    b_sum = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    # What does not change with the row block is made again in each: no register waits with it.
    for block in tl.range(first, tl.cdiv(rows, BLOCK_M), slices, disable_licm=True):
        m0 = block * BLOCK_M
        base = m0.to(tl.int64)
        inside_m = m0 + i < rows

        dh_at = dh + base * dh_row
        inside = inside_m[None, :] & (r < ranks)[:, None]
        thin = tl.load(dh_at + (i * dh_row)[None, :] + r[:, None], mask=inside, other=0.0)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        acc = tl.dot(load_border(border, r[None, :], n[:, None], dtype), thin, acc)
        w_tile = w + n.to(tl.int64)[:, None] * w_column + k.to(tl.int64)[None, :] * w_row
        dy_tile = dy + base * dy_row + (i * dy_row)[None, :] + k[:, None]
        for _ in range(0, depth, BLOCK_K):
            right = tl.load(dy_tile, mask=inside_m[None, :], other=0.0)
            acc = tl.dot(tl.load(w_tile), right, acc)
            w_tile += BLOCK_K * w_row
            dy_tile += BLOCK_K

        h_at, u_at = h + base * h_row, u + (base * u_row + n0)
        du_at = du + (base * columns + n0)
        _, a_sum, b_sum = _grads_of_tile(
            acc, a_sum, b_sum, dh_at, dh_row, h_at, h_row, u_at, u_row, du_at,
            inside_m, columns, ranks, ranks_before, ACTIVATION, ONCE=False,
        )  # fmt: skip
    column = (first * columns + n).to(tl.int64)[:, None]
    tl.store(a_sums + column * BLOCK_A + r[None, :], a_sum)
    tl.store(b_sums + column * BLOCK_B + r_before[None, :], b_sum)


def input_grad_and_slices(
    dy: Tensor,  # [M, N] of 16 bits, rows contiguous
    w: Tensor,  # [N, K], dy's dtype, any strides
    adapters: Adapters | Packed,  # sum R <= 32
    dh: Tensor,  # [M, sum R], dy's dtype, rows contiguous
    activation: str,  # GELU: erf, tanh
    u: Tensor,  # [M, K], dy's dtype, rows contiguous
    h: Tensor,  # [M, sum R'] of the linear that made u, likewise; sum R' <= 32
    tile: Tile | None = None,
) -> GradSlices:
    """du = act'(u) (dy w + dh a), and what its rows are parts of: da of act(u), db' of h."""
    adapters = packed(adapters, dy.dtype)
    (rows, depth), columns, border = dy.shape, w.shape[1], of_a(adapters)
    for matrix, width in ((dh, border.rank), (u, columns), (h, h.shape[1])):
        assert matrix.shape == (rows, width) and matrix.stride(1) == 1, matrix.stride()
        assert matrix.dtype is dy.dtype is w.dtype and dy.element_size() == 2, matrix.dtype
    assert w.shape[0] == depth and dy.stride(1) == 1, (w.shape, dy.stride())
    ranks = max(border.rank, h.shape[1])
    assert holds_gradients(columns, depth, ranks), (columns, depth, ranks)
    tile = tile or extended_grads_tile(dy.device)
    slices = slices_of(rows, columns, tile, dy.device)
    block_a, block_b = (power_of_two(t.shape[1], 16, MOST_GRAD_RANKS) for t in (dh, h))
    du = dy.new_empty(rows, columns)
    sums = [
        dy.new_empty((slices, columns, block), dtype=torch.float32) for block in (block_a, block_b)
    ]
    args = (
        *(dy, dy.stride(0), w, w.stride(0), w.stride(1), dh, dh.stride(0), border),
        *(h, h.stride(0), u, u.stride(0), du, *sums),
        *(rows, columns, depth, border.rank, h.shape[1], slices),
    )
    constants = dict(
        ACTIVATION=activation,
        **{name: n for name, n in tile.arguments().items() if name != "GROUP_M"},
        BLOCK_A=block_a,
        BLOCK_B=block_b,
    )
    grid = (columns // tile.block_n * slices,)
    compiled = launch(_extended_grads, grid, dy.device, args, constants, [du, *sums])
    if not spills.seen(compiled):
        spills.look(compiled, extended_grads(activation) + border.word, tile, dy)
    return GradSlices(du, *sums)


@triton.jit
def _activation_grads(
    dg,  # [M, K]
    dg_row,
    dh,  # [M, R]
    dh_row,
    border,  # a, [R, K]
    h,  # [M, R']
    h_row,
    before,  # b', transposed, [R', K]
    u,  # [M, K]
    u_row,
    du,  # [M, K], contiguous
    a_sums,  # [slices, K, BLOCK_A]
    b_sums,  # [slices, K, BLOCK_B]
    hidden,  # [blocks, M, BLOCK_B]
    rows,
    columns,  # K, whole blocks of it
    ranks,
    ranks_before,  # R'
    slices,
    ACTIVATION: tl.constexpr,  # erf or tanh
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,  # of BLOCK_N
    BLOCK_A: tl.constexpr,  # holds all ranks
    BLOCK_B: tl.constexpr,  # likewise R'
    STAGES: tl.constexpr,  # which loads outside products have where the loop names it
):
    dtype: tl.constexpr = dg.dtype.element_ty
    OWN_N: tl.constexpr = BLOCK_N // SHARES
    blocks = columns // BLOCK_N
    first, own = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n0 = own * BLOCK_N
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    r, r_before = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    n = n0 + j
    left = load_border(border, r[None, :], n[:, None], dtype)
    if SHARES == 1:
        left_before = load_border(before, r_before[:, None], n[None, :], dtype)
    else:
        share, own_n = tl.arange(0, SHARES)[:, None, None], tl.arange(0, OWN_N)[None, None, :]
        own_n += n0 + share * OWN_N
        left_before = load_border(before, r_before[None, :, None], own_n, dtype)
    a_sum = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    b_sum = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    hidden += own.to(tl.int64) * rows * BLOCK_B
    for block in tl.range(
        first, tl.cdiv(rows, BLOCK_M), slices, num_stages=STAGES, disable_licm=True
    ):
        m0 = block * BLOCK_M
        base = m0.to(tl.int64)
        inside_m = m0 + i < rows
        dh_at = dh + base * dh_row
        inside = inside_m[None, :] & (r < ranks)[:, None]
        thin = tl.load(dh_at + (i * dh_row)[None, :] + r[:, None], mask=inside, other=0.0)
        at = dg + (base * dg_row + n0) + (i * dg_row)[None, :] + j[:, None]
        acc = tl.load(at, mask=inside_m[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(left, thin, acc)
        h_at, u_at = h + base * h_row, u + (base * u_row + n0)
        du_at = du + (base * columns + n0)
        out, a_sum, b_sum = _grads_of_tile(
            acc, a_sum, b_sum, dh_at, dh_row, h_at, h_row, u_at, u_row, du_at,
            inside_m, columns, ranks, ranks_before, ACTIVATION, ONCE=True,
        )  # fmt: skip
        at = hidden + base * BLOCK_B + (i * BLOCK_B)[None, :] + r_before[:, None]
        if SHARES == 1:
            part = tl.dot(left_before, out)
        else:
            part = tl.sum(tl.dot(left_before, tl.reshape(out, [SHARES, OWN_N, BLOCK_M])), axis=0)
        tl.store(at, part, mask=inside_m[None, :])
    column = (first * columns + n).to(tl.int64)[:, None]
    tl.store(a_sums + column * BLOCK_A + r[None, :], a_sum)
    tl.store(b_sums + column * BLOCK_B + r_before[None, :], b_sum)


def activation_grad_and_slices(
    dg: Tensor,  # [M, K] of 16 bits, rows contiguous: dy w
    adapters: Adapters | Packed,  # sum R <= 32
    dh: Tensor,  # [M, sum R], dg's dtype, rows contiguous
    activation: str,  # GELU: erf, tanh
    u: Tensor,  # [M, K], dg's dtype, rows contiguous
    h: Tensor,  # [M, sum R'] of the linear that made u, likewise; sum R' <= 32
    before: Adapters | Packed,  # that linear's
    tile: DerivativeTile | None = None,
) -> GradSlices:
    """du = act'(u) (dg + dh a), and what its rows and columns are parts of: da of act(u), db' of
    h, and dh' = du b'."""
    (rows, columns), border, other = dg.shape, of_a(adapters), of_b(before)
    for matrix, width in ((dg, columns), (dh, border.rank), (u, columns), (h, other.rank)):
        assert matrix.shape == (rows, width), (tuple(matrix.shape), rows, width)
        assert matrix.stride(1) == 1, matrix.stride()
        assert matrix.dtype is dg.dtype and dg.element_size() == 2, matrix.dtype
    ranks = max(border.rank, other.rank)
    assert holds_gradients(columns, 0, ranks), (columns, ranks)
    tile = tile or gelu_grads_tile(columns, dg.device)
    assert columns % tile.block_n == 0, (columns, tile)
    slices = slices_of(rows, columns, tile, dg.device)
    block_a, block_b = (power_of_two(t.shape[1], 16, MOST_GRAD_RANKS) for t in (dh, h))
    du = dg.new_empty(rows, columns)
    a, b, hidden = (
        dg.new_empty(sizes, dtype=torch.float32)
        for sizes in (
            *((slices, columns, block) for block in (block_a, block_b)),
            (columns // tile.block_n, rows, block_b),
        )
    )
    args = (
        *(dg, dg.stride(0), dh, dh.stride(0), border, h, h.stride(0), other),
        *(u, u.stride(0), du, a, b, hidden),
        *(rows, columns, border.rank, other.rank, slices),
    )
    constants = dict(
        ACTIVATION=activation,
        **tile.arguments(),
        BLOCK_A=block_a,
        BLOCK_B=block_b,
        STAGES=tile.stages,
    )
    grid = (columns // tile.block_n * slices,)
    compiled = launch(_activation_grads, grid, dg.device, args, constants, [du, a, b, hidden])
    if not spills.seen(compiled):
        spills.look(compiled, gelu_grads(activation), tile, dg)
    return GradSlices(du, a, b, hidden)


@triton.jit
def _add_blocks(
    hidden,  # [blocks, M, WIDTH] fp32
    border,  # b, transposed: its scales, and which blocks are whose
    out,  # [M, R], contiguous
    blocks,
    rows,
    ranks,
    OWN: tl.constexpr,  # columns of a block that holds its own adapter's ranks alone; 0: all ranks
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,  # holds R
    BLOCKS: tl.constexpr,  # read at a time
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m, r = e // RANKS, (e % RANKS).to(tl.int32)
    begin, count, low = tl.zeros_like(r), tl.zeros_like(r), tl.zeros_like(r)
    most = 0
    if OWN:
        for g in tl.static_range(len(border.scales)):
            own = (r >= border.firsts[g]) & (r < border.firsts[g + 1])
            of_g = (border.stops[g] - border.starts[g]) // OWN
            begin = tl.where(own, border.starts[g] // OWN, begin)
            count = tl.where(own, of_g, count)
            low = tl.where(own, border.firsts[g], low)
            most = tl.maximum(most, of_g)
    else:
        count += blocks
        most += blocks
    at = hidden + begin.to(tl.int64) * rows * WIDTH + m * WIDTH + (r - low)
    inside = (m < rows) & (r < ranks)
    total = tl.zeros([BLOCK], tl.float32)
    for b0 in range(0, most, BLOCKS):
        b = b0 + tl.arange(0, BLOCKS)
        read = (b[:, None] < count[None, :]) & inside[None, :]
        address = at[None, :] + b.to(tl.int64)[:, None] * rows * WIDTH
        total += tl.sum(tl.load(address, mask=read, other=0.0), axis=0)
    total *= rank_scales(border, r)
    tl.store(out + m * ranks + r, total.to(out.dtype.element_ty), mask=inside)


def add_blocks(
    hidden: Tensor,  # [blocks, M, 16 or more], fp32, contiguous
    before: Adapters | Packed,  # as whoever left it was given
    dtype: torch.dtype,
    out: Tensor | None = None,  # [M, sum R'], contiguous, in ``dtype``
    columns: int | None = None,  # of dy, by ``pack_and_slices``: a block has its adapter's ranks
) -> Tensor:
    """dh' = s' du b' [M, sum R'], its blocks added in a fixed order and rounded once."""
    blocks, rows, width = hidden.shape
    border, own = of_b(before), 0 if columns is None else columns // blocks
    widest = max(span.rank for span in before.spans) if own else border.rank
    assert widest <= width and hidden.is_contiguous(), (widest, hidden.stride())
    out = hidden.new_empty((rows, border.rank), dtype=dtype) if out is None else out
    assert out.shape == (rows, border.rank) and out.is_contiguous() and out.dtype is dtype
    if rows == 0:
        return out
    most = max(span.width for span in before.spans) // own if own else blocks
    ranks = power_of_two(border.rank, 16, 1 << 16)
    args = (hidden, border, out, blocks, rows, border.rank)
    constants = dict(
        **dict(OWN=own, WIDTH=width, RANKS=ranks, BLOCKS=power_of_two(most, 1, HIDDEN_PARTS)),
        **dict(BLOCK=HIDDEN_BLOCK, num_warps=4),
    )
    grid = (triton.cdiv(rows * ranks, HIDDEN_BLOCK),)
    launch(_add_blocks, grid, hidden.device, args, constants | CONTRACTED, [out])
    return out
