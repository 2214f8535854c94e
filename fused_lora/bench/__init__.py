"""Clocks and provenance: what an adapted network costs, beside what the frozen one costs."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fused-lora bench`` with ``argv``; the exit status, 0 when every row was recorded."""
    from fused_lora.bench.command import run

    return run(argv)
