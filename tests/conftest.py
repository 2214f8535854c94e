"""What every test shares: a cache folder, plans and random numbers; GPU tests skipped here."""

from __future__ import annotations

import gc
import os
import tempfile

import pytest
import torch

os.environ["FUSED_LORA_CACHE_DIR"] = tempfile.mkdtemp(prefix="fused-lora-test-")
os.environ["FUSED_LORA_CALIBRATE"] = "0"  # plans are those of built-in figures, on any machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip, with a reason, where torch sees none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # not a folder of that name
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers."""
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected lives to the end: the garbage collector need not visit it."""
    gc.collect()
    gc.freeze()
