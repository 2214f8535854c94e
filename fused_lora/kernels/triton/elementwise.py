"""GELU and LayerNorm of rows and their gradients, and the epilogue behind a product's tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.tiles import ELEMENTS, MOST_WIDTH, ElementTile, RowTile, row_tile

# GELU and its derivative on fp32 registers: in epilogues, and as kernels where no product is near.
#
# erf   u Phi(u), erf by Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7, and no spilled registers
#       grad  Phi(u) + u phi(u), which share one exponential
# tanh  u g, g = sigmoid(v), v = 2 sqrt(2 / pi) (u + 0.044715 u^3), which is 0.5 u (1 + tanh(v / 2))
#       grad  g + u g (1 - g) v'
#
# Both are max(u, 0) - |u| times what lies beyond |u|, Phi(-|u|) or 1 - g(|u|): one form for both
# signs. Powers of two and reciprocals are the chip's own, within a few units in the last place;
# what is too small for either is zero.


@triton.jit
def _inverse(x):
    """1 / x: one instruction, where a division takes care of every denominator."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _beyond(u):
    """Phi(-|u|), and exp(-u^2 / 2)."""
    t = _inverse(1.0 + 0.23164189 * tl.abs(u))
    p = t * (  # half of 7.1.26's coefficients
        0.127414796
        + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    )
    bell = tl.exp2(u * (-0.72134752 * u))
    return p * bell, bell


@triton.jit
def _gate(u):
    """g of |u|, and 1 - g without the difference."""
    tail = tl.exp2(tl.abs(u) * (-2.3022082 - 0.10294324 * (u * u)))  # exp(-|v|)
    g = _inverse(1.0 + tail)
    return g, tail * g


@triton.jit
def gelu(u, KIND: tl.constexpr):
    """GELU of an fp32 tile."""
    if KIND == "erf":
        beyond, _ = _beyond(u)
    else:
        _, beyond = _gate(u)
    # What lies beyond 1e18 is nothing, and stays a number times nothing where |u| is none.
    return tl.maximum(u, 0.0) - tl.minimum(tl.abs(u), 1e18) * beyond


@triton.jit
def gelu_grad(u, KIND: tl.constexpr):
    """Its derivative."""
    if KIND == "erf":
        beyond, bell = _beyond(u)
        return tl.where(u >= 0, 1.0 - beyond, beyond) + (0.3989422804014327 * u) * bell
    else:
        g, beyond = _gate(u)
        bend = u * (1.5957691216057308 + 0.21406444881780076 * (u * u))
        return tl.where(u >= 0, g, beyond) + (g * beyond) * bend


@triton.jit
def _gelu_rows(
    u,  # [M, N]
    u_row,
    dy,  # [M, N] or None
    dy_row,
    out,  # [M, N]
    out_row,
    rows,
    columns,
    KIND: tl.constexpr,  # erf or tanh
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m64 = m.to(tl.int64)[:, None]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    value = tl.load(u + m64 * u_row + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if dy is None:
        value = gelu(value, KIND)
    else:
        grad = tl.load(dy + m64 * dy_row + n[None, :], mask=inside, other=0.0)
        value = gelu_grad(value, KIND) * grad.to(tl.float32)
    tl.store(out + m64 * out_row + n[None, :], value.to(out.dtype.element_ty), mask=inside)


def gelu_forward(
    u: Tensor, kind: str = "erf", out: Tensor | None = None, tile: ElementTile = ELEMENTS
) -> Tensor:
    """GELU(u) [M, N]; ``out`` may be the left of a bordered buffer. Rows are contiguous."""
    return _launch_gelu(u, None, kind, out, tile)


def gelu_input_grad(
    dy: Tensor,
    u: Tensor,
    kind: str = "erf",
    out: Tensor | None = None,
    tile: ElementTile = ELEMENTS,
) -> Tensor:
    """du = GELU'(u) dy [M, N], likewise."""
    return _launch_gelu(u, dy, kind, out, tile)


def _launch_gelu(
    u: Tensor, dy: Tensor | None, kind: str, out: Tensor | None, tile: ElementTile
) -> Tensor:
    out = u.new_empty(tuple(u.shape)) if out is None else out
    for matrix in (u, out, u if dy is None else dy):
        assert matrix.shape == u.shape and matrix.stride(1) == 1, matrix.stride()
    assert kind in ("erf", "tanh"), kind
    if u.numel() == 0:
        return out
    rows, columns = u.shape
    grid = (triton.cdiv(rows, tile.block_m), triton.cdiv(columns, tile.block_n))
    args = (u, u.stride(0), dy, 0 if dy is None else dy.stride(0), out, out.stride(0))
    constants = dict(KIND=kind, **tile.arguments())
    launch(_gelu_rows, grid, u.device, (*args, rows, columns), constants, [out])
    return out


# LayerNorm over the last dimension, its rebuilding from saved statistics, and its input gradient.
#
#     x^ = (x - mean) rstd     y = x^ weight + bias     rstd = (variance + eps)^-1/2, of each row
#     g = dy weight            dx = rstd (g - average(g) - x^ average(g x^)) + residual
#
#                 x, y, dy, dx [M, D]   weight, bias [D]   mean, rstd [M] fp32
#
# A row is held whole in fp32 registers, read once and rounded once. ``out`` may be the left columns
# of a bordered buffer [M, D + sum R], so that the next product finds its operand where it needs it.
# ``rebuild`` is the forward with the statistics it handed back: nothing but x is kept for backward.
# ``residual`` is the gradient that passed by the branch.


class NormedRows(NamedTuple):
    """What one forward hands back."""

    y: Tensor  # [M, D]
    mean: Tensor  # [M], fp32
    rstd: Tensor  # [M], fp32


@triton.jit
def _row_tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, columns and mask of one program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    return m, m.to(tl.int64)[:, None], d, (m < rows)[:, None] & (d < columns)[None, :]


@triton.jit
def column_of(vector, d, columns, default):
    """[1, D] of it in fp32; a vector that is absent is its neutral element."""
    if vector is not None:
        return tl.load(vector + d, mask=d < columns, other=0.0).to(tl.float32)[None, :]
    else:
        return default


@triton.jit
def _layer_norm(
    x,  # [M, D]
    x_row,
    weight,  # [D] or None
    bias,  # [D] or None
    y,  # [M, D]
    y_row,
    mean,  # [M]
    rstd,  # [M]
    rows,
    columns,
    eps,
    GIVEN: tl.constexpr,  # mean and rstd are read, not written
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m, m64, d, inside = _row_tile(rows, columns, BLOCK_M, BLOCK_D)
    z = tl.load(x + m64 * x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        average = tl.load(mean + m, mask=m < rows, other=0.0)
        inverse = tl.load(rstd + m, mask=m < rows, other=0.0)
        z = z - average[:, None]
    else:
        average = tl.sum(z, axis=1) / columns
        z = tl.where(inside, z - average[:, None], 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(z * z, axis=1) / columns + eps)
        tl.store(mean + m, average, mask=m < rows)
        tl.store(rstd + m, inverse, mask=m < rows)
    out = z * inverse[:, None] * column_of(weight, d, columns, 1.0) + column_of(
        bias, d, columns, 0.0
    )
    tl.store(y + m64 * y_row + d[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_grad(
    dy,  # [M, D]
    dy_row,
    x,  # [M, D]
    x_row,
    weight,  # [D] or None
    mean,  # [M]
    rstd,  # [M]
    residual,  # [M, D] or None
    residual_row,
    dx,  # [M, D]
    dx_row,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m, m64, d, inside = _row_tile(rows, columns, BLOCK_M, BLOCK_D)
    average = tl.load(mean + m, mask=m < rows, other=0.0)[:, None]
    inverse = tl.load(rstd + m, mask=m < rows, other=0.0)[:, None]
    z = tl.load(x + m64 * x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + m64 * dy_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, (z - average) * inverse, 0.0)
    g = g * column_of(weight, d, columns, 1.0)
    along = tl.sum(g * z, axis=1)[:, None] / columns
    out = inverse * (g - tl.sum(g, axis=1)[:, None] / columns - z * along)
    if residual is not None:
        at = residual + m64 * residual_row + d[None, :]
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + m64 * dx_row + d[None, :], out.to(dx.dtype.element_ty), mask=inside)


def layer_norm_forward(
    x: Tensor,  # [M, D], rows contiguous
    weight: Tensor | None,  # [D], contiguous, any float dtype
    bias: Tensor | None,  # likewise
    eps: float,
    out: Tensor | None = None,  # [M, D], rows contiguous, any float dtype
    tile: RowTile | None = None,
) -> NormedRows:
    """LayerNorm of each row, in x's dtype or ``out``'s, and its statistics."""
    mean, rstd = (x.new_empty((x.shape[0],), dtype=torch.float32) for _ in range(2))
    return _launch_forward(x, weight, bias, eps, mean, rstd, False, out, tile)


def layer_norm_rebuild(
    x: Tensor,  # [M, D], rows contiguous
    weight: Tensor | None,  # [D], contiguous
    bias: Tensor | None,  # [D], contiguous
    mean: Tensor,  # [M], fp32
    rstd: Tensor,  # [M], fp32
    out: Tensor | None = None,  # [M, D], rows contiguous
    tile: RowTile | None = None,
) -> Tensor:
    """What ``forward`` made of x, from its statistics."""
    return _launch_forward(x, weight, bias, 0.0, mean, rstd, True, out, tile).y


def layer_norm_input_grad(
    dy: Tensor,  # [M, D], rows contiguous
    x: Tensor,  # [M, D], rows contiguous
    weight: Tensor | None,  # [D], contiguous
    mean: Tensor,  # [M], fp32
    rstd: Tensor,  # [M], fp32
    residual: Tensor | None = None,  # [M, D], rows contiguous; added
    out: Tensor | None = None,  # [M, D], rows contiguous
    tile: RowTile | None = None,
) -> Tensor:
    """dx, in dy's dtype or ``out``'s."""
    dx = dy.new_empty(tuple(dy.shape)) if out is None else out
    _check([weight], dy, x, dx, *(() if residual is None else (residual,)))
    if dx.numel() == 0:
        return dx
    rows, columns = dy.shape
    tile = tile or row_tile(columns)
    assert columns <= tile.block_d, (columns, tile)
    args = (
        *(dy, dy.stride(0), x, x.stride(0), weight, mean, rstd),
        *(residual, 0 if residual is None else residual.stride(0), dx, dx.stride(0)),
        *(rows, columns),
    )
    grid = (triton.cdiv(rows, tile.block_m),)
    launch(_layer_norm_grad, grid, dy.device, args, tile.arguments(), [dx])
    return dx


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    out: Tensor | None,
    tile: RowTile | None,
) -> NormedRows:
    y = x.new_empty(tuple(x.shape)) if out is None else out
    _check([weight, bias], x, y)
    if y.numel() == 0:
        return NormedRows(y, mean, rstd)
    rows, columns = x.shape
    tile = tile or row_tile(columns)
    assert columns <= tile.block_d, (columns, tile)
    args = (x, x.stride(0), weight, bias, y, y.stride(0), mean, rstd, rows, columns, float(eps))
    constants = dict(GIVEN=given, **tile.arguments())
    written = [y] if given else [y, mean, rstd]
    launch(_layer_norm, (triton.cdiv(rows, tile.block_m),), x.device, args, constants, written)
    return NormedRows(y, mean, rstd)


def _check(vectors: list[Tensor | None], *matrices: Tensor) -> None:
    for vector in vectors:
        assert vector is None or (vector.shape == matrices[0].shape[1:] and vector.is_contiguous())
    for matrix in matrices:
        assert matrix.shape == matrices[0].shape and matrix.stride(1) == 1, matrix.stride()
    assert matrices[0].shape[1] <= MOST_WIDTH, matrices[0].shape


# What a product passes through between its fp32 accumulator and its one rounding.
#
#     forward    u = acc + bias    y = residual + factor act(u)
#     grad       y = act'(u) acc                                      of backward
#
#                 bias, factor [N]   u, residual, y [M, N]
#
# u is stored, rounded, where an activation follows and backward may read it. ``factor`` is the
# LayerScale of a block. All of it is fp32 and y is rounded once.


class EpilogueOperands(NamedTuple):
    """Its operands; Triton takes it apart as a kernel argument, None a constant."""

    bias: Tensor | None = None  # [N], contiguous
    factor: Tensor | None = None  # [N], contiguous
    residual: Tensor | None = None  # [M, N], rows contiguous
    residual_row: int = 0
    u: Tensor | None = None  # [M, N], rows contiguous; read for a derivative, else written
    u_row: int = 0

    @property
    def heavy(self) -> bool:
        """Whether more than a bias is added: it takes registers beside the accumulator."""
        return not (self.factor is None and self.residual is None and self.u is None)

    def kernel(self, product: str, dtype: torch.dtype, active: bool = False) -> str:
        """Which launch of launches.py a ``product`` (extended, one_pass) is that ends so."""
        if active:
            return f"{product}_gelu"
        if not self.heavy:
            return product
        joined = (self.factor, self.residual)
        same = all(t is None or t.dtype is dtype for t in joined)
        return f"{product}_scale" if same else f"{product}_wide"


def epilogue_operands(
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    u: Tensor | None = None,
) -> EpilogueOperands:
    """With the strides of its operands."""
    for vector in (bias, factor):
        assert vector is None or vector.is_contiguous(), vector.stride()
    rows = [0 if t is None else t.stride(0) for t in (residual, u)]
    for matrix in (residual, u):
        assert matrix is None or matrix.stride(1) == 1, matrix.stride()
    return EpilogueOperands(bias, factor, residual, rows[0], u, rows[1])


@triton.jit
def _row(vector, n, columns):
    """[1, N] of it in fp32."""
    return tl.load(vector + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def finish(
    acc,
    epilogue,
    y,
    y_row,
    m,
    n,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    ACTIVATION_GRAD: tl.constexpr,
):
    """Store a tile of y at rows m and columns n."""
    m64 = m.to(tl.int64)[:, None]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if epilogue.bias is not None:
        acc += _row(epilogue.bias, n, columns)
    if ACTIVATION != "none":
        if epilogue.u is not None:
            at = epilogue.u + m64 * epilogue.u_row + n[None, :]
            if ACTIVATION_GRAD:
                acc *= gelu_grad(tl.load(at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
            else:
                tl.store(at, acc.to(epilogue.u.dtype.element_ty), mask=inside)
        if not ACTIVATION_GRAD:
            acc = gelu(acc, ACTIVATION)
    if epilogue.factor is not None:
        acc *= _row(epilogue.factor, n, columns)
    if epilogue.residual is not None:
        at = epilogue.residual + m64 * epilogue.residual_row + n[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m64 * y_row + n[None, :], acc.to(y.dtype.element_ty), mask=inside)
