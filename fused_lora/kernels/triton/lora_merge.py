"""MERGE: w' = w + s b a, rounded once, to nearest or stochastically.

    w'[n, k] = w[n, k] + s_n sum_r border_b[r, n] border_a[r, k]

                w, w' [N, K]   border_b [sum R, N]   border_a [sum R, K]

All adapters of one matrix in one launch; a column range of y is a range of rows of w. Products of b
and a, their sum and the addition are fp32. The random bits are those of reference/philox.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import of_a, of_b
from fused_lora.kernels.triton.launch import launch, words
from fused_lora.kernels.triton.philox import random16, random16_of_blocks, stochastic_round
from fused_lora.kernels.triton.primitives import column_scales, load_border, rank_range
from fused_lora.kernels.triton.tiles import MergeTile
from fused_lora.types import Span

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
