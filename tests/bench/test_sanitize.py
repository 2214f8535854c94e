"""sanitize.sh runs three tools, tells what they found, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sanitize.sh"
TOOLS = ("memcheck", "racecheck", "synccheck")


def sanitize(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A stand-in that notes how it was called and finds a race."""
    path = tmp_path / "tool"
    path.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *racecheck*) exit 9;; esac\n')
    path.chmod(0o755)
    return path


def test_each_tool_runs_and_what_one_finds_is_told(tool: Path, tmp_path: Path) -> None:
    done = sanitize(str(tmp_path / "out"), SANITIZER=str(tool), DTYPES="bfloat16")
    assert done.returncode == 1
    for name, word in zip(TOOLS, ("clean", "FAILED (9)", "clean"), strict=True):
        assert f"{name}: {word}" in done.stdout
    for name in TOOLS:
        called = (tmp_path / "out" / f"{name}.txt").read_text().split()
        assert called[:4] == ["--tool", name, "--error-exitcode", "9"]
        assert called[-2:] == ["benchmarks/sanitize.py", "bfloat16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_dry_run_passes_without_a_device(tmp_path: Path) -> None:
    done = sanitize("--dry-run", str(tmp_path), DTYPES="bfloat16")
    assert done.returncode == 0, done.stdout
    assert "nothing can run here: " in (tmp_path / "memcheck.txt").read_text()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = sanitize(str(tmp_path), SANITIZER="no-such-tool")
    assert done.returncode == 2 and "no-such-tool is not on PATH" in done.stderr
    assert "sanitize.sh [--dry-run] OUTDIR" in sanitize().stderr
