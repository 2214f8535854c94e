"""``fused-lora bench --suite saved_bytes``: judged and counted, a table, rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product

import torch

from fused_lora.bench import gate
from fused_lora.bench.clock import clock_for
from fused_lora.bench.depth import blocks, shallow
from fused_lora.bench.judge import Judge
from fused_lora.bench.measure import able
from fused_lora.bench.phases import Phases
from fused_lora.bench.provenance import Provenance, provenance
from fused_lora.bench.race import Entrant, enter
from fused_lora.bench.registry import SUITES, job
from fused_lora.bench.rows import append
from fused_lora.bench.saved_bytes.rows import SUITE, SavedCase, SavedRow
from fused_lora.bench.saved_bytes.table import text
from fused_lora.bench.saved_ledger import ledger
from fused_lora.bench.saved_ledger import text as text_of_ledger
from fused_lora.bench.shapes import SHAPES, Grid
from fused_lora.bench.workload import STORED, precision

BLOCKS = 3  # of each network; the middle one has a neighbour on both sides


@job(SUITE)
def run(options: argparse.Namespace, grid: Grid) -> int:
    """Count the whole grid; 1 when a method failed its gate."""
    origin, wrong = provenance(options.device), 0
    for case in cases(grid):
        rows = []
        for entrant, complaints in entrants(case, grid.contenders, options.device):
            if complaints:
                wrong += 1
                print(f"refused: {entrant.contender.name} ({case}): {complaints}", file=sys.stderr)
            else:
                rows.append(record(case, entrant, origin))
                if options.ledger:
                    print(ledger_text(case, entrant, options.device))
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


def entrants(
    case: SavedCase, contenders: Sequence[str], device: str
) -> Iterator[tuple[Entrant, list[str]]]:
    """Each method judged and counted in a training step of the first blocks."""
    workload = SUITES["train_step"](SHAPES[case.model], case.batch, case.dtype, device)
    judge, phases = Judge(workload, case.rank), Phases(clock_for(device))
    with shallow(workload.base, case.blocks):
        for contender in able(contenders, case.dtype):
            entrant = enter(contender, workload, judge, phases)
            yield entrant, gate.complaints(entrant.errors, entrant.yardstick, case.dtype)


def ledger_text(case: SavedCase, entrant: Entrant, device: str) -> str:
    """What each operation of the middle block keeps, run by itself."""
    block = blocks(entrant.model)[case.blocks // 2]
    shape = (case.batch, case.tokens, case.width)
    x = torch.randn(shape, device=device, dtype=STORED[case.dtype], requires_grad=True)
    with precision(case.dtype, device):
        entries = ledger(block(x), model=entrant.model)
    title = f"{entrant.contender.name}, one block ({case})"
    return f"{title}\n{text_of_ledger(entries, case.batch * case.tokens)}\n"


def record(case: SavedCase, entrant: Entrant, origin: Provenance) -> SavedRow:
    """The row of one method."""
    kept = entrant.saved_bytes_per_block or 0
    fp32, weights = entrant.block_parts
    return SavedRow(
        case=case,
        contender=entrant.contender.name,
        form=entrant.contender.form,
        bytes_per_block=kept,
        fp32_bytes_per_block=fp32,
        weight_bytes_per_block=weights,
        units_per_block=(kept - weights) / case.unit,
        fp32_copies_per_block=entrant.wide_copies / case.blocks,
        provenance=origin,
        bytes_in_all=entrant.saved_bytes,
    )
