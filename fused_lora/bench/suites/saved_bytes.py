"""``fused-lora bench --suite saved_bytes``: what a block keeps for its backward, by method."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

import torch

from fused_lora.bench import correctness_gate
from fused_lora.bench.clock import clock_for
from fused_lora.bench.correctness_gate import Gate
from fused_lora.bench.measure import able
from fused_lora.bench.provenance import Provenance, provenance
from fused_lora.bench.registry import SUITES, job
from fused_lora.bench.rows import JsonRow, append, read_as
from fused_lora.bench.rows import newest as latest
from fused_lora.bench.runner import MethodRun, Phases, enter
from fused_lora.bench.saved_tensors import saved_tensors
from fused_lora.bench.saved_tensors import text as text_of_saved
from fused_lora.bench.shapes import SHAPES, Grid
from fused_lora.bench.table import aligned, markdown_table, title
from fused_lora.bench.workload import STORED, blocks, precision, shallow

SUITE = "saved_bytes"


@dataclass(frozen=True)
class SavedCase:
    """The network of which the middle block is counted."""

    suite: str
    model: str  # timm's name, its first blocks
    blocks: int
    batch: int
    tokens: int
    width: int  # d
    rank: int
    dtype: str  # fp32 | bf16 | amp

    @property
    def unit(self) -> int:
        """Bytes of one [M, d] tensor in the precision of the matmuls."""
        return self.batch * self.tokens * self.width * (4 if self.dtype == "fp32" else 2)

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, rank {self.rank}, {self.dtype}"


@dataclass(frozen=True)
class SavedRow(JsonRow):
    """One method in one case, counted."""

    case: SavedCase
    method: str
    form: str  # adapters on a fused qkv: separate (three), joint (one), none
    bytes_per_block: int  # unique storages that the middle block keeps for backward
    fp32_bytes_per_block: int  # the part of it that is fp32
    weight_bytes_per_block: int  # the part of it that is 16-bit casts of weights
    units_per_block: float  # the rest, activations, in [M, d] tensors of the matmuls' precision
    fp32_copies_per_block: float  # 16-bit activations that the forward pass copied to fp32
    provenance: Provenance
    bytes_in_all: int = 0  # that the network's blocks and all around them keep; 0: not recorded


def read(folder: Path) -> Iterator[SavedRow]:
    """Every row of this suite below ``folder``."""
    return read_as(folder, [SUITE], SavedRow)


def newest(rows: Iterable[SavedRow]) -> list[SavedRow]:
    """The latest row of each case and method; counts are the same on every device."""
    return latest(rows, lambda row: (row.case, row.method))


HEADS = (
    *("method", "KB per block", "of it casts of weights", "[M, d] tensors", "of them fp32"),
    *("fp32 copies of x", "KB in all", "over frozen: block", "in all"),
)


def text(case: SavedCase, rows: Sequence[SavedRow]) -> str:
    """One aligned table."""
    floor = next((row for row in rows if row.method == "frozen"), None)
    body = [(*_cells(row), *_over(row, floor)) for row in rows]
    return "\n".join([f"{case.suite}: {case}", *aligned([HEADS, *body]), ""])


def _over(row: SavedRow, floor: SavedRow | None) -> tuple[str, str]:
    if floor is None or not floor.bytes_in_all:
        return "-", "-"
    return (
        f"{row.bytes_per_block / floor.bytes_per_block:.3f}",
        f"{row.bytes_in_all / floor.bytes_in_all:.3f}",
    )


def _cells(row: SavedRow) -> tuple[str, ...]:
    return (
        row.method,
        f"{row.bytes_per_block / 1e3:.0f}",
        f"{row.weight_bytes_per_block / 1e3:.0f}",
        f"{row.units_per_block:.2f}",
        f"{row.fp32_bytes_per_block / row.case.unit:.2f}",
        f"{row.fp32_copies_per_block:.1f}",
        f"{row.bytes_in_all / 1e3:.0f}",
    )


def markdown_lines(rows: Sequence[SavedRow]) -> Iterator[str]:
    """A sentence and a table for each model and rank; nothing without rows."""
    ordered = sorted(rows, key=lambda row: (row.case.model, row.case.rank, row.case.batch))
    for (model, rank, _), group in groupby(
        ordered, key=lambda row: (row.case.model, row.case.rank, row.case.batch)
    ):
        yield (
            f"**Kept for backward by one block** of `{model}` at rank {rank}, in [M, d] tensors of "
            "the precision of the matmuls; in brackets, how many activations are copied to fp32 "
            "on the way (amp: fp32 weights under bf16 autocast):"
        )
        yield _markdown(list(group))


def _markdown(rows: Sequence[SavedRow]) -> str:
    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    cells = {(row.method, row.case.dtype): _units(row) for row in rows}
    lines = [
        (title(method), *(cells.get((method, dtype), "-") for dtype in dtypes))
        for method in dict.fromkeys(row.method for row in rows)
    ]
    return markdown_table(("method", *dtypes), lines)


def _units(row: SavedRow) -> str:
    return f"{row.units_per_block:.1f} ({row.fp32_copies_per_block:.0f})"


BLOCKS = 3  # of each network; the middle one has a neighbour on both sides


@job(SUITE)
def run(options: argparse.Namespace, grid: Grid) -> int:
    """Count the whole grid; 1 when a method failed its gate."""
    origin, wrong = provenance(options.device), 0
    for case in cases(grid):
        rows = []
        for method_run, complaints in method_runs(case, grid.methods, options.device):
            if complaints:
                wrong += 1
                print(f"refused: {method_run.method.name} ({case}): {complaints}", file=sys.stderr)
            else:
                rows.append(record(case, method_run, origin))
                if options.saved_tensors:
                    print(saved_tensors_text(case, method_run, options.device))
        print(text(case, rows))
        if options.rows:
            append(rows, options.rows)
    return 1 if wrong else 0


def cases(grid: Grid) -> Iterator[SavedCase]:
    """Every network, rank and precision of the grid."""
    for name, batch, dtype in product(grid.models, grid.batches, grid.dtypes):
        shape = SHAPES[name]
        for rank in grid.ranks:
            yield SavedCase(SUITE, name, BLOCKS, batch, shape.tokens, shape.width, rank, dtype)


def method_runs(
    case: SavedCase, methods: Sequence[str], device: str
) -> Iterator[tuple[MethodRun, list[str]]]:
    """Each method compared and counted in a training step of the first blocks."""
    workload = SUITES["train_step"](SHAPES[case.model], case.batch, case.dtype, device)
    gate, phases = Gate(workload, case.rank), Phases(clock_for(device))
    with shallow(workload.base, case.blocks):
        for method in able(methods, case.dtype):
            method_run = enter(method, workload, gate, phases)
            yield (
                method_run,
                correctness_gate.complaints(method_run.errors, method_run.yardstick, case.dtype),
            )


def saved_tensors_text(case: SavedCase, method_run: MethodRun, device: str) -> str:
    """What each operation of the middle block keeps, run by itself."""
    block = blocks(method_run.model)[case.blocks // 2]
    shape = (case.batch, case.tokens, case.width)
    x = torch.randn(shape, device=device, dtype=STORED[case.dtype], requires_grad=True)
    with precision(case.dtype, device):
        entries = saved_tensors(block(x), model=method_run.model)
    title = f"{method_run.method.name}, one block ({case})"
    return f"{title}\n{text_of_saved(entries, case.batch * case.tokens)}\n"


def record(case: SavedCase, method_run: MethodRun, origin: Provenance) -> SavedRow:
    """The row of one method."""
    kept = method_run.saved_bytes_per_block or 0
    fp32, weights = method_run.block_parts
    return SavedRow(
        case=case,
        method=method_run.method.name,
        form=method_run.method.form,
        bytes_per_block=kept,
        fp32_bytes_per_block=fp32,
        weight_bytes_per_block=weights,
        units_per_block=(kept - weights) / case.unit,
        fp32_copies_per_block=method_run.wide_copies / case.blocks,
        provenance=origin,
        bytes_in_all=method_run.saved_bytes,
    )
