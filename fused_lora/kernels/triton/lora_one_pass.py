"""ONE_PASS: each tile of y shrinks its own rows of x in the main loop, then expands.

    t[m, r] = s_r sum_k x[m, k] shrink[r, k]              fp32, beside the base product
    u[m, n] = sum_k x[m, k] w[n, k] + sum_r t[m, r] expand[r, n] + bias[n]
    y[m, n] = residual[m, n] + factor[n] u[m, n]          where they are given, see elementwise.py

    forward   shrink = aT, expand = s bT: h = x aT, y = x wT + s h bT + bias
    dx        shrink = s b, expand = a, x = dy, w through transposed strides: dh = s dy b,
              dx = dy w + dh a

                x [M, K]   w [N, K]   shrink [sum R, K]   expand [sum R, N]   y [M, N]

x is read by nobody else, and nothing of size M lies between the two thin products. The price: every
column tile forms h again, so this is for few columns and sum R <= 64. Both borders are in the dtype
of x, packed before where they were not, so that shrink is copied as w is and on sm_90 the products
of a step run on behind it. The scale joins t in fp32 before its one rounding, so t is the operand
that h itself would be; y is rounded once. The programs of the first column tile write h, which
backward reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    Packed,
    grouped_tile,
    load_border,
    of_a,
    of_b,
    packed,
    rank_scales,
)
from fused_lora.kernels.triton.elementwise import EpilogueOperands, epilogue_operands, finish
from fused_lora.kernels.triton.launch import input_precision, launch
from fused_lora.kernels.triton.lora_extended import Output
from fused_lora.kernels.triton.tiles import Tile, one_pass_tile, power_of_two

MOST_RANKS = 64  # sum R that stands beside the accumulator


@triton.jit
def _one_pass(
    x,  # [M, K]
    x_row,
    w,  # [N, K]
    w_row,
    w_column,
    shrink,  # [R, K]
    expand,  # [R, N]
    y,  # [M, N]
    y_row,
    h,  # [M, R]
    epilogue,
    rows,
    columns,
    depth,
    ranks,
    PRECISION: tl.constexpr,  # of fp32 products
    WHOLE_K: tl.constexpr,  # BLOCK_K divides depth
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # holds all ranks
    GROUP_M: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m64 = m.to(tl.int64)[:, None]
    inside_m, inside_n = (m < rows)[:, None], (n < columns)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    t = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    x_tile = x + m64 * x_row + k[None, :]
    w_tile = w + n.to(tl.int64)[None, :] * w_row + k.to(tl.int64)[:, None] * w_column
    for k0 in range(0, depth, BLOCK_K):
        inside_k = k < (BLOCK_K if WHOLE_K else depth - k0)
        left = tl.load(x_tile, mask=inside_m & inside_k[None, :], other=0.0)
        right = tl.load(w_tile, mask=inside_k[:, None] & inside_n, other=0.0)
        thin = load_border(shrink, r[None, :], (k0 + k)[:, None], dtype)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        t = tl.dot(left, thin, t, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w_column

    # Ranks past the last are 0 times x, which is NaN where x is infinite.
    t = tl.where((r < ranks)[None, :], t * rank_scales(shrink, r)[None, :], 0.0)
    if tile_n == 0:
        at = h + m64 * ranks + r[None, :]
        tl.store(at, t.to(dtype), mask=inside_m & (r < ranks)[None, :])
    t *= rank_scales(expand, r)[None, :]
    wide = load_border(expand, r[:, None], n[None, :], dtype)
    acc = tl.dot(t.to(dtype), wide, acc, input_precision=PRECISION)
    finish(acc, epilogue, y, y_row, m, n, rows, columns, "none", False)


def forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype, any strides
    bias: Tensor | None,  # [N], contiguous
    adapters: Adapters | Packed,  # sum R <= 64
    tile: Tile | None = None,
    *,
    factor: Tensor | None = None,  # [N], contiguous: LayerScale
    residual: Tensor | None = None,  # [M, N], rows contiguous
    out: Tensor | None = None,  # [M, N], rows contiguous
) -> Output:
    """y = residual + factor (x wT + bias + s h bT), and h."""
    adapters = packed(adapters, x.dtype)
    y = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    epilogue = epilogue_operands(bias, factor, residual)
    h = _launch(x, w, of_a(adapters), of_b(adapters), y, epilogue, tile)
    return Output(y, h, None)


def input_grad(
    dy: Tensor,  # [M, N], rows contiguous
    w: Tensor,  # [N, K], dy's dtype, any strides
    adapters: Adapters | Packed,  # sum R <= 64
    tile: Tile | None = None,
    *,
    residual: Tensor | None = None,  # [M, K], rows contiguous: a gradient that joins
) -> tuple[Tensor, Tensor]:
    """dx = dy w + dh a [M, K], with what joins it, and dh [M, sum R]."""
    adapters = packed(adapters, dy.dtype)
    dx, epilogue = dy.new_empty(dy.shape[0], w.shape[1]), epilogue_operands(residual=residual)
    return dx, _launch(dy, w.t(), of_b(adapters), of_a(adapters), dx, epilogue, tile)


def _launch(
    x: Tensor,
    w: Tensor,
    shrink: Border,
    expand: Border,
    y: Tensor,
    epilogue: EpilogueOperands,
    tile: Tile | None,
) -> Tensor:
    """h; y is written."""
    (rows, depth), columns, ranks = x.shape, w.shape[0], shrink.rank
    assert w.shape[1] == depth and x.dtype is w.dtype, (x.shape, w.shape, x.dtype, w.dtype)
    assert x.stride(1) == y.stride(1) == 1 and y.shape == (rows, columns), (x.stride(), y.shape)
    assert epilogue.residual is None or epilogue.residual.shape == y.shape, y.shape
    assert all(t is None or t.shape == (columns,) for t in (epilogue.bias, epilogue.factor)), (
        columns
    )
    assert columns > 0 and ranks <= MOST_RANKS, (columns, ranks)
    h = x.new_empty(rows, ranks)
    if rows == 0:
        return h
    tile = tile or one_pass_tile(rows, columns, x.element_size(), x.device, epilogue.heavy)
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)
    args = (
        *(x, x.stride(0), w, w.stride(0), w.stride(1), shrink, expand),
        *(y, y.stride(0), h, epilogue, rows, columns, depth, ranks),
    )
    constants = dict(
        PRECISION=input_precision(x.dtype),
        WHOLE_K=depth % tile.block_k == 0,
        BLOCK_R=power_of_two(ranks, 16, MOST_RANKS),
        **tile.arguments(),
    )
    compiled = launch(_one_pass, grid, x.device, args, constants, [y, h])
    if not spills.seen(compiled):
        spills.look(compiled, epilogue.kernel("one_pass", x.dtype) + shrink.word, tile, x)
    return h
