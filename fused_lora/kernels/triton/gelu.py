"""GELU and its slope on fp32 registers: in epilogues, and as kernels where no product is near.

erf   u Phi(u), erf by Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7, and no spilled registers
      slope Phi(u) + u phi(u), which share one exponential
tanh  u g, g = sigmoid(v), v = 2 sqrt(2 / pi) (u + 0.044715 u^3), which is 0.5 u (1 + tanh(v / 2))
      slope g + u g (1 - g) v'

Both are max(u, 0) - |u| times what lies beyond |u|, Phi(-|u|) or 1 - g(|u|): one form for both
signs. Powers of two and reciprocals are the chip's own, within a few units in the last place; what
is too small for either is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.launch import launch
from fused_lora.kernels.triton.tiles import ELEMENTS, ElementTile


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
