"""EXTENDED: a GEMM whose K loop runs on over (h, s b), by pointers or by tensor maps."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import (
    Border,
    Packed,
    expand,
    grouped_tile,
    of_a,
    of_b,
    packed,
)
from fused_lora.kernels.triton.elementwise import EpilogueOperands, epilogue_operands, finish
from fused_lora.kernels.triton.launch import input_precision, launch, multiprocessors
from fused_lora.kernels.triton.launch import launch as start
from fused_lora.kernels.triton.lora_shrink import shrink, shrink_grad
from fused_lora.kernels.triton.philox import Dropout
from fused_lora.kernels.triton.tiles import BulkTile, Tile, gemm_tile
from fused_lora.programs.record import begins_at

# EXTENDED for chips with a bulk copy engine: the equations of py, persistent.
#
# One program per multiprocessor walks the tiles of y in an order that keeps both operands in L2,
# and x and w arrive by tensor descriptors made on the host: a step takes half the instructions that
# it takes by pointers. The loops over ranks and over K stay within the one over tiles, for no
# compiler flattens two into it: within a tile the copies of later steps and one step's products run
# on, but a tile begins only once the one before is stored. So it ships in two tiles that leave room
# for one block a multiprocessor by pointers too; where two fit, one's epilogue hides behind the
# other's products, and pointers serve (tiles.py).
#
# A tile may be 128 + 64 columns wide, as two accumulators that share x: 192 divides 384, 768, 1152
# and 2304, and with 128 rows fills 132 multiprocessors where 128 x 128 and 128 x 256 leave many
# idle.


@triton.jit
def _columns_of_w(w, n, k, ALONG_K: tl.constexpr):
    """[BLOCK_K, columns] of it, whichever way its rows lie."""
    return w.load([n, k]).T if ALONG_K else w.load([k, n])


@triton.jit
def _extended_bulk(
    x,  # [M, K], descriptor of [BLOCK_M, BLOCK_K]
    w,  # [N, K] of [BLOCK_N, BLOCK_K], or its transpose
    w_rest,  # the same of REST_N columns
    h,  # [M, R]
    h_row,
    border,  # [R, N]
    y,  # [M, N]
    y_row,
    epilogue,
    rows,
    columns,
    depth,
    ALONG_K: tl.constexpr,  # rows of w are contiguous along K
    ACTIVATION: tl.constexpr,  # none, erf or tanh
    ACTIVATION_GRAD: tl.constexpr,  # act'(u) rather than act
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    REST_N: tl.constexpr,  # columns of the second accumulator, or 0
    GROUP_M: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N + REST_N
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, WIDTH)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = tile_m * BLOCK_M, tile_n * WIDTH
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = expand(acc, h, h_row, border, m, n, rows, n0, columns, None, PRECISION, BLOCK_R)
        if REST_N:
            n1 = n0 + BLOCK_N
            n_rest = n1 + tl.arange(0, REST_N)
            rest = tl.zeros([BLOCK_M, REST_N], tl.float32)
            rest = expand(
                rest, h, h_row, border, m, n_rest, rows, n1, columns, None, PRECISION, BLOCK_R
            )
        for k0 in range(0, depth, BLOCK_K):
            left = x.load([m0, k0])
            right = _columns_of_w(w, n0, k0, ALONG_K)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            if REST_N:
                right = _columns_of_w(w_rest, n0 + BLOCK_N, k0, ALONG_K)
                rest = tl.dot(left, right, rest, input_precision=PRECISION)
        finish(acc, epilogue, y, y_row, m, n, rows, columns, ACTIVATION, ACTIVATION_GRAD)
        if REST_N:
            finish(rest, epilogue, y, y_row, m, n_rest, rows, columns, ACTIVATION, ACTIVATION_GRAD)


def describable(*matrices: Tensor) -> bool:
    """Whether descriptors can be made of them or of their transposes."""
    return all(_describable(matrix) for matrix in matrices)


def _describable(matrix: Tensor) -> bool:
    """Contiguous one way, and 16 bytes divide where it starts and each row."""
    least, most = sorted(matrix.stride())
    aligned = most * matrix.element_size() % 16 == 0 and begins_at(matrix) % 16 == 0
    return aligned and least == 1 and matrix.numel() > 0


def launch_bulk(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    border: Border,
    y: Tensor,
    epilogue: EpilogueOperands,
    activation: str,
    activation_grad: bool,
    tile: BulkTile,
) -> None:
    """As the launcher of py, which checks the operands."""
    (rows, depth), columns = x.shape, w.shape[0]
    along_k = w.stride(1) == 1
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.width)
    args = (
        _descriptor(x, tile.block_m, tile.block_k),
        _weights(w, tile.block_n, tile.block_k, along_k),
        _weights(w, tile.rest_n or tile.block_n, tile.block_k, along_k),
        *(h, h.stride(0), border, y, y.stride(0), epilogue, rows, columns, depth),
    )
    constants = dict(
        ALONG_K=along_k,
        ACTIVATION=activation,
        ACTIVATION_GRAD=activation_grad,
        PRECISION=input_precision(x.dtype),
        BLOCK_R=border.rank_block(64 // x.element_size()),
        **tile.arguments(),
    )
    grid = (min(tiles, multiprocessors(x.device)),)
    written = [y, None if activation_grad else epilogue.u]
    compiled = start(_extended_bulk, grid, x.device, args, constants, written)
    if not spills.seen(compiled):
        name = epilogue.kernel("extended", x.dtype, activation != "none")
        spills.look(compiled, name + border.word, tile, x)


def _weights(w: Tensor, columns: int, depth: int, along_k: bool) -> TensorDescriptor:
    """Of blocks of ``columns`` columns of y."""
    return _descriptor(w, columns, depth) if along_k else _descriptor(w.t(), depth, columns)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


# EXTENDED: base and low-rank products in one fp32 accumulator.
#
#     u[m, n] = s_n sum_r h[m, r] border[r, n] + sum_k x[m, k] w[n, k] + bias[n]
#     y[m, n] = residual[m, n] + factor[n] act(u[m, n])                see elementwise.py
#
#     forward   h = x aT, border = bT, each column n by the ranks of its own group only
#     dx        h = dh,   border = a,  x = dy, w read through transposed strides: dx = dy w + dh a
#
#                       x [M, K]   w [N, K]   h [M, sum R]   border [sum R, N]   y [M, N]
#
# The extension comes first, so that its scale is one fp32 product per column and s b is never
# rounded; the K loop continues in the same accumulator. y is rounded once, and where an activation
# follows so is the pre-activation u, stored beside it if asked for. Where x is act(u) of the layer
# before, dx goes on to du = act'(u) dx in its epilogue: dx itself is never written. The border is
# in x's dtype, packed before where it was not; along K the copies of later steps fly, and on sm_90
# one product runs on.


class Output(NamedTuple):
    """What one forward hands back."""

    y: Tensor  # [M, N]
    h: Tensor  # [M, sum R]
    u: Tensor | None  # [M, N], the pre-activation where there is an activation, and it is stored


@triton.jit
def _extended(
    x,  # [M, K]
    x_row,
    w,  # [N, K]
    w_row,
    w_column,
    h,  # [M, R]
    h_row,
    border,  # [R, N]
    y,  # [M, N]
    y_row,
    epilogue,
    dropout,  # of the extension's columns, or None
    rows,
    columns,
    depth,
    ACTIVATION: tl.constexpr,  # none, erf or tanh
    ACTIVATION_GRAD: tl.constexpr,  # act'(u) rather than act
    PRECISION: tl.constexpr,  # of fp32 products
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
    m64 = m.to(tl.int64)[:, None]
    inside_m, inside_n = (m < rows)[:, None], (n < columns)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = expand(
        *(acc, h, h_row, border, m, n, rows, tile_n * BLOCK_N, columns, dropout),
        *(PRECISION, BLOCK_R),
    )

    x_tile = x + m64 * x_row + k[None, :]
    w_tile = w + n.to(tl.int64)[None, :] * w_row + k.to(tl.int64)[:, None] * w_column
    for k0 in range(0, depth, BLOCK_K):
        inside_k = k < (BLOCK_K if WHOLE_K else depth - k0)
        left = tl.load(x_tile, mask=inside_m & inside_k[None, :], other=0.0)
        right = tl.load(w_tile, mask=inside_k[:, None] & inside_n, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w_column
    finish(acc, epilogue, y, y_row, m, n, rows, columns, ACTIVATION, ACTIVATION_GRAD)


def forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype, any strides
    bias: Tensor | None,  # [N], contiguous
    adapters: Adapters | Packed,
    activation: str = "none",  # or gelu: erf, tanh
    h: Tensor | None = None,  # [M, sum R] where the shrink is done already
    tile: Tile | None = None,
    *,
    factor: Tensor | None = None,  # [N], contiguous: LayerScale
    residual: Tensor | None = None,  # [M, N], rows contiguous
    out: Tensor | None = None,  # [M, N], rows contiguous: the left of a bordered buffer
    dropout: Dropout | None = None,  # of the shrink
    stores_u: bool = True,  # where there is an activation
) -> Output:
    """y = residual + factor act(x wT + bias + s h bT), and what a backward pass may keep."""
    adapters = packed(adapters, x.dtype)
    h = shrink(x, adapters, dropout=dropout) if h is None else h
    y = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    u = x.new_empty(x.shape[0], w.shape[0]) if stores_u and activation != "none" else None
    epilogue = epilogue_operands(bias, factor, residual, u)
    _launch(x, w, h, of_b(adapters), y, epilogue, None, activation, False, tile)
    return Output(y, h, u)


def input_grad(
    dy: Tensor,  # [M, N], rows contiguous
    w: Tensor,  # [N, K], dy's dtype, any strides
    adapters: Adapters | Packed,
    dh: Tensor | None = None,  # [M, sum R] where it is formed already
    tile: Tile | None = None,
    *,
    activation: str = "none",  # what made x of u: x = act(u)
    u: Tensor | None = None,  # [M, K], rows contiguous, with an activation
    residual: Tensor | None = None,  # [M, K], rows contiguous: a gradient that joins
    out: Tensor | None = None,  # [M, K], rows contiguous: the left of a bordered buffer
    dropout: Dropout | None = None,  # that the forward's shrink had
) -> tuple[Tensor, Tensor]:
    """dx = dy w + D (dh a) [M, K], and dh; with an activation du = act'(u) dx in its place."""
    assert (u is None) == (activation == "none"), activation
    adapters = packed(adapters, dy.dtype)
    dh = shrink_grad(dy, adapters) if dh is None else dh
    dx = dy.new_empty(dy.shape[0], w.shape[1]) if out is None else out
    epilogue = epilogue_operands(residual=residual, u=u)
    _launch(dy, w.t(), dh, of_a(adapters), dx, epilogue, dropout, activation, True, tile)
    return dx, dh


def _launch(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    border: Border,
    y: Tensor,
    epilogue: EpilogueOperands,
    dropout: Dropout | None,
    activation: str,
    activation_grad: bool,
    tile: Tile | None,
) -> None:
    (rows, depth), columns = x.shape, w.shape[0]
    assert w.shape[1] == depth and h.shape == (rows, border.rank), (w.shape, h.shape)
    assert x.dtype is w.dtype is h.dtype, (x.dtype, w.dtype, h.dtype)
    assert x.stride(1) == h.stride(1) == y.stride(1) == 1, (x.stride(), h.stride(), y.stride())
    assert y.shape == (rows, columns), y.shape
    assert all(t is None or t.shape == y.shape for t in (epilogue.residual, epilogue.u)), y.shape
    assert all(t is None or t.shape == (columns,) for t in (epilogue.bias, epilogue.factor)), (
        columns
    )
    assert activation in ("none", "erf", "tanh"), activation
    if y.numel() == 0:
        return
    bulk = dropout is None and describable(x, w)  # Philox takes registers
    active = activation != "none"
    heavy = epilogue.heavy or active or dropout is not None
    tile = tile or gemm_tile(rows, columns, x.element_size(), heavy, x.device, bulk, active)
    if isinstance(tile, BulkTile):
        assert bulk, (x.stride(), w.stride())
        launch_bulk(x, w, h, border, y, epilogue, activation, activation_grad, tile)
        return
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)
    args = (x, x.stride(0), w, w.stride(0), w.stride(1), h, h.stride(0), border)
    constants = dict(
        ACTIVATION=activation,
        ACTIVATION_GRAD=activation_grad,
        PRECISION=input_precision(x.dtype),
        WHOLE_K=depth % tile.block_k == 0,
        BLOCK_R=border.rank_block(64 // x.element_size()),
        **tile.arguments(),
    )
    compiled = launch(
        *(_extended, grid, x.device),
        (*args, y, y.stride(0), epilogue, dropout, rows, columns, depth),
        constants,
        [y, None if activation_grad else epilogue.u],
    )
    if not spills.seen(compiled):
        ends = epilogue.kernel("extended", x.dtype, active)
        name = "extended_dropout" if dropout else ends
        spills.look(compiled, name + border.word, tile, x)
