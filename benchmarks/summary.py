"""What ``record.sh`` leaves in a folder, as a page: steps, self-tests, comparisons."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fused_lora.bench.rows import Row, newest, read
from fused_lora.bench.table import markdown, milliseconds, ratio_rows, times


def page(folder: Path) -> str:
    """The whole summary."""
    return "\n".join([*steps(folder), *selftests(folder), *timed(folder)])


def steps(folder: Path) -> Iterator[str]:
    """Every step with its fate; those that did not end well by name."""
    lines = (folder / "steps.tsv").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines]
    yield "# What was recorded\n"
    yield _table(cells)
    wrong = [f"{name} ({status})" for name, status, *_ in cells[1:] if status != "ok"]
    yield f"\nNot well: {', '.join(wrong)}." if wrong else "\nEvery step ended well."


def selftests(folder: Path) -> Iterator[str]:
    """How many kernels passed, and each that failed."""
    for path in sorted(folder.glob("selftest-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        counts = Counter(row["verdict"] for row in rows)
        yield f"\n{path.stem}: {', '.join(f'{n} {word}' for word, n in counts.items())}"
        for row in rows:
            if row["verdict"] == "FAILED":
                kernel = f"{row['backend']} {row['kernel']} ({row['configuration']})"
                yield f"- {kernel}: {row['reason']}"


def timed(folder: Path) -> Iterator[str]:
    """The comparisons, and every row that a GPU alone can give."""
    rows = newest(read(folder / "rows"))
    if lines := ratio_rows(rows):
        yield "\n" + markdown(lines)
    if trained := [row for row in rows if row.case.suite == "train_step"]:
        yield "\n" + _table([["training step", "method", "ms", "the host's ms", "x frozen"]])
        yield "\n".join(map(_train_line, trained))
    special = [row for row in rows if (row.case.mode, row.case.cache) != ("eager", "warm")]
    if special:
        yield "\n" + _table([["case", "method", "ms", "x frozen", "x roofline"]])
        yield "\n".join(map(_line, special))


def _train_line(row: Row) -> str:
    host = "-" if row.host_ms is None else milliseconds(row.host_ms)
    cells = (milliseconds(row.median_ms), host, times(row.ratio_frozen))
    return f"| {row.case} | {row.method} | {' | '.join(cells)} |"


def _line(row: Row) -> str:
    over = row.median_ms / row.roofline_ms if row.roofline_ms else None
    cells = (milliseconds(row.median_ms), times(row.ratio_frozen), times(over))
    return f"| {row.case} | {row.method} | {' | '.join(cells)} |"


def _table(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
