"""record.sh takes its whole road on a CPU, past a step that fails, and says which one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_lora.bench.rows import read

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "record.sh"


def record(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    done = record("--dry-run", str(tmp_path), "10", DRY_STEP="echo a wrong kernel; exit 3")
    log = (tmp_path / "log.txt").read_text()
    steps = [line.split("\t") for line in (tmp_path / "steps.tsv").read_text().splitlines()[1:]]
    fates = {name: status for name, status, _ in steps}
    assert fates.pop("broken") == "FAILED (3)" and "a wrong kernel" in log
    assert set(fates.values()) == {"ok"}, log[-3000:]
    assert list(fates)[-2:] == ["train-step", "sanitize"]  # the steps after the broken one
    assert done.returncode == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "Not well: broken (FAILED (3))." in summary and "`vit_small_patch16_224`" in summary
    assert {row.case.suite for row in read(tmp_path / "rows")} == {"six_projections", "train_step"}
    assert (tmp_path / "selftest-bfloat16.jsonl").stat().st_size


def test_no_time_is_said(tmp_path: Path) -> None:
    done = record("--dry-run", str(tmp_path), "0")
    assert done.returncode == 0
    assert "| selftest | no time left | 0 |" in (tmp_path / "summary.md").read_text()


def test_wrong_words_are_named(tmp_path: Path) -> None:
    assert "MINUTES is a whole number, got 'x'" in record(str(tmp_path), "x").stderr
    assert "record.sh [--dry-run] OUTDIR" in record().stderr
