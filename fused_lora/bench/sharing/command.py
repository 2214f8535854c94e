"""``fused-lora bench --suite sharing``: counted, timed in turns, a table, rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch

from fused_lora.bench.clock import clock_for
from fused_lora.bench.provenance import Provenance, provenance
from fused_lora.bench.registry import job
from fused_lora.bench.rows import append
from fused_lora.bench.shapes import SHAPES, Grid
from fused_lora.bench.sharing.rows import SUITE, SharingCase, SharingRow
from fused_lora.bench.sharing.ways import STUDENTS, Launches, Way, ways
from fused_lora.bench.table import aligned, milliseconds
from fused_lora.bench.timing import interleave
from fused_lora.bench.workload import STORED
from fused_lora.testing.yardstick import error

HEADS = ("way", "launches", "beyond apart", "MB written", "beyond apart", "ms", "x apart")
CLOSE = {"fp32": 1e-5, "bf16": 2e-2}  # relative: both sum the same terms, in two orders at most


@job(SUITE)
def run(options: argparse.Namespace, grid: Grid) -> int:
    """The whole grid; 1 where sharing and slices disagree."""
    origin, wrong = provenance(options.device), 0
    grids = list(product(grid.models, grid.batches, grid.ranks, grid.dtypes))
    for model, batch, rank, dtype in grids:
        if model not in STUDENTS or dtype not in CLOSE:
            print(f"passed over: {model} in {dtype}", file=sys.stderr)
            continue
        case = SharingCase(SUITE, model, STUDENTS[model], batch, rank, dtype)
        rows = measured(case, options.device, grid.budget_s / len(grids), origin)
        wrong += not rows
        if not rows:
            print(f"refused: shared and slices disagree ({case})", file=sys.stderr)
            continue
        print(text(case, rows))
        if options.rows:
            append(rows, options.rows)
    return 1 if wrong else 0


def measured(
    case: SharingCase, device: str, budget_s: float, origin: Provenance
) -> list[SharingRow]:
    """A row for each way; none where the gradients differ."""
    found = ways(SHAPES[case.teacher], case.rank, device, STORED[case.dtype])
    generator = torch.Generator().manual_seed(1)
    size = found["apart"].models[0].get_submodule("patch_embed").img_size
    images = torch.randn(case.batch, 3, *size, generator=generator)  # type: ignore[misc]
    images = images.to(device, STORED[case.dtype])
    labels = torch.randint(1000, (case.batch,), generator=generator).to(device)
    steps = {name: partial(way.step, images, labels) for name, way in found.items()}
    if not agree(found, steps, CLOSE[case.dtype]):
        return []
    counts = {}
    for name, step in steps.items():
        with Launches() as counts[name]:
            step()
    times = interleave(steps, clock_for(device), budget_s, warmup=1)
    return [
        SharingRow(
            case,
            name,
            counts[name].count,
            counts[name].nbytes,
            len(times[name].samples_ms),
            times[name].median_ms,
            times[name].over(times["apart"]),
            origin,
        )
        for name in steps
    ]


def agree(found: dict[str, Way], steps: dict, close: float) -> bool:
    """Whether both ways of sharing give the teacher's adapters the same gradients."""
    grads = []
    for name in ("slices", "shared"):
        steps[name]()
        grads.append({key: grad.clone() for key, grad in found[name].gradients().items()})
    same = grads[0].keys() == grads[1].keys()
    return same and all(error(grads[1][key], grad) <= close for key, grad in grads[0].items())


def text(case: SharingCase, rows: Sequence[SharingRow]) -> str:
    """One aligned table."""
    base = rows[0]
    body = [
        (
            row.way,
            str(row.launches),
            f"{row.launches - base.launches:+d}",
            f"{row.written_bytes / 1e6:.1f}",
            f"{(row.written_bytes - base.written_bytes) / 1e6:+.2f}",
            milliseconds(row.median_ms),
            f"{row.ratio_apart:.3f}",
        )
        for row in rows
    ]
    return "\n".join([f"{case.suite}: {case}", *aligned([HEADS, *body]), ""])
