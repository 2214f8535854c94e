"""The sharing suite: what it counts, and that it refuses what disagrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fused_lora.bench import main, readme
from fused_lora.bench.suites import sharing, train_step

pytest.importorskip("timm")
ARGV = ["--suite", "sharing", "--models", "vit_small_patch16_224", "--device", "cpu"]
OPERANDS = 12 * 3 * 2  # blocks; q, k and v; halves


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same depth, one patch and narrow."""
    import timm

    def build(name: str, device: str, dtype: torch.dtype, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        width = {"vit_small_patch16_224": 48, "vit_tiny_patch16_224": 32}[name]
        return timm.create_model(name, img_size=16, embed_dim=width, num_heads=2)

    monkeypatch.setattr(train_step, "build", build)


def run(folder: Path, *more: str) -> int:
    return main([*ARGV, "--budget-seconds", "0.01", "--rows", str(folder), *more])


def test_sharing_launches_one_kernel_an_operand(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--ranks", "16") == 0
    found = {row.variant: row for row in sharing.read(tmp_path)}
    assert list(found) == ["apart", "slices", "shared"]
    assert found["shared"].launches - found["apart"].launches == OPERANDS
    assert found["slices"].launches - found["apart"].launches >= 2 * OPERANDS
    beyond = {name: row.written_bytes - found["apart"].written_bytes for name, row in found.items()}
    assert beyond["shared"] == 4 * 16 * 32 * OPERANDS  # the student's gradients, once
    assert beyond["slices"] >= 2 * beyond["shared"]
    assert all(row.rounds >= 3 and row.median_ms > 0 for row in found.values())
    printed = capsys.readouterr().out
    assert "vit_small_patch16_224 and vit_tiny_patch16_224, batch 2, rank 16, fp32" in printed
    assert f"+{OPERANDS}" in printed
    (line,) = [t for t in readme.measured(tmp_path).splitlines() if "`share_adapters` |" in t]
    assert f"| {found['shared'].launches} |" in line


def test_ways_that_disagree_are_refused(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sharing.Variant.gradients
    monkeypatch.setattr(
        sharing.Variant,
        "gradients",
        lambda variant: {
            k: g + (variant.inside is sharing.slices) for k, g in right(variant).items()
        },
    )
    assert run(tmp_path) == 1
    assert "refused: shared and slices disagree" in capsys.readouterr().err
    assert not list(sharing.read(tmp_path))


def test_models_without_a_student_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGV[:2], "--models", "vit_base_patch14_dinov2", *ARGV[4:]]) == 0
    assert "passed over: vit_base_patch14_dinov2" in capsys.readouterr().err
