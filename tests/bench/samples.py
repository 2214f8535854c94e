"""Rows made up for the tests of this room."""

from __future__ import annotations

from dataclasses import replace

from fused_lora.bench.provenance import Provenance
from fused_lora.bench.rows import Case, Row

ORIGIN = Provenance(
    device="Some <Fast> Processor",
    threads=2,
    driver=None,
    torch="2.9.0",
    triton=None,
    fused_lora="0.1.0",
    python="3.11.7",
    peft="0.17.0",
    timm="1.0.0",
    commit="0123456789ab",
    time_utc="2030-01-01T00:00:00Z",
)
CASE = Case("train_step", "vit_small_patch16_224", 2, 197, 16, "fp32")


def row(method: str = "fused", median_ms: float = 123.25, **changes: object) -> Row:
    """A row of ``method`` with ``changes``."""
    made = Row(
        case=CASE,
        method=method,
        form="separate",
        rounds=3,
        median_ms=median_ms,
        q1_ms=median_ms - 1,
        q3_ms=median_ms + 2,
        ratio_frozen=1.25,
        ratio_naive=0.75,
        ratio_peft=None,
        errors={"y": 5e-7, "da": 1e-6, "db": 2e-6},
        yardstick={"y": 4e-7, "da": 1e-6, "db": 2e-6},
        saved_bytes=73_400_000,
        saved_bytes_per_block=6_000_000,
        wide_copies=0,
        peak_bytes=None,
        provenance=ORIGIN,
    )
    return replace(made, **changes)
