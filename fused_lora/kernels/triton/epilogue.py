"""What a product passes through between its fp32 accumulator and its one rounding.

    forward    u = acc + bias    y = residual + factor act(u)
    slope      y = act'(u) acc                                      of backward

                bias, factor [N]   u, residual, y [M, N]

u is stored, rounded, where an activation follows and backward may read it. ``factor`` is the
LayerScale of a block. All of it is fp32 and y is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.kernels.triton.gelu import gelu, gelu_grad


class EpilogueOperands(NamedTuple):
    """Its operands; Triton takes it apart as a kernel argument, None a constant."""

    bias: Tensor | None = None  # [N], contiguous
    factor: Tensor | None = None  # [N], contiguous
    residual: Tensor | None = None  # [M, N], rows contiguous
    residual_row: int = 0
    u: Tensor | None = None  # [M, N], rows contiguous; read for a slope, else written
    u_row: int = 0

    @property
    def heavy(self) -> bool:
        """Whether more than a bias is added: it takes registers beside the accumulator."""
        return not (self.factor is None and self.residual is None and self.u is None)

    def kernel(self, dtype: torch.dtype, active: bool) -> str:
        """Which launch of launches.py a product of ``dtype`` is that ends so."""
        if active:
            return "extended_gelu"
        if not self.heavy:
            return "extended"
        joined = (self.factor, self.residual)
        same = all(t is None or t.dtype is dtype for t in joined)
        return "extended_scale" if same else "extended_wide"


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
    acc, epilogue, y, y_row, m, n, rows, columns, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr
):
    """Store a tile of y at rows m and columns n."""
    m64 = m.to(tl.int64)[:, None]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if epilogue.bias is not None:
        acc += _row(epilogue.bias, n, columns)
    if ACTIVATION != "none":
        if epilogue.u is not None:
            at = epilogue.u + m64 * epilogue.u_row + n[None, :]
            if SLOPE:
                acc *= gelu_grad(tl.load(at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
            else:
                tl.store(at, acc.to(epilogue.u.dtype.element_ty), mask=inside)
        if not SLOPE:
            acc = gelu(acc, ACTIVATION)
    if epilogue.factor is not None:
        acc *= _row(epilogue.factor, n, columns)
    if epilogue.residual is not None:
        at = epilogue.residual + m64 * epilogue.residual_row + n[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m64 * y_row + n[None, :], acc.to(y.dtype.element_ty), mask=inside)
