"""Borders: adapters as kernels read them, packed in one launch; the steps that load them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.philox import kept
from fused_lora.kernels.triton.tiles import PACK, power_of_two
from fused_lora.programs.record import begins_at
from fused_lora.types import Span


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


# The adapters of one call as kernels read them: one border [sum R, C] made of G blocks.
#
#                 columns of group 0   group 1
#     ranks of 0  [     block 0      |    0    ]     of a: every block spans all K columns of x
#     ranks of 1  [        0         | block 1 ]     of b, transposed: block g lies in g's span of y
#
# Every kernel of this room is a product with this matrix: shrink x aT and dy (s b), expand h (s b)T
# and dh a, merge (s b) a, and the gradients are border-shaped outputs.
#
# A block may stay where it is, in its own dtype and strides. Products read the border in steps
# beside x and w, in their dtype and by wide copies: where it does not lie so, by dtype or because
# its blocks are several or have odd rows, a and b are packed before, each as one matrix with rows
# of whole 16 elements and without scales, both in one launch (``packed``).


class Border(NamedTuple):
    """One entry per group in most fields; Triton takes it apart as a kernel argument."""

    blocks: tuple[Tensor, ...]  # G of [R_g, C_g], one dtype; or all of it, [sum R, columns]
    rank_strides: tuple[int, ...]
    column_strides: tuple[int, ...]
    firsts: tuple[int, ...]  # G + 1: stacked rank where each begins; the last is sum R
    starts: tuple[int, ...]  # first column of each
    stops: tuple[int, ...]  # one past the last
    scales: tuple[float, ...]  # s_g, or 1 where the product carries none
    columns: int | None = None  # where the first block is all of it; else None

    @property
    def rank(self) -> int:
        """sum R."""
        return self.firsts[-1]

    @property
    def word(self) -> str:
        """What is said behind the name of a product with it, where several have odd ranks."""
        odd = len(self.scales) > 1 and any(first % 16 for first in self.firsts)
        return " ragged" if odd else ""

    def rank_block(self, most: int) -> int:
        """Ranks per step of a loop; of ragged ranks 16, each of which is loaded by itself."""
        ragged = any(first % 16 for first in self.firsts)
        return 16 if ragged else power_of_two(self.rank, 16, most)


class Packed(NamedTuple):
    """Adapters in the compute dtype, each half one matrix with rows of whole 16 elements."""

    a: Tensor  # [sum R, K or more], zeros behind K
    b: Tensor  # [sum R, N or more], transposed; zeros where a column is not of the rank's group
    k: int
    scales: Sequence[float]  # G
    spans: Sequence[Span]  # G

    @property
    def rank(self) -> int:
        """sum R."""
        return sum(span.rank for span in self.spans)


def of_a(adapters: Adapters | Packed, blocks: Sequence[Tensor] | None = None) -> Border:
    """The a, or tensors shaped like them, over all K columns of x, unscaled."""
    ones = [1.0] * len(adapters.spans)
    if isinstance(adapters, Packed):
        return _of_one(adapters.a, adapters, [(0, adapters.k)] * len(ones), ones)
    blocks = adapters.a if blocks is None else blocks
    return _border(blocks, [(0, block.shape[1]) for block in blocks], ones)


def of_b(adapters: Adapters | Packed, blocks: Sequence[Tensor] | None = None) -> Border:
    """The b, or tensors shaped like them, transposed, each over its span of y."""
    columns = [(span.start, span.stop) for span in adapters.spans]
    if isinstance(adapters, Packed):
        return _of_one(adapters.b, adapters, columns, adapters.scales)
    blocks = adapters.b if blocks is None else blocks
    return _border([block.t() for block in blocks], columns, adapters.scales)


def _border(
    blocks: Sequence[Tensor], columns: Sequence[tuple[int, int]], scales: Sequence[float]
) -> Border:
    for block, (start, stop) in zip(blocks, columns, strict=True):
        assert block.shape[1] == stop - start, (tuple(block.shape), start, stop)
        assert block.dtype is blocks[0].dtype, (block.dtype, blocks[0].dtype)
    strides = [tuple(block.stride(i) for block in blocks) for i in (0, 1)]
    ranks = [block.shape[0] for block in blocks]
    narrow = len(blocks) == 1 and columns[0][0] == 0 and blocks[0].element_size() == 2
    whole = columns[0][1] if narrow else None  # wider elements are copied one by one, if need be
    extents = _extents(ranks, columns, scales)
    return Border(tuple(blocks), strides[0], strides[1], *extents, whole)


def _of_one(
    matrix: Tensor, both: Packed, columns: Sequence[tuple[int, int]], scales: Sequence[float]
) -> Border:
    ranks = [span.rank for span in both.spans]
    extents = _extents(ranks, columns, scales)
    return Border((matrix,), (matrix.stride(0),), (1,), *extents, matrix.shape[1])


def _extents(
    ranks: Sequence[int], columns: Sequence[tuple[int, int]], scales: Sequence[float]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    starts, stops = zip(*columns, strict=True)
    return tuple(accumulate(ranks, initial=0)), starts, stops, tuple(map(float, scales))


class Pieces(NamedTuple):
    """What one launch packs."""

    borders: tuple[Border, ...]  # each [R, columns]
    outs: tuple[Tensor, ...]  # each [R, row]
    rows: tuple[int, ...]  # how long those of each are

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of columns, of all in turn, and of ranks."""
        blocks = sum(triton.cdiv(row, PACK.block_n) for row in self.rows)
        return blocks, triton.cdiv(max(out.shape[0] for out in self.outs), PACK.block_m)


@triton.jit
def _pack_block(border, out, out_row, first, block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ranks from ``first``, columns of ``block``; what no group owns is zero."""
    r = first + tl.arange(0, BLOCK_M)
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = load_border(border, r[:, None], c[None, :], out.dtype.element_ty)
    inside = (r < border.firsts[len(border.scales)])[:, None] & (c < out_row)[None, :]
    tl.store(out + r[:, None] * out_row + c[None, :], tile, mask=inside)


@triton.jit
def _pack_blocks(borders, outs, rows, block, rank, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block ``block`` of columns of all pieces in turn, from rank ``rank``."""
    first = 0
    for i in tl.static_range(len(rows)):  # len(borders) fails in 3.6, where one has a None in it
        blocks = tl.cdiv(rows[i], BLOCK_N)
        if (block >= first) & (block < first + blocks):
            _pack_block(borders[i], outs[i], rows[i], rank, block - first, BLOCK_M, BLOCK_N)
        first += blocks


@triton.jit
def _pack(
    borders,  # as in ``Pieces``
    outs,
    rows,
    BLOCK_M: tl.constexpr,  # ranks
    BLOCK_N: tl.constexpr,
):
    rank = tl.program_id(1) * BLOCK_M
    _pack_blocks(borders, outs, rows, tl.program_id(0), rank, BLOCK_M, BLOCK_N)


@triton.jit
def pack_beside(borders, outs, rows, program, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same in a launch of another kernel, whose programs past its own are numbered from 0."""
    blocks = 0
    for i in tl.static_range(len(rows)):
        blocks += tl.cdiv(rows[i], BLOCK_N)
    rank = program // blocks * BLOCK_M
    _pack_blocks(borders, outs, rows, program % blocks, rank, BLOCK_M, BLOCK_N)


def packed(adapters: Adapters | Packed, dtype: torch.dtype, rows: int = 0) -> Adapters | Packed:
    """``adapters`` as products of ``dtype`` read them: as they are, or packed in one launch.

    In a program that launch is one for all adapters of its inputs; and where what it writes is no
    larger than an h of ``rows``, it is kept for backward.
    """
    return packed_together([adapters], dtype, rows)[0]


def packed_together(
    every: Sequence[Adapters | Packed], dtype: torch.dtype, rows: int = 0
) -> list[Adapters | Packed]:
    """The same of several in one launch."""
    found, pieces = packing(every, dtype)
    if pieces:
        keeps = sum(pieces.rows) <= rows
        device = pieces.outs[0].device
        launch(_pack, pieces.grid, device, pieces, PACK.arguments(), pieces.outs, keeps)
    return found


def packing(
    every: Sequence[Adapters | Packed], dtype: torch.dtype
) -> tuple[list[Adapters | Packed], Pieces | None]:
    """Those of them that are packed uninitialised, and what packs them; None where nothing is."""
    found = [
        each if isinstance(each, Packed) or _lies_so(each, dtype) else _place(each, dtype)
        for each in every
    ]
    pieces = [
        piece
        for own, made in zip(every, found, strict=True)
        if made is not own and made.rank
        for piece in ((of_a(own), made.a), (of_b(own), made.b))  # type: ignore[union-attr]
    ]
    if not pieces:
        return found, None
    borders, outs = zip(*pieces, strict=True)
    return found, Pieces(borders, outs, tuple(out.shape[1] for out in outs))


def _place(adapters: Adapters, dtype: torch.dtype) -> Packed:
    """Where ``adapters`` are to be packed: uninitialised."""
    rank, like = adapters.rank, adapters.a[0]
    columns = like.shape[1], max(span.stop for span in adapters.spans)
    a, b = (like.new_empty((rank, (c + 15) // 16 * 16), dtype=dtype) for c in columns)
    return Packed(a, b, like.shape[1], adapters.scales, adapters.spans)


def _lies_so(adapters: Adapters, dtype: torch.dtype) -> bool:
    """Whether steps of it can be copied as they are: elements of 4 bytes always, of 2 in eights."""
    if any(t.dtype is not dtype for t in (*adapters.a, *adapters.b)):
        return False
    if dtype.itemsize >= 4:
        return True
    return (
        len(adapters.a) == 1
        and adapters.spans[0].start == 0
        and all(
            min(t.stride()) == 1 and max(t.stride()) % 8 == 0 and begins_at(t) % 16 == 0
            for t in (*adapters.a, *adapters.b)
        )
    )
