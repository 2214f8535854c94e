"""Shared settings: a cache folder of the run's own, so that no test reads or writes the user's."""

import os
import tempfile

os.environ["FUSED_LORA_CACHE_DIR"] = tempfile.mkdtemp(prefix="fused-lora-test-")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers."""
    torch.manual_seed(0)
