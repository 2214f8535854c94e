"""qkv, attention output, fc1 and fc2 of one block as linear operations: forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shapes import BATCH, RANKS, WIDTHS

from fused_lora.bench.clock import Step
from fused_lora.bench.shapes import ModelShape

METHODS = ["frozen", "naive", "naive_joint", "peft", "addmm", "fused", "fused_joint"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", WIDTHS, ids=lambda shape: f"d{shape.width}")
def bench_six_projections(
    benchmark: Callable, step: Callable[..., Step], shape: ModelShape, rank: int, method: str
) -> None:
    """One pass through the four layers and back."""
    benchmark.group = f"six projections, d={shape.width}, rank {rank}"
    run = step("six_projections", shape, BATCH, rank, method)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
