"""Merges whose fp32 sums are exact in any order, so that results are equal to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.kernels.cuda.lora_merge import CompiledMerge
from fused_lora.reference.lora_merge import merge

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One merge, and why it is here."""

    why: str
    n: int
    k: int
    r: int
    a_block: bool = False  # a and b are blocks of larger tensors
    transposed: bool = False  # a and b are stored transposed
    row_pad: int = 0  # elements between rows of w and of out
    lead: int = 0  # elements before the first, which moves it off 16 bytes
    in_place: bool = False
    offset: int = 0
    scale: float = 0.5


CASES = [
    Case("one whole tile and one whole chunk", 64, 128, 16),
    Case("one element", 1, 1, 1),
    Case("odd everywhere, several tiles", 197, 389, 5),
    Case("one past a tile and past a chunk", 65, 129, 17, scale=-2.0),
    Case("a ViT-S block, in place", 130, 384, 64, in_place=True),
    Case("a copy", 3, 1000, 0),
    Case("shared adapters", 40, 136, 20, a_block=True),
    Case("stored transposed", 40, 136, 20, transposed=True),
    Case("rows that are not 16-byte aligned", 20, 136, 4, row_pad=3),
    Case("rows that are, with gaps", 20, 136, 4, row_pad=8),
    Case("aligned rows that end inside a group of eight", 20, 133, 4, row_pad=3),
    Case("rows aligned in four-byte elements, not in two-byte ones", 20, 132, 4),
    Case("a base that is not aligned", 20, 136, 4, lead=1),
    Case("random indices beyond 32 bits", 20, 136, 4, offset=2**35 - 7),
]


def _few_bits(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Eighths between -1 and 1: products and sums of thousands of them are exact in fp32."""
    return (torch.randint(-8, 9, shape) / 8).to(dtype)


def _adapter(case: Case, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if case.a_block:
        return _few_bits((shape[0] + 5, shape[1] + 3), dtype)[2 : 2 + shape[0], 1 : 1 + shape[1]]
    return _few_bits(shape[::-1], dtype).T if case.transposed else _few_bits(shape, dtype)


def _matrix(case: Case, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in a buffer with the case's gaps; the gaps hold NaN."""
    n, k = values.shape
    row = k + case.row_pad
    buffer = torch.full((case.lead + n * row,), float("nan"), dtype=dtype)
    view = buffer.as_strided((n, k), (row, 1), case.lead)
    return view.copy_(values)


def build(
    case: Case, w_dtype: torch.dtype, out_dtype: torch.dtype, dtype: torch.dtype
) -> CompiledMerge:
    """The operands of ``case``; w has more bits than out has room for."""
    w = _matrix(case, torch.randint(-(2**12), 2**12, (case.n, case.k)) / 1024, w_dtype)
    out = _matrix(case, torch.full((case.n, case.k), float("nan")), out_dtype)
    a, b = _adapter(case, (case.r, case.k), dtype), _adapter(case, (case.n, case.r), dtype)
    shared = w if case.in_place and w_dtype == out_dtype else out
    return CompiledMerge(w, shared, a, b, case.scale, case.offset)


def expected(item: CompiledMerge, rounding: str, seed: int, step: int) -> Tensor:
    """What the reference makes of ``item``, before anything is written."""
    operands = (item.w.double(), item.a.double(), item.b.double())
    dtype = item.out.dtype
    return merge(*operands, item.scale, rounding, seed, step, dtype=dtype, offset=item.offset)


def gaps(matrix: Tensor) -> Tensor:
    """The elements between the rows of ``matrix``."""
    (n, k), row = matrix.shape, matrix.stride(0)
    return matrix.as_strided((n - 1, row - k), (row, 1), matrix.storage_offset() + k)
