"""Every Python block of docs/ runs, page by page; the reference names what is public."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_lora
from tests.test_readme import python_blocks

DOCS = Path(__file__).resolve().parent.parent / "docs"
RUNNING = (
    "index.md",
    "tutorial.md",
    "usage.md",
    "variants.md",
    "migrating.md",
    "choosing.md",
    "numerics.md",
    "stacks.md",
)


def script(page: Path) -> str:
    """One script whose tracebacks name the page's lines."""
    blocks = python_blocks(page.read_text())
    assert blocks, f"{page.name} shows no Python"
    return "\n".join(
        f"exec(compile({chr(10) * (line - 1) + code!r}, {page.name!r}, 'exec'))"
        for line, code in blocks
    )


SLOW = (
    "index.md",
    "tutorial.md",
    "usage.md",
    "variants.md",
    "migrating.md",
    "stacks.md",
)  # half a minute each


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RUNNING]
)
def test_blocks_run(name: str, tmp_path: Path) -> None:
    if name == "migrating.md":
        pytest.importorskip("peft")
    command = [sys.executable, "-c", script(DOCS / name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_reference_names_everything_public() -> None:
    named = re.findall(r"^::: fused_lora\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(set(fused_lora.__all__) - {"__version__"})


def test_every_page_is_run_or_shows_no_python() -> None:
    others = {path.name for path in DOCS.glob("*.md")} - {*RUNNING, "hardware_notes.md"}
    assert not {name for name in others if python_blocks((DOCS / name).read_text())}
    assert fused_lora.__all__
