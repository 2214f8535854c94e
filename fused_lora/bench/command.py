"""``fused-lora bench``: methods timed over a grid, a table, a report, rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_lora.bench.methods
import fused_lora.bench.suites  # noqa: F401  both register what can be timed
from fused_lora.bench import options as command_line
from fused_lora.bench import readme, table
from fused_lora.bench.measure import measure, prepare
from fused_lora.bench.registry import JOBS
from fused_lora.bench.report.page import page

RESULTS = Path("benchmarks/results")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 when a row was refused, 0 otherwise."""
    parser = command_line.parser()
    options = parser.parse_args(argv)
    if options.prepare and options.suite in JOBS:
        parser.error(f"argument --prepare: only where methods are timed, not of {options.suite}")
    if options.readme:
        return _rewrite(parser, options.readme, options.rows or RESULTS)
    if not options.out.absolute().parent.is_dir():
        parser.error(f"argument --out: no folder {str(options.out.parent)!r}")
    try:
        grid = command_line.chosen(options)
    except ValueError as error:
        parser.error(str(error))
    if options.prepare:
        for line in prepare(options.suite, grid, options.device):
            print(line, flush=True)
        return 0
    if options.suite in JOBS:
        return JOBS[options.suite](options, grid)
    rows, refusals = measure(options.suite, grid, options.device, options.rows, options.verbose)
    print(table.text(rows))
    if memory := table.kept(rows):
        print(memory)
    for refusal in refusals:
        print(f"refused: {refusal.method} ({refusal.case}): {refusal.reason}", file=sys.stderr)
    options.out.write_text(page(rows, refusals), encoding="utf-8")
    print(f"report: {options.out}")
    if options.rows:
        print(f"rows: {options.rows}")
    return 1 if refusals else 0


def _rewrite(parser: argparse.ArgumentParser, path: Path, folder: Path) -> int:
    if not path.is_file():
        parser.error(f"argument --readme: no file {str(path)!r}")
    try:
        changed = readme.rewrite(path, folder)
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: {'rewritten' if changed else 'already as the rows have it'}")
    return 0
