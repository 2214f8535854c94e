"""lora_linear over an FP8 base: rows quantised, and EXTENDED over their codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    column_scales,
    grouped_tile,
    load_border,
    of_b,
    rank_range,
)
from fused_lora.kernels.triton.elementwise import EpilogueOperands, epilogue_operands, finish
from fused_lora.kernels.triton.launch import architecture, launch
from fused_lora.kernels.triton.launches import tile_of
from fused_lora.kernels.triton.lora_linear import rows, shrink, uniform
from fused_lora.kernels.triton.tiles import MOST_WIDTH, RowTile, Tile, fp8_tile, row_tile
from fused_lora.reference.lora_linear_fp8 import CODES, LARGEST, LEAST_SCALE, Quantised

# EXTENDED on a base in FP8: both products in one fp32 accumulator, y rounded once.
#
#     y[m, n] = s_x[m] s_w[n] sum_k x8[m, k] w8[n, k] + sum_r h[m, r] (s b)[n, r] + bias[n]
#
#         x8 [M, K]   s_x [M]   w8 [N, K]   s_w [N]   h = x aT [M, sum R]   y [M, N]
#
# The base comes first, on FP8 matrix units; its sum is multiplied by both scales in fp32, and the
# low-rank product, in x's dtype, runs on in the same accumulator. s b is formed in fp32 and rounded
# once to x's dtype. h is of x itself, not of its codes.
#
# The matrix units of sm_89 and sm_90 add FP8 products in fewer bits than fp32 has. There, and on
# sm_120, which is not known better, the products of one step are summed from zero in the matrix
# unit and added to the accumulator in fp32, as DeepSeek-V3 does (2024, section 3.3.2): BLOCK_K
# products at most meet in fewer bits. sm_100 adds in fp32 itself. Triton's
# ``max_num_imprecise_acc`` asks for the same, but on sm_90 reads registers of a wgmma that no wait
# has covered, and leaves it to ptxas; it is given for mma.sync alone, where it keeps the compiler
# from folding the two sums into one.


MOST_RANKS = 32  # in one step: s b is formed in fp32 registers
WGMMA, TENSOR_MEMORY = 9, (10, 11)  # major compute capabilities; the others have mma.sync


@triton.jit
def _expand(acc, h, h_row, border, m, n, rows, first, BLOCK_R: tl.constexpr):
    """acc + h (s border) over the ranks that own any of columns n, which begin at ``first``."""
    h_rows = h + m.to(tl.int64)[:, None] * h_row
    scales = column_scales(border, n)[None, :]
    low, high = rank_range(border, first, first + acc.shape[1])
    for r0 in tl.range(low, high, BLOCK_R, num_stages=2):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = (m < rows)[:, None] & (r < high)[None, :]
        h_tile = tl.load(h_rows + r[None, :], mask=inside, other=0.0)
        scaled = load_border(border, r[:, None], n[None, :], tl.float32) * scales
        acc = tl.dot(h_tile, scaled.to(h.dtype.element_ty), acc)
    return acc


@triton.jit
def _extended_fp8(
    x,  # [M, K], e4m3
    x_row,
    x_scales,  # [M]
    w,  # [N, K], e4m3
    w_row,
    w_scales,  # [N]
    h,  # [M, R]
    h_row,
    border,  # [R, N]
    y,  # [M, N]
    y_row,
    epilogue,
    rows,
    columns,
    depth,
    APART: tl.constexpr,  # a step's products are summed before they join the accumulator
    LIMIT: tl.constexpr,  # max_num_imprecise_acc
    WHOLE_K: tl.constexpr,  # BLOCK_K divides depth
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_m, inside_n = (m < rows)[:, None], (n < columns)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_tile = x + m.to(tl.int64)[:, None] * x_row + k[None, :]
    w_tile = w + n.to(tl.int64)[None, :] * w_row + k[:, None]
    for k0 in range(0, depth, BLOCK_K):
        inside_k = k < (BLOCK_K if WHOLE_K else depth - k0)
        left = tl.load(x_tile, mask=inside_m & inside_k[None, :], other=0.0)
        right = tl.load(w_tile, mask=inside_k[:, None] & inside_n, other=0.0)
        if APART:
            acc += tl.dot(left, right, max_num_imprecise_acc=LIMIT)
        else:
            acc = tl.dot(left, right, acc)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    acc *= tl.load(x_scales + m, mask=m < rows, other=0.0)[:, None]
    acc *= tl.load(w_scales + n, mask=n < columns, other=0.0)[None, :]
    acc = _expand(acc, h, h_row, border, m, n, rows, tile_n * BLOCK_N, BLOCK_R)
    finish(acc, epilogue, y, y_row, m, n, rows, columns, "none", False)


def forward_extended_fp8(
    x: Quantised,  # [M, K], rows contiguous
    w: Quantised,  # [N, K], rows contiguous
    bias: Tensor | None,  # [N], contiguous
    adapters: Adapters,
    h: Tensor,  # [M, sum R], rows contiguous, bf16 or fp16
    tile: Tile | None = None,
) -> Tensor:
    """y = x^ w^T + bias + s h bT [M, N], in h's dtype."""
    y = h.new_empty(h.shape[0], w.codes.shape[0])
    _launch(x, w, h, of_b(adapters), y, epilogue_operands(bias), tile)
    return y


def _launch(
    x: Quantised,
    w: Quantised,
    h: Tensor,
    border: Border,
    y: Tensor,
    epilogue: EpilogueOperands,
    tile: Tile | None,
) -> None:
    (rows, depth), columns = x.codes.shape, w.codes.shape[0]
    assert w.codes.shape[1] == depth and h.shape == (rows, border.rank), (w.codes.shape, h.shape)
    assert x.codes.dtype is w.codes.dtype is CODES, (x.codes.dtype, w.codes.dtype)
    for t in (x.codes, w.codes, h, y):
        assert t.stride(1) == 1 or t.shape[1] == 1, t.stride()
    for t in (*x[1:], *w[1:]):
        assert t.is_contiguous(), t.stride()
    if y.numel() == 0:
        return
    tile = tile or fp8_tile(rows, columns, y.device)
    arch = architecture(y.device)
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)
    args = (
        *(x.codes, x.codes.stride(0), x.scales, w.codes, w.codes.stride(0), w.scales),
        *(h, h.stride(0), border, y, y.stride(0), epilogue, rows, columns, depth),
    )
    constants = dict(
        APART=arch // 10 not in TENSOR_MEMORY,
        LIMIT=None if arch // 10 == WGMMA else tile.block_k,
        WHOLE_K=depth % tile.block_k == 0,
        BLOCK_R=border.rank_block(MOST_RANKS),
        **tile.arguments(),
    )
    compiled = launch(_extended_fp8, grid, y.device, args, constants, [y])
    if not spills.seen(compiled):
        spills.look(compiled, "extended_fp8", tile, h)


# Rows in e4m3: the codes and scales of ``reference/quantise``, to the bit.
#
#     s[m] = max |x[m, :]| / 448        codes[m, k] = e4m3(x[m, k] / s[m])
#
#                 x, codes [M, K]   s [M] fp32
#
# A row is held whole in fp32 registers and read once; both quotients are rounded to nearest. NaN
# and infinity give a code that is NaN.


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


# LoRA linear on a base in FP8 from this room's kernels: shrink, quantise, EXTENDED on the codes.
#
# The face and its meaning are those of ``fused_lora.kernels.aten.lora_linear_cases``.


def forward_fp8(
    x: Tensor,  # [M, K], bf16 or fp16
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, sum R], in x's dtype."""
    adapters = uniform(adapters)
    x, bias = rows(x), None if bias is None else bias.contiguous()
    w = Quantised(rows(w.codes), w.scales.contiguous())
    m, (n, k) = x.shape[0], w.codes.shape
    h = shrink(x, adapters)
    x8 = quantise(x, tile_of("quantise", m, k, 0, x.dtype, x.device))
    tile = tile_of("extended_fp8", m, n, k, x.dtype, x.device)
    y = forward_extended_fp8(x8, w, bias, adapters, h, tile)
    return y, h
