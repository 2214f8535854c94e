"""``fused-lora bench --suite plan_choice``: is the plan that is taken the fastest there is?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product

import torch

from fused_lora.bench.clock import clock_for
from fused_lora.bench.provenance import provenance
from fused_lora.bench.registry import job
from fused_lora.bench.rows import append
from fused_lora.bench.runner import Progress, Shares
from fused_lora.bench.shapes import SHAPES, Grid, ModelShape
from fused_lora.bench.suites.plan_choice_trial import SUITE, PlanCase, PlanRow, Trial
from fused_lora.bench.table import aligned, milliseconds
from fused_lora.ops.ceilings import ceilings
from fused_lora.ops.planning import problem
from fused_lora.types import NO_CONTEXT, AdapterTraits, Needs, Span

HEADS = ("case", "chosen", "ms", "x frozen", "best measured", "ms", "chosen/best", "rounds")
WITHIN = (1.05, 1.10)  # ratios whose shares the summary gives


def text(rows: Sequence[PlanRow]) -> str:
    """One aligned table."""
    return "\n".join(aligned([HEADS, *(_cells(row) for row in rows)]))


def _cells(row: PlanRow) -> tuple[str, ...]:
    return (
        str(row.case),
        row.chosen,
        milliseconds(row.of(row.chosen).median_ms),
        f"{row.over_frozen:.2f}",
        "the same" if row.best == row.chosen else row.best,
        milliseconds(row.of(row.best).median_ms),
        f"{row.ratio:.2f}",
        str(row.rounds),
    )


def summary(rows: Sequence[PlanRow]) -> str:
    """How often the plan chose well, and where it chose worst."""
    if not rows:
        return "no case of plan_choice was measured"
    shares = [sum(row.ratio <= limit for row in rows) / len(rows) for limit in WITHIN]
    worst = max(rows, key=lambda row: row.ratio)
    return (
        f"The chosen plan is within 5 % of the best one measured in {shares[0]:.0%} of {len(rows)} "
        f"cases and within 10 % in {shares[1]:.0%}; worst {worst.ratio:.2f} times the best "
        f"({worst.case}: {worst.chosen} against {worst.best})."
    )


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTERS = AdapterTraits("float32")  # with s = 1: Subject's
CALL_US = 5000.0  # part of a case's weight whatever its size


@job(SUITE)
def run(options: argparse.Namespace, grid: Grid) -> int:
    """Measure the whole grid; 1 when a plan was refused."""
    clock, origin = clock_for(options.device), provenance(options.device)
    trials = [trial_of(case, options.device) for case in cases(grid)]
    shares = Shares([trial.chosen.time_us + CALL_US for trial in trials], grid.budget_s, clock)
    progress = Progress(len(trials), live=False if options.verbose else None)
    rows: list[PlanRow] = []
    refused = 0
    for trial in trials:
        row, wrong = trial.row(clock, shares.next_s(), origin)
        rows.append(row)
        refused += len(wrong)
        if options.rows:
            append([row], options.rows)
        progress.advance("; ".join([f"{trial.case}: {row.chosen} {row.ratio:.2f}", *wrong]))
    progress.close()
    print(text(rows), summary(rows), sep="\n")
    return 1 if refused else 0


def cases(grid: Grid) -> Iterator[PlanCase]:
    """The four projections of every model at every number of rows and every rank."""
    for name, batch, dtype in product(grid.models, grid.batches, grid.dtypes):
        if dtype not in DTYPES:
            raise ValueError(f"plan_choice measures {' and '.join(DTYPES)}, not {dtype}")
        shape = SHAPES[name]
        for (k, n, groups), rank in product(linears(shape), grid.ranks):
            yield PlanCase(SUITE, batch * shape.tokens, k, n, groups, rank, dtype)


def linears(shape: ModelShape) -> list[tuple[int, int, int]]:
    """(K, N, adapters) of the attention output, the fused qkv, fc1 and fc2."""
    width, hidden = shape.width, shape.expansion * shape.width
    return [(width, width, 1), (width, 3 * width, 3), (width, hidden, 1), (hidden, width, 1)]


def trial_of(case: PlanCase, device: str) -> Trial:
    """The trial of one case, with the ceilings that the library itself plans by."""
    wide, dtype = case.n // case.groups, DTYPES[case.dtype]
    spans = tuple(Span(g * wide, (g + 1) * wide, case.rank) for g in range(case.groups))
    where = torch.device(device)
    question = (case.m, case.k, case.n, spans, dtype, True, Needs(), NO_CONTEXT, ADAPTERS, where)
    return Trial(case, problem(*question), ceilings(where, dtype), device)
