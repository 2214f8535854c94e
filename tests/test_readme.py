"""Every Python block of the README runs, in order, in one process; links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of every block fenced as Python."""
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in FENCE.finditer(text)
        if match[1].lower() in {"python", "py", "python3"}
    ]


def as_script(blocks: list[tuple[int, str]]) -> str:
    """One script whose tracebacks name the README's lines."""
    runs = [f"exec(compile({chr(10) * (line - 1) + code!r}, 'README.md', 'exec'))"
            for line, code in blocks]  # fmt: skip
    return "\n".join(runs)


def test_blocks_run(tmp_path: Path) -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md")
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks, "the README shows no Python"
    command = [sys.executable, "-c", as_script(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr


def test_blocks_are_found_in_order_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```py\nx += 1\n```\n"
    assert python_blocks(text) == [(3, "x = 1\n"), (9, "x += 1\n")]


def test_a_failing_block_names_its_line() -> None:
    script = as_script([(3, "x = 1\n"), (9, "raise SystemError(x)\n")])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'File "README.md", line 9' in done.stderr


def test_readme_fits_on_a_few_screens() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md")
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"
