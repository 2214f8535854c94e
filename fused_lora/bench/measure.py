"""Every case of a grid, row by row, within its budget of seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn

from fused_lora.bench.clock import Clock, clock_for
from fused_lora.bench.correctness_gate import DEPTH, Gate, install
from fused_lora.bench.provenance import provenance
from fused_lora.bench.registry import METHODS, SUITES, Method
from fused_lora.bench.roofline import Roof, measured
from fused_lora.bench.rows import Case, Refusal, Row, append
from fused_lora.bench.runner import Phases, Progress, Shares, step_of, time_methods
from fused_lora.bench.shapes import SHAPES, Grid
from fused_lora.bench.workload import Workload, shallow, share
from fused_lora.patching.prepare import prepare_call


def measure(
    suite: str, grid: Grid, device: str, folder: Path | None = None, verbose: bool = False
) -> tuple[list[Row], list[Refusal]]:
    """Time every case of ``grid``; the budget left is shared out by size over those still to come.

    Args:
        suite: Which suite.
        grid: What to cover.
        device: Where.
        folder: Rows are appended below it case by case, so that a broken run keeps its first ones.
        verbose: Say where the time of each case went, on a terminal as well.
    """
    cases = list(_cases(suite, grid))
    clock, origin = clock_for(device), provenance(device)
    progress = Progress(len(cases), live=False if verbose else None)
    shares = Shares([_weight(case) for case in cases], grid.budget_s, clock)
    rows: list[Row] = []
    refusals: list[Refusal] = []
    roofs: dict[torch.dtype, Roof] = {}
    for workload, case, phases in _workloads(cases, device, clock):
        if workload.linears(case.rank) and workload.compute not in roofs:
            with phases.of("roofline"):
                roofs[workload.compute] = measured(device, workload.compute, clock)
        entered = able(grid.methods, case.dtype)
        found, refused = time_methods(
            workload,
            case,
            entered,
            phases,
            shares.next_s(),
            origin,
            progress.tell,
            roofs.get(workload.compute),
        )
        rows += found
        if folder:
            append(found, folder)
        refusals += refused
        progress.advance(f"{case}: {phases}")
        gc.collect()
    progress.close()
    return rows, refusals


def prepare(suite: str, grid: Grid, device: str) -> Iterator[str]:
    """Compile, check and time what the cases of ``grid`` would; a line for each method."""
    clock = clock_for(device)
    seen = set()
    for workload, case, _ in _workloads(list(_cases(suite, grid)), device, clock):
        for method in able(grid.methods, case.dtype):
            same = (case.model, case.batch, case.rank, case.dtype, method.name)
            if not method.ours or same in seen:  # a graph is recorded of the same step
                continue
            seen.add(same)
            found = prepare_call(*entered(method, workload, case.rank), torch.device(device))
            yield f"{case}, {method.name}: {found}"


def entered(
    method: Method, workload: Workload, rank: int
) -> tuple[nn.Module, Callable[[], object]]:
    """A method's model, and what a case asks of it: to be compared, and to step."""
    model = install(method, share(workload.base), rank)
    step, gate = step_of(workload, model), Gate(workload, rank)

    def call() -> None:
        with shallow(model, DEPTH) as first:
            workload.outcome(first, gate.inputs())
        step()

    return model, call


def _cases(suite: str, grid: Grid) -> Iterator[Case]:
    for name in grid.models:
        batches = (1,) if name in grid.one_image else grid.batches
        for batch, dtype, rank in product(batches, grid.dtypes, grid.ranks):
            if (name, batch) in grid.one_rank and rank != grid.ranks[0]:
                continue
            for mode, cache in product(grid.modes, grid.caches):
                yield Case(suite, name, batch, SHAPES[name].tokens, rank, dtype, mode, cache)


def _weight(case: Case) -> float:
    """In proportion to the work of one step."""
    return float(case.batch * case.tokens * SHAPES[case.model].width ** 2)


def _workloads(
    cases: Sequence[Case], device: str, clock: Clock
) -> Iterator[tuple[Workload, Case, Phases]]:
    """Each case with its network, built once for all of its ranks, and a fresh account of time."""
    built: tuple[str, int, str] | None = None
    for case in cases:
        phases = Phases(clock)
        if built != (case.model, case.batch, case.dtype):
            built = (case.model, case.batch, case.dtype)
            with phases.of("build"):
                workload = SUITES[case.suite](SHAPES[case.model], case.batch, case.dtype, device)
        yield workload, case, phases


def able(names: Sequence[str], dtype: str) -> list[Method]:
    """Those of ``names`` that run in ``dtype`` here; the others are told on stderr."""
    found = []
    for method in METHODS.pick(names):
        if reason := method.why_not(dtype):
            print(f"not timed: {method.name}: {reason}", file=sys.stderr)
        else:
            found.append(method)
    return found
