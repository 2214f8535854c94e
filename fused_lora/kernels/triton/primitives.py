"""What the kernels of this room share: the border, and the order of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_lora.kernels.triton.dropout import kept


@triton.jit
def _inside(border, g: tl.constexpr, r, c):
    """Whether element (r, c) belongs to group ``g``."""
    inside_r = (r >= border.firsts[g]) & (r < border.firsts[g + 1])
    return inside_r & (c >= border.starts[g]) & (c < border.stops[g])


@triton.jit
def _address(border, g: tl.constexpr, r, c):
    """Where element (r, c) lies if it belongs to group ``g``."""
    rows = (r - border.firsts[g]) * border.rank_strides[g]
    columns = (c - border.starts[g]) * border.column_strides[g]
    return border.blocks[g] + rows + columns


@triton.jit
def _rank_address(border, g: tl.constexpr, r):
    """Where element (r, 0) would lie if group ``g`` had it."""
    rows = (r - border.firsts[g]) * border.rank_strides[g]
    return border.blocks[g] + rows - border.starts[g] * border.column_strides[g]


@triton.jit
def load_border(border, r, c, dtype: tl.constexpr):
    """Elements (r, c) of the border in ``dtype``; r and c broadcast, either may come first.

    One load for all groups: each would otherwise keep its own stages in shared memory. A rank
    belongs to one group, so that groups are told apart by rank alone, before anything is 2-D.
    """
    if border.columns is not None:
        at = border.blocks[0] + r * border.rank_strides[0] + c * border.column_strides[0]
        inside = (r < border.firsts[len(border.scales)]) & (c < border.columns)
        return tl.load(at, mask=inside, other=0.0).to(dtype)
    at, step = _rank_address(border, 0, r), border.column_strides[0]
    start, stop = border.starts[0], tl.where(r < border.firsts[1], border.stops[0], 0)
    for g in tl.static_range(1, len(border.blocks)):
        own = (r >= border.firsts[g]) & (r < border.firsts[g + 1])
        at = tl.where(own, _rank_address(border, g, r), at)
        step = tl.where(own, border.column_strides[g], step)
        start = tl.where(own, border.starts[g], start)
        stop = tl.where(own, border.stops[g], stop)
    return tl.load(at + c * step, mask=(c >= start) & (c < stop), other=0.0).to(dtype)


@triton.jit
def store_border(border, r, c, tile, ADD: tl.constexpr):
    """Write ``tile`` to elements (r, c) of the border, or add it to them."""
    for g in tl.static_range(len(border.blocks)):
        address, inside = _address(border, g, r, c), _inside(border, g, r, c)
        value = tile
        if ADD:
            value += tl.load(address, mask=inside, other=0.0).to(tl.float32)
        tl.store(address, value.to(border.blocks[g].dtype.element_ty), mask=inside)


@triton.jit
def rank_range(border, first, last):
    """Ranks [low, high) of the groups that own any of columns [first, last), low mod 16 = 0."""
    low = border.firsts[len(border.scales)] + 0
    high = 0
    for g in tl.static_range(len(border.scales)):
        touches = (border.starts[g] < last) & (border.stops[g] > first)
        low = tl.where(touches, tl.minimum(low, border.firsts[g]), low)
        high = tl.where(touches, tl.maximum(high, border.firsts[g + 1]), high)
    return low // 16 * 16, high


@triton.jit
def column_range(border, first, last):
    """Columns [low, high) of the groups that own any of ranks [first, last), low mod 16 = 0."""
    low = border.starts[0] + 0
    high = 0
    for g in tl.static_range(len(border.scales)):
        touches = (border.firsts[g] < last) & (border.firsts[g + 1] > first)
        empty = high == 0
        start = tl.where(empty, border.starts[g], tl.minimum(low, border.starts[g]))
        low = tl.where(touches, start, low)
        high = tl.where(touches, tl.maximum(high, border.stops[g]), high)
    return low // 16 * 16, high


@triton.jit
def rank_scales(border, r):
    """s of the group of each rank."""
    scales = tl.zeros_like(r).to(tl.float32)
    for g in tl.static_range(len(border.scales)):
        inside = (r >= border.firsts[g]) & (r < border.firsts[g + 1])
        scales = tl.where(inside, border.scales[g], scales)
    return scales


@triton.jit
def column_scales(border, c):
    """s of the group of each column; where groups share columns they share s."""
    scales = tl.zeros_like(c).to(tl.float32)
    for g in tl.static_range(len(border.scales)):
        inside = (c >= border.starts[g]) & (c < border.stops[g])
        scales = tl.where(inside, border.scales[g], scales)
    return scales


@triton.jit
def expand(
    acc,
    h,  # [M, R]
    h_row,
    border,  # [R, N]
    m,
    n,
    rows,
    first,
    columns,
    dropout,  # of the columns, or None
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_R: tl.constexpr,
):
    """acc + s h border over the ranks that own any of columns n, which begin at ``first``."""
    BLOCK_N: tl.constexpr = acc.shape[1]
    h_rows = h + m.to(tl.int64)[:, None] * h_row
    low, high = rank_range(border, first, first + BLOCK_N)
    for r0 in tl.range(low, high, BLOCK_R, num_stages=2):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = (m < rows)[:, None] & (r < high)[None, :]
        h_tile = tl.load(h_rows + r[None, :], mask=inside, other=0.0)
        border_tile = load_border(border, r[:, None], n[None, :], h.dtype.element_ty)
        acc = tl.dot(h_tile, border_tile, acc, input_precision=PRECISION)
    acc *= column_scales(border, n)[None, :]
    if dropout is not None:
        acc = tl.where(kept(dropout, m, first, columns, BLOCK_N), acc * dropout.inverse, 0.0)
    return acc


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a program: bands of GROUP_M rows of tiles, so that L2 keeps both operands."""
    band = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return band * GROUP_M + inside % height, inside // height
