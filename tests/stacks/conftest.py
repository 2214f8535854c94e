"""Nothing here depends on measured ceilings."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch) -> None:
    """Plans from the built-in figures: float16 takes a CPU seconds to measure."""
    monkeypatch.setenv("FUSED_LORA_CALIBRATE", "0")
