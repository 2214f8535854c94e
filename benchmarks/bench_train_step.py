"""A training step of a timm vision transformer: forward, loss, backward, AdamW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shapes import STEP_BATCH, STEP_RANKS, WIDTHS

from fused_lora.bench.clock import Step
from fused_lora.bench.shapes import ModelShape

METHODS = ["frozen", "naive", "peft", "addmm", "fused", "fused_joint", "full"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", STEP_RANKS)
@pytest.mark.parametrize("shape", WIDTHS, ids=lambda shape: shape.name)
def bench_train_step(
    benchmark: Callable, step: Callable[..., Step], shape: ModelShape, rank: int, method: str
) -> None:
    """One step on two images."""
    pytest.importorskip("timm")
    benchmark.group = f"{shape.name}, rank {rank}"
    run = step("train_step", shape, STEP_BATCH, rank, method)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
