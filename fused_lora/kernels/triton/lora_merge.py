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
from fused_lora.kernels.triton.border import of_a, of_b
from fused_lora.kernels.triton.launch import on_device
from fused_lora.kernels.triton.philox import random16, stochastic_round
from fused_lora.kernels.triton.primitives import column_scales, load_border, rank_range
from fused_lora.kernels.triton.tiles import MergeTile
from fused_lora.types import Span

TILE = MergeTile()


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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_n = tl.program_id(1) * BLOCK_N
    n, k = first_n + tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    low, high = rank_range(border_b, first_n, first_n + BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for r0 in range(low, high, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b = load_border(border_b, r[None, :], n[:, None], tl.float32)
        a = load_border(border_a, r[:, None], k[None, :], tl.float32)
        acc = tl.dot(b, a, acc, input_precision="ieee")
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    n64 = n.to(tl.int64)[:, None]
    base = tl.load(w + n64 * w_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
    merged = base + column_scales(border_b, n)[:, None] * acc
    if STOCHASTIC:
        element = n64 * columns + k[None, :]
        random = random16(element, seed_low, seed_high, step_low, step_high)
        rounded = stochastic_round(merged, random, out.dtype.element_ty)
    else:
        rounded = merged.to(out.dtype.element_ty)
    tl.store(out + n64 * out_row + k[None, :], rounded, mask=inside)


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
    (rows, columns), words = w.shape, (0, 0, 0, 0) if noise is None else _words(*noise)
    grid = (triton.cdiv(columns, tile.block_k), triton.cdiv(rows, tile.block_n))
    with on_device(w.device):
        _merge[grid](
            *(w, w.stride(0), out, out.stride(0), of_b(adapters), of_a(adapters)),
            *(rows, columns, *words),
            STOCHASTIC=noise is not None,
            **tile.arguments(),
        )
    return out


def _words(seed: int, step: int) -> tuple[int, ...]:
    """Both as two 32-bit words, low first, signed: an int32 whatever the bits."""
    words = (seed, seed >> 32, step, step >> 32)
    return tuple((word + (1 << 31)) % (1 << 32) - (1 << 31) for word in words)
