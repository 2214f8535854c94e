"""w' = w + s b a, of one weight or of many in one launch; and w beside s b or a."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    column_scales,
    load_border,
    of_a,
    of_b,
    rank_range,
    rank_scales,
)
from fused_lora.kernels.triton.launch import launch, on_device, words
from fused_lora.kernels.triton.philox import random16, random16_of_blocks, stochastic_round
from fused_lora.kernels.triton.tiles import PACK, ElementTile, MergeTile
from fused_lora.types import Span

# MERGE: w' = w + s b a, rounded once, to nearest or stochastically.
#
#     w'[n, k] = w[n, k] + s_n sum_r border_b[r, n] border_a[r, k]
#
#                 w, w' [N, K]   border_b [sum R, N]   border_a [sum R, K]
#
# All adapters of one matrix in one launch; a column range of y is a range of rows of w. Products of
# b and a, their sum and the addition are fp32. The random bits are those of reference/philox.py.


TILE = MergeTile()


@triton.jit
def store_merged(
    w,  # [N, K]
    w_row,
    out,  # [N, K]
    out_row,
    update,  # fp32 tile of s b a
    n,  # its rows
    first_k,  # its first column
    rows,
    columns,
    offset,  # random index of element (0, 0)
    seed_low,
    seed_high,
    step_low,
    step_high,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,  # offset and columns are multiples of 8
):
    """Round w + update once, and store it."""
    n64, k = n.to(tl.int64)[:, None], first_k + tl.arange(0, update.shape[1])
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    merged = tl.load(w + n64 * w_row + k[None, :], mask=inside, other=0.0).to(tl.float32) + update
    if STOCHASTIC:
        if BLOCKS:
            eights = first_k // 8 + tl.arange(0, update.shape[1] // 8)
            block = offset // 8 + n64 * (columns // 8) + eights[None, :]
            random = random16_of_blocks(block, seed_low, seed_high, step_low, step_high)
        else:
            element = offset + n64 * columns + k[None, :]
            random = random16(element, seed_low, seed_high, step_low, step_high)
        rounded = stochastic_round(merged, random, out.dtype.element_ty)
    else:
        rounded = merged.to(out.dtype.element_ty)
    tl.store(out + n64 * out_row + k[None, :], rounded, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high"])
def _merge(
    w,  # [N, K]
    w_row,
    out,  # [N, K]
    out_row,
    border_b,  # [R, N]
    border_a,  # [R, K]
    rows,
    columns,
    seed_low,
    seed_high,
    step_low,
    step_high,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,  # columns are a multiple of 8
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_n = tl.program_id(1) * BLOCK_N
    first_k = tl.program_id(0) * BLOCK_K
    n, k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K)
    low, high = rank_range(border_b, first_n, first_n + BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for r0 in range(low, high, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b = load_border(border_b, r[None, :], n[:, None], tl.float32)
        a = load_border(border_a, r[:, None], k[None, :], tl.float32)
        acc = tl.dot(b, a, acc, input_precision="ieee")
    store_merged(
        *(w, w_row, out, out_row, column_scales(border_b, n)[:, None] * acc, n, first_k),
        *(rows, columns, 0, seed_low, seed_high, step_low, step_high, STOCHASTIC, BLOCKS),
    )


def lora_merge(
    w: Tensor,  # [N, K], rows contiguous
    a: Sequence[Tensor],  # G of [R_g, K], any strides, any float dtype
    b: Sequence[Tensor],  # G of [N_g, R_g], any strides, any float dtype
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
    noise: tuple[int, int] | None = None,  # (seed, step) of stochastic rounding
    out: Tensor | None = None,  # [N, K], rows contiguous; may be w
    tile: MergeTile = TILE,
) -> Tensor:
    """w' [N, K] in w's dtype, rounded to nearest unless ``noise`` is given."""
    out = w.new_empty(tuple(w.shape)) if out is None else out
    assert w.stride(1) == 1 and out.stride(1) == 1, (w.stride(), out.stride())
    assert out.shape == w.shape and (noise is None or out.element_size() == 2), out.dtype
    if w.numel() == 0:
        return out
    adapters = Adapters(a, b, scales, spans)
    rows, columns = w.shape
    grid = (triton.cdiv(columns, tile.block_k), triton.cdiv(rows, tile.block_n))
    args = (
        *(w, w.stride(0), out, out.stride(0), of_b(adapters), of_a(adapters)),
        *(rows, columns, *words(noise)),
    )
    constants = dict(STOCHASTIC=noise is not None, BLOCKS=columns % 8 == 0, **tile.arguments())
    compiled = launch(_merge, grid, w.device, args, constants, [out])
    if not spills.seen(compiled):
        spills.look(compiled, "merge", tile, w)
    return out


# MERGE of many matrices in one launch: w' = w + s b a of each, rounded once.
#
#                 w, w' [N, K]   a [R, K]   b [N, R]
#
# A table on the device holds a row of integers per merge; a program finds the one its tile belongs
# to by bisection. Sizes read from a table carry no alignment, so that of all merges is a constant
# of the kernel. Products, sums and random bits are those of lora_merge.py. The adapters of one
# fused matrix are merges of blocks of its rows; rank 0 copies a block. No two may write the same
# elements.


FIELDS = tl.constexpr(16)  # integers per row of the table


@dataclass(frozen=True)
class Merge:
    """One adapter and the rows of one matrix it is merged into."""

    w: Tensor  # [N, K], rows contiguous
    out: Tensor  # [N, K], rows contiguous; may be w
    a: Tensor  # [R, K], any strides
    b: Tensor  # [N, R], any strides
    scale: float = 1.0
    offset: int = 0  # random index of element (0, 0); (n, k) has offset + n K + k

    @property
    def aligned(self) -> bool:
        """Whether 16-byte loads and stores reach every row, and random blocks start with them."""
        sizes = (self.w.shape[1], self.w.stride(0), self.out.stride(0), self.a.stride(0))
        whole = all(size % 16 == 0 for size in sizes) and self.offset % 8 == 0
        starts = all(t.data_ptr() % 16 == 0 for t in (self.w, self.out, self.a))
        return whole and starts and self.a.stride(1) == 1

    def row(self, first_tile: int) -> list[int]:
        """Of the table."""
        w, out, a, b = self.w, self.out, self.a, self.b
        scale = int.from_bytes(struct.pack("<f", self.scale), "little")
        pointers = [t.data_ptr() for t in (w, out, a, b)]
        strides = [w.stride(0), out.stride(0), *a.stride(), *b.stride()]
        return [*pointers, *strides, *w.shape, a.shape[0], scale, self.offset, first_tile]


@dataclass(frozen=True)
class MergeTable:
    """Merges packed for one device; launch it as often as the tensors live."""

    merges: tuple[Merge, ...]  # keeps every tensor alive
    table: Tensor  # [merges, 16] int64
    tiles: int
    tile: MergeTile


@triton.jit
def _bisect(table, merges, tile, STEPS: tl.constexpr):
    """The row of the merge that ``tile`` belongs to: the last whose first tile is not past it."""
    low, high = 0, merges
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        reached = tl.load(table + middle * FIELDS + 15) <= tile
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    return table + low * FIELDS


@triton.jit
def _pointer(row, field: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + field).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _size(row, field: tl.constexpr, ALIGNED: tl.constexpr):
    size = tl.load(row + field)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit(do_not_specialize=["merges", "seed_low", "seed_high", "step_low", "step_high"])
def _merge_many(
    table,  # [merges, 16]
    merges,
    seed_low,
    seed_high,
    step_low,
    step_high,
    W: tl.constexpr,  # dtypes
    OUT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,  # of the bisection
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = _bisect(table, merges, tl.program_id(0), STEPS)
    w, out = _pointer(row, 0, W, ALIGNED), _pointer(row, 1, OUT, ALIGNED)
    a, b = _pointer(row, 2, A, ALIGNED), _pointer(row, 3, B, False)
    w_row, out_row, a_row = _size(row, 4, ALIGNED), _size(row, 5, ALIGNED), _size(row, 6, ALIGNED)
    a_column = 1 if ALIGNED else tl.load(row + 7)
    b_row, b_column = tl.load(row + 8), tl.load(row + 9)
    rows, columns, ranks = tl.load(row + 10), _size(row, 11, ALIGNED), tl.load(row + 12)
    scale = tl.load(row + 13).to(tl.int32).to(tl.float32, bitcast=True)
    tile = (tl.program_id(0) - tl.load(row + 15)).to(tl.int32)
    tiles_k = tl.cdiv(columns, BLOCK_K).to(tl.int32)

    n = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_n, inside_k = (n < rows)[:, None], (k < columns)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for r0 in range(0, ranks, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b_at = b + n[:, None] * b_row + r[None, :] * b_column
        a_at = a + r[:, None] * a_row + k[None, :] * a_column
        b_tile = tl.load(b_at, mask=inside_n & (r < ranks)[None, :], other=0.0).to(tl.float32)
        a_tile = tl.load(a_at, mask=(r < ranks)[:, None] & inside_k, other=0.0).to(tl.float32)
        acc = tl.dot(b_tile, a_tile, acc, input_precision="ieee")
    store_merged(
        *(w, w_row, out, out_row, scale * acc, n, (tile % tiles_k) * BLOCK_K, rows, columns),
        *(tl.load(row + 14), seed_low, seed_high, step_low, step_high, STOCHASTIC, ALIGNED),
    )


def pack(merges: Sequence[Merge], tile: MergeTile = TILE) -> MergeTable:
    """Put the table of ``merges``, all of one device and the same dtypes, on their device."""
    merges = tuple(merge for merge in merges if merge.w.numel())
    rows, tiles = [], 0
    for merge in merges:
        (n, k), r = merge.w.shape, merge.a.shape[0]
        assert merge.out.shape == (n, k) and merge.a.shape == (r, k) and merge.b.shape == (n, r)
        assert _types(merge) == _types(merges[0]) and merge.w.device == merges[0].w.device
        assert merge.w.stride(1) == merge.out.stride(1) == 1 and merge.offset >= 0
        rows.append(merge.row(tiles))
        tiles += triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k)
    device = merges[0].w.device if merges else None
    return MergeTable(merges, torch.tensor(rows, dtype=torch.int64, device=device), tiles, tile)


def launch_many(table: MergeTable, noise: tuple[int, int] | None = None) -> None:
    """Run a packed table, to nearest or by the bits of ``noise``, (seed, step)."""
    if not table.merges:
        return
    first, count = table.merges[0], len(table.merges)
    assert noise is None or first.out.element_size() == 2, first.out.dtype
    names = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in _types(first)]
    with on_device(first.w.device):
        _merge_many[(table.tiles,)](
            *(table.table, count, *words(noise)),
            *names,
            STEPS=count.bit_length(),
            ALIGNED=all(merge.aligned for merge in table.merges),
            STOCHASTIC=noise is not None,
            **table.tile.arguments(),
        )


def _types(merge: Merge) -> list[torch.dtype]:
    return [tensor.dtype for tensor in (merge.w, merge.out, merge.a, merge.b)]


def merged_together(
    weights: Sequence[Tensor],  # [N, K] each, rows contiguous, one dtype
    adapters: Sequence[Adapters],  # of each; every a in one dtype, and every b
    noise: tuple[int, int] | None = None,  # (seed, step) of stochastic rounding
    tile: MergeTile = TILE,
) -> list[Tensor]:
    """Every w', a new tensor, rounded to nearest or stochastically."""
    made = [w.new_empty(tuple(w.shape)) for w in weights]
    rows = zip(weights, made, adapters, strict=True)
    launch_many(pack([merge for row in rows for merge in _blocks(*row)], tile), noise)
    return made


def _blocks(w: Tensor, out: Tensor, adapters: Adapters) -> Iterator[Merge]:
    """A merge for the rows of every adapter, and a copy for those of none."""
    n, k = w.shape
    a, b = adapters.a[0][:0], adapters.b[0]
    done = 0
    for a_g, b_g, scale, span in sorted(zip(*adapters, strict=True), key=lambda row: row[3].start):
        assert span.start >= done, (span, done)
        free, rows = slice(done, span.start), slice(span.start, span.stop)
        yield Merge(w[free], out[free], a, b.new_empty((span.start - done, 0)))
        yield Merge(w[rows], out[rows], a_g, b_g, scale, span.start * k)
        done = span.stop
    yield Merge(w[done:], out[done:], a, b.new_empty((n - done, 0)))


# What the library's BORDERED products read, made in one launch.
#
#     y = [x | h] [w | s b]T        dx = [dy | dh] [w ; a]
#
# w is copied to the bit. Of a and b a number is read in its own dtype, taken to fp32, multiplied by
# s there, and rounded once; the library rounds b before it multiplies, and once more after. Both
# give the same where b has w's dtype, or s is a power of two.


@triton.jit
def _copy_tile(w, w_row, w_column, out, out_row, n, k, rows, columns):
    """Elements (n, k) of w."""
    n, k, inside = n.to(tl.int64), k.to(tl.int64), (n < rows) & (k < columns)
    tile = tl.load(w + n * w_row + k * w_column, mask=inside, other=0.0)
    tl.store(out + n * out_row + k, tile, mask=inside)


@triton.jit
def _right_tile(border, out, out_row, n, r, rows):
    """s b: ranks r of rows n, ``out`` being where the first lie."""
    tile = load_border(border, r, n, tl.float32) * rank_scales(border, r)
    inside = (n < rows) & (r < border.firsts[len(border.scales)])
    tl.store(out + n.to(tl.int64) * out_row + r, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _lower_tile(border, out, out_row, r, k, columns):
    """a: columns k of ranks r, likewise."""
    tile = load_border(border, r, k, tl.float32).to(out.dtype.element_ty)
    inside = (r < border.firsts[len(border.scales)]) & (k < columns)
    tl.store(out + r.to(tl.int64) * out_row + k, tile, mask=inside)


@triton.jit
def _border_weight(
    w,  # [N, K]
    w_row,
    w_column,
    border,  # [R, N] of b; or below w [R, K] of a
    out,  # [N, K + R]; or [N + R, K]
    out_row,
    rows,  # N
    columns,  # K
    BELOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Programs of the tiles of w, row by row, then those of the border's."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    pid, wide = tl.program_id(0), tl.cdiv(columns, BLOCK_N)
    copies = tl.cdiv(rows, BLOCK_M) * wide
    if pid < copies:
        m, n = m + pid // wide * BLOCK_M, n + pid % wide * BLOCK_N
        _copy_tile(w, w_row, w_column, out, out_row, m, n, rows, columns)
    else:
        pid -= copies
        if BELOW:
            m, n = m + pid // wide * BLOCK_M, n + pid % wide * BLOCK_N
            corner = out + tl.cast(rows, tl.int64) * out_row
            _lower_tile(border, corner, out_row, m, n, columns)
        else:
            wide = tl.cdiv(border.firsts[len(border.scales)], BLOCK_N)
            m, n = m + pid // wide * BLOCK_M, n + pid % wide * BLOCK_N
            _right_tile(border, out + columns, out_row, m, n, rows)


def bordered_weight(
    w: Tensor,  # [N, K], any strides
    adapters: Adapters,  # every b in one dtype
    out: Tensor | None = None,  # [N, K + sum R], rows contiguous, w's dtype
    tile: ElementTile = PACK,
) -> Tensor:
    """[w | s b], [N, K + sum R]: s_g b_g in the group's rows, zero in those of no group."""
    return _bordered(w, of_b(adapters), False, out, tile)


def bordered_weight_rows(
    w: Tensor,  # [N, K], any strides
    adapters: Adapters,  # every a in one dtype
    out: Tensor | None = None,  # [N + sum R, K], rows contiguous, w's dtype
    tile: ElementTile = PACK,
) -> Tensor:
    """[w ; a], [N + sum R, K]."""
    return _bordered(w, of_a(adapters), True, out, tile)


def _bordered(
    w: Tensor, border: Border, below: bool, out: Tensor | None, tile: ElementTile
) -> Tensor:
    rows, columns = w.shape
    shape = (rows + border.rank, columns) if below else (rows, columns + border.rank)
    out = w.new_empty(shape) if out is None else out
    assert out.shape == shape and out.stride(1) == 1 and out.dtype is w.dtype, (out.shape, shape)
    of_border = (border.rank, columns) if below else (rows, border.rank)
    programs = sum(
        triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
        for m, n in ((rows, columns), of_border)
    )
    if programs:
        args = (w, *w.stride(), border, out, out.stride(0), rows, columns)
        constants = {"BELOW": below, **tile.arguments()}
        launch(_border_weight, (programs,), w.device, args, constants, [out])
    return out
