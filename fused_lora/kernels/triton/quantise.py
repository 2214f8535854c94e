"""Rows in e4m3: the codes and scales of ``reference/lora_linear_fp8.quantise``, to the bit.

    s[m] = max |x[m, :]| / 448        codes[m, k] = e4m3(x[m, k] / s[m])

                x, codes [M, K]   s [M] fp32

A row is held whole in fp32 registers and read once; both quotients are rounded to nearest. NaN and
infinity give a code that is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.tiles import MOST_WIDTH, RowTile, row_tile
from fused_lora.reference.lora_linear_fp8 import CODES, LARGEST, LEAST_SCALE, Quantised


@triton.jit
def _quantise(
    x,  # [M, K]
    x_row,
    codes,  # [M, K]
    codes_row,
    scales,  # [M]
    rows,
    columns,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m64, d = m.to(tl.int64)[:, None], tl.arange(0, BLOCK_D)
    inside = (m < rows)[:, None] & (d < columns)[None, :]
    z = tl.load(x + m64 * x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(z), axis=1)
    scale = tl.maximum(tl.div_rn(largest, tl.full([BLOCK_M], LARGEST, tl.float32)), LEAST)
    tl.store(scales + m, scale, mask=m < rows)
    found = tl.div_rn(z, tl.broadcast_to(scale[:, None], [BLOCK_M, BLOCK_D]))
    tl.store(codes + m64 * codes_row + d[None, :], found.to(codes.dtype.element_ty), mask=inside)


def quantise(x: Tensor, tile: RowTile | None = None) -> Quantised:
    """The codes and scales of x [M, K], rows contiguous, in 16 bits or fp32."""
    rows, columns = x.shape
    assert x.stride(1) == 1 or columns == 1, x.stride()
    assert columns <= MOST_WIDTH, columns
    codes = x.new_empty(x.shape, dtype=CODES)
    scales = x.new_empty(rows, dtype=torch.float32)
    if x.numel() == 0:
        return Quantised(codes, scales.fill_(LEAST_SCALE))
    tile = tile or row_tile(columns)
    args = (x, x.stride(0), codes, codes.stride(0), scales, rows, columns)
    constants = dict(LARGEST=LARGEST, LEAST=LEAST_SCALE, **tile.arguments())
    grid = (triton.cdiv(rows, tile.block_m),)
    launch(_quantise, grid, x.device, args, constants, [codes, scales])
    return Quantised(codes, scales)
