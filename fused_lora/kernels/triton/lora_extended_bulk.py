"""EXTENDED for chips with a bulk copy engine: the equations of lora_extended.py, persistent.

One program per multiprocessor walks the tiles of y in an order that keeps both operands in L2, and
x and w arrive by tensor descriptors made on the host: a step takes half the instructions that it
takes by pointers. The loops over ranks and over K stay within the one over tiles, for no compiler
flattens two into it: within a tile the copies of later steps and one step's products run on, but a
tile begins only once the one before is stored. So it ships in two tiles that leave room for one
block a multiprocessor by pointers too; where two fit, one's ending hides behind the other's
products, and pointers serve (tiles.py).

A tile may be 128 + 64 columns wide, as two accumulators that share x: 192 divides 384, 768, 1152
and 2304, and with 128 rows fills 132 multiprocessors where 128 x 128 and 128 x 256 leave many idle.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.border import Border
from fused_lora.kernels.triton.epilogue import EpilogueOperands, finish
from fused_lora.kernels.triton.launch import input_precision, multiprocessors
from fused_lora.kernels.triton.launch import launch as start
from fused_lora.kernels.triton.primitives import expand, grouped_tile
from fused_lora.kernels.triton.tiles import BulkTile
from fused_lora.programs.record import begins_at


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
    SLOPE: tl.constexpr,  # act'(u) rather than act
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
        finish(acc, epilogue, y, y_row, m, n, rows, columns, ACTIVATION, SLOPE)
        if REST_N:
            finish(rest, epilogue, y, y_row, m, n_rest, rows, columns, ACTIVATION, SLOPE)


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
    ending: EpilogueOperands,
    activation: str,
    slope: bool,
    tile: BulkTile,
) -> None:
    """As the launcher of lora_extended.py, which checks the operands."""
    (rows, depth), columns = x.shape, w.shape[0]
    along_k = w.stride(1) == 1
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.width)
    args = (
        _descriptor(x, tile.block_m, tile.block_k),
        _weights(w, tile.block_n, tile.block_k, along_k),
        _weights(w, tile.rest_n or tile.block_n, tile.block_k, along_k),
        *(h, h.stride(0), border, y, y.stride(0), ending, rows, columns, depth),
    )
    constants = dict(
        ALONG_K=along_k,
        ACTIVATION=activation,
        SLOPE=slope,
        PRECISION=input_precision(x.dtype),
        BLOCK_R=border.rank_block(64 // x.element_size()),
        **tile.arguments(),
    )
    grid = (min(tiles, multiprocessors(x.device)),)
    written = [y, None if slope else ending.u]
    compiled = start(_extended_bulk, grid, x.device, args, constants, written)
    if not spills.seen(compiled):
        name = ending.kernel(x.dtype, activation != "none")
        spills.look(compiled, name + border.word, tile, x)


def _weights(w: Tensor, columns: int, depth: int, along_k: bool) -> TensorDescriptor:
    """Of blocks of ``columns`` columns of y."""
    return _descriptor(w, columns, depth) if along_k else _descriptor(w.t(), depth, columns)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
