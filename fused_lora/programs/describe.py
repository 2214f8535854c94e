"""A program as people read it: its calls in order, what each moves and takes, what is saved."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.programs import emit
from fused_lora.programs.program import Program
from fused_lora.programs.record import Call, Value

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm_", "linear"}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided"}
FILLS = {"new_zeros", "zeros_like", "new_ones", "ones_like", "new_full", "full_like"}
OVERWRITES = {"copy_", "zero_", "fill_"}  # in place, without reading what was there
Estimate = Callable[[int, int], float]  # microseconds of so many FLOPs and bytes


class Work(NamedTuple):
    """What one call asks of the device."""

    flops: int  # of matrix products; what else is computed is bound by memory
    nbytes: int  # read and written; views move none


def work(call: Call) -> Work:
    """Of one call, from the sizes of what it reads and gives.

    What it adds to counts as both, and so does what it is given twice, to read and to write.
    """
    name = name_of(call)
    if is_view(call) or name in ALLOCATIONS:
        return Work(0, 0)
    written = {id(value): value.nbytes for value in call.writes}
    read = {id(value): value.nbytes for value in call.reads if id(value) not in written}
    given, adds = Counter(map(id, call.reads)), _accumulates(call)
    moved = 0 if name in FILLS else sum(read.values())
    moved += sum((1 + (adds or given[key] > 1)) * nbytes for key, nbytes in written.items())
    moved += sum(out.nbytes for out in call.outs if out is not None)
    if name not in PRODUCTS:
        return Work(0, moved)
    result = call.outs[0] or call.writes[0]
    left = [v for v in call.args if isinstance(v, Value) and len(v.shape) > 1][-2]
    depth = left.shape[-1]
    return Work(2 * depth * _count(result), moved)


def _accumulates(call: Call) -> bool:
    """Whether what it writes in place it reads as well."""
    name = name_of(call)
    in_place = name.endswith("_") and name not in OVERWRITES
    return in_place and call.kwargs.get("beta", 1) != 0


def launches(calls: Sequence[Call]) -> int:
    """How many kernels ``calls`` ask a device for; each of the library's is taken for one."""
    return sum(
        getattr(call.target, "launches", 1)
        for call in calls
        if not (is_view(call) or name_of(call) in ALLOCATIONS)
    )


def passes(program: Program) -> tuple[float, float]:
    """What forward and backward move, in units of one pass over the first input: x of a chain."""
    unit = max(1, program.inputs[0].nbytes)
    ahead, back = totals(program)
    return ahead.nbytes / unit, back.nbytes / unit


def is_view(call: Call) -> bool:
    """Whether it only shows memory that is there."""
    return call.view or call.target in emit.VIEWS


def name_of(call: Call) -> str:
    """``addmm`` or the name of a kernel."""
    target = call.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.partition("::")[2])
    return str(getattr(target, "__name__", "call"))


def saved_names(program: Program) -> list[str]:
    """What each saved tensor is: an input by its place, or what which call gave."""
    own = dict(zip(map(id, program.inputs), program.present, strict=True))
    made = {id(out): name_of(call) for call in program.calls for out in call.outs}
    return [
        f"input {own[id(value)]}" if id(value) in own else f"{made[id(value)]} {value.name}"
        for value in program.saved
    ]


def totals(program: Program) -> tuple[Work, Work]:
    """Of forward and of backward."""
    return _sum(program.calls), _sum(program.calls_back)


def described(program: Program, estimate: Estimate, measure: bool = False) -> str:
    """The whole program as a table.

    Args:
        program: what to show.
        estimate: microseconds of so many FLOPs and bytes on the device in question.
        measure: time every call on random numbers, beside the estimate.
    """
    measured = measured_us(program) if measure else {}
    ahead, back = passes(program)
    rows = [*_rows("forward", program.calls, estimate, measured, ahead)]
    if program.trains:
        kept = [f"{value.name} {value}" for value in program.saved]
        own = {id(value) for value in program.inputs}
        fresh = sum({v.storage: v.nbytes for v in program.saved if id(v) not in own}.values())
        rows.append(f"saved      {', '.join(kept)}")
        rows.append(f"           {fresh / 1e6:,.2f} MB beside what was given")
        rows += _rows("backward", program.calls_back, estimate, measured, back)
    return "\n".join(rows)


def _rows(
    title: str,
    calls: Sequence[Call],
    estimate: Estimate,
    measured: dict[int, float],
    over_x: float,  # passes over x
) -> list[str]:
    total, calls_made = _sum(calls), [call for call in calls if not is_view(call)]
    guess = sum(estimate(*work(call)) for call in calls_made)
    head = f"{len(calls_made)} calls, {launches(calls)} launches, {total.flops / 1e9:,.3f} GFLOP"
    head += f", {total.nbytes / 1e6:,.1f} MB, {over_x:,.1f} passes over x"
    found = [f"{title:<10} {head}, {guess:,.0f} us estimated" + ", measured" * bool(measured)]
    for call in calls_made:
        flops, nbytes = work(call)
        figures = f"{nbytes / 1e6:10,.2f} MB {estimate(flops, nbytes):9,.1f} us"
        if measured:
            figures += f" {measured.get(id(call), 0.0):9,.1f} us"
        shapes = ", ".join(map(str, call.reads[:3])) + ", .." * (len(call.reads) > 3)
        result = next((out for out in call.outs if out is not None), None) or (
            call.writes[0] if call.writes else None
        )
        found.append(f"  {figures}  {name_of(call):28} {shapes} -> {result}")
    return found


def measured_us(program: Program, rounds: int = 15) -> dict[int, float]:
    """Median microseconds of every call on random numbers, by ``id`` of the call."""
    inputs = [_random(value, program.device) for value in program.inputs]
    calls = [*program.calls, *program.calls_back]
    taken: dict[int, list[float]] = {}
    last = 0.0

    def tick(i: int) -> None:
        nonlocal last
        now = _now(program.device)
        if i >= 0:
            taken.setdefault(id(calls[i]), []).append(now - last)
        last = _now(program.device)

    scope = {**program.forward.__globals__, "tick": tick}
    exec(compile(_ticking(program.text), "<fused_lora program, timed>", "exec"), scope)
    with torch.no_grad():
        for _ in range(rounds):
            tick(-1)
            result = scope["forward"](*inputs)
            if program.trains:
                results, saved = result
                dys = [torch.ones_like(y) for y in ((results,) if program.single else results)]
                tick(-1)
                scope["backward"](*dys, saved)
    return {key: 1e6 * sorted(each)[len(each) // 2] for key, each in taken.items()}


def _ticking(text: str) -> str:
    """The text of a program with a tick behind each line that calls something."""
    lines, i = [], 0
    for line in text.splitlines():
        lines.append(line)
        own = line.strip()
        if own and not own.startswith(("def ", "del ", "return ")) and not own.endswith("= saved"):
            lines.append(f"    tick({i})")
            i += 1
    return "\n".join(lines)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _random(value: Value, device: torch.device) -> Tensor:
    t = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=device)
    return t.normal_(std=0.02) if t.dtype.is_floating_point and t.element_size() > 1 else t.zero_()


def _sum(calls: Sequence[Call]) -> Work:
    each = [work(call) for call in calls]
    return Work(sum(w.flops for w in each), sum(w.nbytes for w in each))


def _count(value: Value) -> int:
    found = 1
    for size in value.shape:
        found *= size
    return found


def words(program: Any, estimate: Estimate, measure: bool) -> str:
    """A program, or the sentence that stands in its place."""
    if isinstance(program, Program):
        return described(program, estimate, measure)
    return f"no program: {program}"
