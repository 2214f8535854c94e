"""Results without a GPU: the tests of ``interpreted/``, in processes of their own.

TRITON_INTERPRET is read where a kernel is decorated; a process interprets or compiles. Four files
share one: to start a process takes 4 CPU-seconds, as much as many a file takes itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"))
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_interpreted(part: int) -> None:
    files = map(str, FILES[part::PARTS])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
