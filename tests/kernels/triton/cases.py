"""Problems small enough for an interpreter, each there for a reason."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton.tiles import BulkTile, GradTile, ThinTile, Tile
from fused_lora.types import Span
from tests.ops.problems import Problem, strided


@dataclass(frozen=True)
class Case:
    """One shape, and why it is here."""

    why: str
    m: int
    k: int
    n: int
    spans: tuple[Span, ...]
    bias: bool = True


CASES = [
    Case("one whole tile", 64, 64, 64, (Span(0, 64, 16),)),
    Case("odd everywhere, the rows of one image", 197, 71, 93, (Span(0, 93, 5),)),
    Case("one of everything", 1, 1, 1, (Span(0, 1, 1),), bias=False),
    Case("qkv with a boundary inside a tile", 37, 48, 120, tuple(
        Span(40 * g, 40 * g + 40, 4) for g in range(3)
    )),
    Case("free ranks, free columns", 70, 33, 150, (Span(3, 41, 33), Span(90, 149, 1)), bias=False),
    Case("spans out of order", 50, 64, 128, (Span(64, 128, 16), Span(0, 64, 64))),
    Case("several rank blocks", 33, 90, 70, (Span(0, 30, 64), Span(30, 70, 40))),
    Case("no rows", 0, 20, 24, (Span(0, 24, 4),)),
]  # fmt: skip
IDS = [case.why for case in CASES]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Smaller than any that ship, so that few elements make many tiles.
TILE = Tile(32, 32, 32, 2, 4, group_m=2)
BULK_TILE = BulkTile(32, 32, 32, 2, 4, group_m=2, rest_n=16)
THIN_TILE = ThinTile(32, 32, 32, 2, 4)
GRAD_TILE = GradTile(32, 32, 32, 2, 4)


def build(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int = 0) -> Problem:
    """The operands of ``case``; a and b are blocks of larger tensors, some transposed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    m, k, n = case.m, case.k, case.n
    return Problem(
        torch.randn(m, k, dtype=dtype),
        torch.randn(n, k, dtype=dtype) / k**0.5,
        torch.randn(n, dtype=dtype) if case.bias else None,
        [strided(rng, s.rank, k, adapter_dtype) / k**0.5 for s in case.spans],
        [strided(rng, s.width, s.rank, adapter_dtype) / s.rank**0.5 for s in case.spans],
        tuple(rng.choice([1.0, 0.3, 2.0]) for _ in case.spans),
        case.spans,
        torch.randn(m, n, dtype=dtype),
    )


def adapters(p: Problem) -> Adapters:
    """As the kernels take them."""
    return Adapters(p.a, p.b, p.scales, p.spans)


def lowered(p: Problem, dtype: torch.dtype) -> Problem:
    """The same with a and b in the compute dtype: what plain torch would multiply."""
    a, b = ([t.to(dtype) for t in group] for group in (p.a, p.b))
    return Problem(p.x, p.w, p.bias, a, b, p.scales, p.spans, p.dy)
