"""The counting suite: what it says of fp32, and how rows become a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_lora.bench import main
from fused_lora.bench.suites import saved_bytes
from fused_lora.bench.suites.saved_bytes import markdown_lines


def test_fused_keeps_no_fp32_copy_and_no_more_than_frozen_and_h(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    argv = ["--suite", "saved_bytes", "--dtype", "amp", "--batch", "1", "--device", "cpu"]
    argv += ["--models", "vit_small_patch16_224", "--ranks", "16"]
    assert main([*argv, "--methods", "frozen,naive,fused", "--rows", str(tmp_path)]) == 0
    found = {row.method: row for row in saved_bytes.read(tmp_path)}
    assert all(row.fp32_copies_per_block == 0 for row in found.values())
    assert found["fused"].fp32_bytes_per_block == found["frozen"].fp32_bytes_per_block
    assert found["fused"].units_per_block < found["naive"].units_per_block
    assert found["frozen"].weight_bytes_per_block == 2 * 12 * 384 * 384  # their bf16 casts
    assert "[M, d] tensors" in capsys.readouterr().out
    _, table = markdown_lines(list(found.values()))
    assert table.count("\n") == 4 and "| fused_lora | " in table
