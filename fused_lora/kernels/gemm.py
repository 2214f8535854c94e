"""Products into given memory, thin ones laid out for the library, and who computes in TF32."""

from __future__ import annotations

import torch
from torch import Tensor

THIN = 16  # ranks below it leave the vector registers of a CPU's GEMM half empty


def dense(p: Tensor) -> Tensor:
    """``p``, copied if it is a row or column that is not contiguous.

    torch 2.9's bf16 matrix-vector product on CPUs takes every vector for a contiguous one.
    """
    return p.contiguous() if 1 in p.shape else p


def accumulate(out: Tensor, p: Tensor, q: Tensor, scale: float, beta: int = 1) -> Tensor:
    """``out = beta * out + scale * p q`` in place; ``beta`` 0 never reads ``out``."""
    if dense(out) is not out:  # the same mistake would write beside it
        term = torch.mm(dense(p), dense(q))
        return out.add_(term, alpha=scale) if beta else torch.mul(term, scale, out=out)
    return out.addmm_(dense(p), dense(q), beta=beta, alpha=scale)


def columns(t: Tensor, part: slice) -> Tensor:
    """``t[:, part]``, at no cost where that is all of ``t``."""
    width = part.stop - part.start
    return t if width == t.shape[1] else t.narrow(1, part.start, width)


def thin_rows(b: Tensor, rows: int) -> Tensor:
    """``b`` [N, R] with each of its R columns contiguous where that speeds ``dy @ b`` up, M rows.

    On a CPU, 2 to 5 times at R = 4 (docs/hardware_notes.md); the copy is R x N elements.
    """
    copies = b.device.type == "cpu" and b.shape[1] < THIN and rows >= THIN
    return b.t().contiguous().t() if copies else b


def outer(p: Tensor, q: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * pT q`` [P, Q] of p [M, P] and q [M, Q], rounded once to ``dtype``.

    A CPU reduces a thin q three to five times as fast from the transposed side.
    """
    if p.device.type == "cpu" and q.shape[1] < THIN <= p.shape[0]:
        return product(q.t(), p, scale, dtype).t()
    return product(p.t(), q, scale, dtype)


def batched_product(p: Tensor, q: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``product`` of each matrix of p [G, P, M] and q [G, M, Q]."""
    widens = dtype is torch.float32 and p.dtype in (torch.bfloat16, torch.float16)
    y = torch.bmm(p, q, out_dtype=dtype) if widens and p.is_cuda else torch.bmm(p, q).to(dtype)
    return y if scale == 1.0 else y.mul_(scale)


def product(p: Tensor, q: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * p q``; on CUDA the fp32 accumulator reaches an fp32 ``dtype`` unrounded."""
    p, q = dense(p), dense(q)
    widens = dtype is torch.float32 and p.dtype in (torch.bfloat16, torch.float16)
    y = torch.mm(p, q, out_dtype=dtype) if widens and p.is_cuda else torch.mm(p, q).to(dtype)
    return y if scale == 1.0 else y.mul_(scale)


def is_tf32(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` may be of TF32: fp32 where torch allows it."""
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
