"""One case: its methods built, compared with the reference, then timed in turn."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TextIO

from torch import nn

from fused_lora.bench import correctness_gate
from fused_lora.bench.clock import Clock, Step, Times, clock_for, host_ms, interleave, recorded
from fused_lora.bench.correctness_gate import Gate, install
from fused_lora.bench.provenance import Provenance
from fused_lora.bench.registry import Method
from fused_lora.bench.roofline import Roof
from fused_lora.bench.rows import Case, Refusal, Row
from fused_lora.bench.saved_tensors import SavedBytes, WideCopies, step_peak_bytes
from fused_lora.bench.workload import Workload, share


class Phases:
    """Seconds by phase, in the order first entered.

    Attributes:
        spent_s: Seconds by name.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spent_s: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what happens inside to ``name``."""
        begin = self.clock.now()
        try:
            yield
        finally:
            self.spent_s[name] = self.spent_s.get(name, 0.0) + self.clock.now() - begin

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.spent_s.items())


class Shares:
    """Gives each case its share of what is left of a budget, in proportion to its weight."""

    def __init__(self, weights: Sequence[float], budget_s: float, clock: Clock) -> None:
        self.weights, self.clock = list(weights), clock
        self.end_s = clock.now() + budget_s

    def next_s(self) -> float:
        """The seconds of the next case; never negative."""
        left_s = max(self.end_s - self.clock.now(), 0.0)
        share_s = left_s * self.weights[0] / sum(self.weights)
        del self.weights[0]
        return share_s


Tell = Callable[[str], None]


@dataclass
class MethodRun:
    """A method built for one case, and what is known of it before it is timed."""

    method: Method
    model: nn.Module
    step: Callable[..., None]  # what the clock sees
    errors: correctness_gate.Errors
    yardstick: correctness_gate.Errors
    saved_bytes: int = 0
    saved_bytes_per_block: int | None = None
    block_parts: tuple[int, int] = (0, 0)  # of that: fp32, and copies of weights
    wide_copies: int = 0
    peak_bytes: int | None = None
    host_work: tuple[int | None, int | None] = (None, None)  # Python calls, dispatched operations
    host_ms: float | None = None


def enter(method: Method, workload: Workload, gate: Gate, phases: Phases) -> MethodRun:
    """Build ``method``, compare it, and count what it keeps; its step has run once after this."""
    base = workload.base
    with phases.of("build"):
        model = copy.deepcopy(base) if method.owns_weights else share(base)
        model = install(method, model, gate.rank)
        step = step_of(workload, model)
    with phases.of("correctness"):
        method_run = MethodRun(method, model, step, *gate.errors(method, model))
    with phases.of("count"):
        count(method_run, workload)
        if workload.counts_host:
            from fused_lora.bench.suites.host import host_work

            trained = [*model.parameters(), *workload.inputs]
            method_run.host_work = host_work(method_run.step, trained)
    return method_run


def count(method_run: MethodRun, workload: Workload) -> None:
    """One watched step: what the forward pass keeps and copies, and what the step allocates."""
    sections = list(workload.sections(method_run.model))
    saved = SavedBytes(method_run.model, workload.excluded(), sections)
    wide = WideCopies(workload.activation)
    with ExitStack() as watch:
        if workload.dtype != "fp32":  # there, no copy can widen
            watch.enter_context(wide)
        watch.enter_context(saved)
        method_run.step(watch)
    method_run.saved_bytes, method_run.wide_copies = saved.total, wide.count
    if sections:
        middle = str(len(sections) // 2)
        method_run.saved_bytes_per_block = saved.by_section[middle]
        method_run.block_parts = saved.fp32_by_section[middle], saved.weights_by_section[middle]
    method_run.peak_bytes = step_peak_bytes(method_run.step, workload.device)


def step_of(workload: Workload, model: nn.Module) -> Callable[..., None]:
    """One whole step of ``model``: what the clock sees; ``watch`` is entered for its forward."""
    optimizer = workload.optimizer(model)

    def step(watch: AbstractContextManager[object] | None = None) -> None:
        with watch or nullcontext(), workload.precision():
            outputs = workload.forward(model, workload.inputs)
        workload.backward(outputs)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def time_methods(
    workload: Workload,
    case: Case,
    methods: Sequence[Method],
    phases: Phases,
    budget_s: float,
    origin: Provenance,
    tell: Tell = lambda words: None,
    roof: Roof | None = None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure ``methods`` in ``case``: rows of those that pass the gate, refusals of others.

    The budget covers everything, but rounds have a minimum; ``phases`` is told where it went.
    """
    begin = phases.clock.now()
    gate, method_runs, refusals = Gate(workload, case.rank), {}, []
    for method in methods:
        tell(f"{case}: comparing {method.name}")
        try:
            method_run = enter(method, workload, gate, phases)
        except Exception as error:  # told and counted as a failure; the others go on
            words = f"{type(error).__name__}: {error}"
            refusals.append(Refusal(case, method.name, words))
            continue
        if wrong := correctness_gate.complaints(
            method_run.errors, method_run.yardstick, case.dtype
        ):
            refusals.append(Refusal(case, method.name, "; ".join(wrong)))
            continue
        method_runs[method.name] = method_run
    steps: dict[str, Step] = {name: method_run.step for name, method_run in method_runs.items()}
    if case.mode == "graph":
        with phases.of("record"):
            steps = _recorded(steps, case, refusals)
    clock = clock_for(workload.device, cold=True) if case.cache == "cold" else phases.clock
    left_s = budget_s - (phases.clock.now() - begin)
    with phases.of("time"):
        times = interleave(steps, clock, left_s, tell=lambda name: tell(f"{case}: timing {name}"))
    if case.mode == "eager" and workload.device.startswith("cuda"):
        for method_run in method_runs.values():
            method_run.host_ms = host_ms(method_run.step)
    linears = workload.linears(case.rank)
    least_ms = roof.least_ms(linears, workload.compute.itemsize) if roof and linears else None
    rows = [record(case, method_runs[name], times, origin) for name in times]
    return [replace(row, roofline_ms=least_ms) for row in rows], refusals


def _recorded(steps: dict[str, Step], case: Case, refusals: list[Refusal]) -> dict[str, Step]:
    """The replays of those that can be recorded as a graph."""
    replays = {}
    for name, step in steps.items():
        try:
            replays[name] = recorded(step)
        except Exception as error:  # told, as in judging
            refusals.append(Refusal(case, name, f"{type(error).__name__}: {error}"))
    return replays


def record(case: Case, method_run: MethodRun, times: dict[str, Times], origin: Provenance) -> Row:
    """The row of one method_run."""
    name = method_run.method.name
    mine = times[name]

    def ratio(other: str) -> float | None:
        return mine.over(times[other]) if other in times else None

    first, third = mine.quartiles_ms
    return Row(
        case=case,
        method=name,
        form=method_run.method.form,
        rounds=len(mine.samples_ms),
        median_ms=mine.median_ms,
        q1_ms=first,
        q3_ms=third,
        ratio_frozen=ratio("frozen"),
        ratio_naive=ratio("naive"),
        ratio_peft=ratio("peft"),
        errors=method_run.errors,
        yardstick=method_run.yardstick,
        saved_bytes=method_run.saved_bytes,
        saved_bytes_per_block=method_run.saved_bytes_per_block,
        wide_copies=method_run.wide_copies,
        peak_bytes=method_run.peak_bytes,
        provenance=origin,
        host_ms=method_run.host_ms,
        python_calls=method_run.host_work[0],
        operations=method_run.host_work[1],
    )


WIDTH = 24  # cells of the bar


class Progress:
    """Counts cases done and says what is going on; ``tell`` may be called at any rate."""

    def __init__(self, total: int, stream: TextIO | None = None, live: bool | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = stream or sys.stderr
        self._live = self.stream.isatty() if live is None else live
        self._begin = time.monotonic()

    def tell(self, words: str) -> None:
        """Redraw the bar with ``words`` behind it; silent off a terminal."""
        if self._live:
            full = WIDTH * self.done // max(self.total, 1)
            bar = "#" * full + "." * (WIDTH - full)
            self.stream.write(f"\r\x1b[2K[{bar}] {self._elapsed()} {words}"[:110])
            self.stream.flush()

    def advance(self, words: str) -> None:
        """One more case is done; off a terminal this is the line that is printed."""
        self.done += 1
        self.tell(words)
        if not self._live:
            self.stream.write(f"[{self.done}/{self.total}] {self._elapsed()} {words}\n")
            self.stream.flush()

    def close(self) -> None:
        """Leave a clean line behind."""
        if self._live:
            self.stream.write("\r\x1b[2K")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begin:5.0f} s"
