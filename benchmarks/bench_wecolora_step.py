"""A step of WeCoLoRA: the teacher's forward, and the step of a student of half its blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shapes import STEP_BATCH, STEP_RANKS, WIDTHS

from fused_lora.bench.clock import Step
from fused_lora.bench.shapes import ModelShape

METHODS = ["frozen", "naive", "peft", "fused"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", STEP_RANKS)
@pytest.mark.parametrize("shape", WIDTHS, ids=lambda shape: shape.name)
def bench_wecolora_step(
    benchmark: Callable, step: Callable[..., Step], shape: ModelShape, rank: int, method: str
) -> None:
    """One step on two images."""
    pytest.importorskip("timm")
    benchmark.group = f"{shape.name}, rank {rank}"
    run = step("wecolora_step", shape, STEP_BATCH, rank, method)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
