"""MERGE of many matrices in one launch: w' = w + s b a of each, rounded once.

                w, w' [N, K]   a [R, K]   b [N, R]

A table on the device holds a row of integers per merge; a program finds the one its tile belongs to
by bisection. Sizes read from a table carry no alignment, so that of all merges is a constant of the
kernel. Products, sums and random bits are those of lora_merge.py. The adapters of one fused matrix
are merges of blocks of its rows; rank 0 copies a block. No two may write the same elements.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import on_device, words
from fused_lora.kernels.triton.lora_merge import TILE, store_merged
from fused_lora.kernels.triton.tiles import MergeTile

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
