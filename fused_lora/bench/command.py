"""``fused-lora bench``: races over a grid, a table, a report, rows."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import fused_lora.bench.contenders
import fused_lora.bench.suites  # noqa: F401  both register what can be raced
from fused_lora.bench import options as command_line
from fused_lora.bench import readme, table
from fused_lora.bench.clock import clock_for
from fused_lora.bench.progress import Progress
from fused_lora.bench.provenance import provenance
from fused_lora.bench.race import race
from fused_lora.bench.registry import CONTENDERS, SUITES, Contender
from fused_lora.bench.report.page import page
from fused_lora.bench.rows import Case, Refusal, Row, append, read
from fused_lora.bench.shapes import SHAPES, Grid
from fused_lora.bench.workload import Workload

RESULTS = Path("benchmarks/results")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 when a row was refused, 0 otherwise."""
    parser = command_line.parser()
    options = parser.parse_args(argv)
    if options.readme:
        return _rewrite(parser, options.readme, options.rows or RESULTS)
    if not options.out.absolute().parent.is_dir():
        parser.error(f"argument --out: no folder {str(options.out.parent)!r}")
    grid = command_line.chosen(options)
    if not any(_fitting(grid.ranks, name) for name in grid.models):
        parser.error(f"argument --ranks: {min(grid.ranks)} is over the width of {grid.models}")
    for name, rank in product(grid.models, grid.ranks):
        if not _fitting([rank], name):
            print(f"left out: rank {rank} is over the width of {name}", file=sys.stderr)
    rows, refusals = measure(options.suite, grid, options.device, options.rows)
    print(table.text(rows))
    for refusal in refusals:
        print(f"refused: {refusal.contender} ({refusal.case}): {refusal.reason}", file=sys.stderr)
    options.out.write_text(page(rows, refusals), encoding="utf-8")
    print(f"report: {options.out}")
    if options.rows:
        print(f"rows: {options.rows}")
    return 1 if refusals else 0


def measure(
    suite: str, grid: Grid, device: str, folder: Path | None = None
) -> tuple[list[Row], list[Refusal]]:
    """Run every race of ``grid``, the budget shared out evenly over those still to come.

    Args:
        suite: Which suite.
        grid: What to cover.
        device: Where.
        folder: Rows are appended below it race by race, so that a broken run keeps its first ones.
    """
    clock, origin = clock_for(device), provenance(device)
    networks = list(product(grid.models, grid.batches, grid.dtypes))
    total = sum(len(_fitting(grid.ranks, name)) for name, _, _ in networks)
    progress, left = Progress(total), grid.budget_s
    rows: list[Row] = []
    refusals: list[Refusal] = []
    for i, (workload, case) in enumerate(_workloads(suite, grid, device)):
        entered = _able(grid.contenders, case.dtype)
        share = left / (total - i)
        found, refused = race(workload, case, entered, clock, share, origin, progress.tell)
        left -= sum(row.median_ms * row.rounds for row in found) / 1e3
        rows += found
        if folder:
            append(found, folder)
        refusals += refused
        progress.advance(str(case))
        gc.collect()
    progress.close()
    return rows, refusals


def _workloads(suite: str, grid: Grid, device: str) -> Iterator[tuple[Workload, Case]]:
    for name, batch, dtype in product(grid.models, grid.batches, grid.dtypes):
        workload = SUITES[suite](SHAPES[name], batch, dtype, device)
        for rank in _fitting(grid.ranks, name):
            yield workload, Case(suite, name, batch, SHAPES[name].tokens, rank, dtype)


def _fitting(ranks: Sequence[int], model: str) -> list[int]:
    """The ranks that are below full rank, the width of the narrowest projection."""
    return [rank for rank in ranks if rank <= SHAPES[model].width]


def _able(names: Sequence[str], dtype: str) -> list[Contender]:
    able = []
    for contender in CONTENDERS.pick(names):
        if reason := contender.why_not(dtype):
            print(f"not raced: {contender.name}: {reason}", file=sys.stderr)
        else:
            able.append(contender)
    return able


def _rewrite(parser: argparse.ArgumentParser, path: Path, folder: Path) -> int:
    if not path.is_file():
        parser.error(f"argument --readme: no file {str(path)!r}")
    try:
        changed = readme.rewrite(path, read(folder))
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: {'rewritten' if changed else 'already as the rows have it'}")
    return 0
