"""Plans by time instead of by estimate: forwards and backwards of the likely ones, once, and kept.

    plans.json   {device, driver, versions, question: {m, plan: microseconds, ...}}

On a GPU this is how a plan is chosen (``FUSED_LORA_PLAN=measure``), on a CPU where it is asked for.
The first program of a shape class times what its plan is chosen from, on the shapes it has; every
later process finds the times on disk. Inside a capture or a trace the cost model decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora import disk, env
from fused_lora.kernels.interface import ActivationGrad, Adapters, PreviousLinear
from fused_lora.kernels.triton.available import identity
from fused_lora.ops.ceilings import device_name
from fused_lora.plan.problem import Problem
from fused_lora.plan.strategies import ROUNDS_ONCE
from fused_lora.plan.timing import Part, time_candidates
from fused_lora.types import Backend, Forward, Impl, Keep, Plan
from fused_lora.verify.check import own_stream
from fused_lora.verify.verdicts import why_not_now

MODES = ("measure", "model")
FORMAT = "plans 1"
NEAR, LIMIT = 1.5, 10  # plans that are timed: estimates up to so many times the best, so many
WARM, ROUNDS, MOST = 3, 5, 20  # on a GPU; more rounds than ROUNDS where two plans are close
WARM_CPU, ROUNDS_CPU, MOST_CPU = 1, 12, 30
SAMPLE_US = 3000.0  # of a CPU's clock; shorter parts are repeated within a sample
AGAIN_S = 300.0  # after which a question that memory was too short for is asked again
SLEEP_CYCLES = 1_000_000  # half a millisecond, in which the host gets ahead of the device

_count = 0
_later: dict[Any, float] = {}
_rehearsals: list[tuple[Any, ...]] | None = None
_one_at_a_time = threading.Lock()


def mode() -> str | None:
    """The value of FUSED_LORA_PLAN; None where it is not set.

    Raises:
        ValueError: it is another word.
    """
    text = env.text("FUSED_LORA_PLAN")
    if text is not None and text not in MODES:
        raise ValueError(f"FUSED_LORA_PLAN must be one of {MODES}, got {text!r}")
    return text


def times_plans(device: torch.device) -> bool:
    """Whether plans of ``device`` are chosen by time."""
    return (mode() or ("measure" if device.type == "cuda" else "model")) == "measure"


class TimingMode(Enum):
    """How a plan is chosen now."""

    MODEL = "model"  # by estimates
    KEPT = "kept"  # by times that are there
    MEASURE = "measure"  # by times; those that are not there are taken
    LOOK = "look"  # likewise, but what would be timed is collected


def timing_mode(device: torch.device, anew: bool = True) -> TimingMode:
    """What FUSED_LORA_PLAN and the moment allow; ``anew``: timing now, too."""
    if not times_plans(device):
        return TimingMode.MODEL
    if _rehearsals is not None:
        return TimingMode.LOOK
    return TimingMode.MEASURE if anew and why_not_now(device) is None else TimingMode.KEPT


def count() -> int:
    """How many questions this process has timed."""
    return _count


def shape_class(m: int) -> int:
    """Rows that are planned for alike: an eighth of their power of two, upwards."""
    step = max(1, 1 << max(0, m.bit_length() - 3))
    return -(-m // step) * step


def times(
    question: Problem,
    plans: Sequence[Plan],  # the likeliest first
    device: torch.device,
    asked: Any,  # what else decides which plans there are
) -> dict[str, float]:
    """Microseconds of each of ``plans`` by name, timed now and kept; none for want of memory."""
    key = _key(question, device, asked)
    if time.monotonic() < _later.get(key, 0.0):
        return {}
    with _one_at_a_time:
        race = partial(_race, question, plans, device)
        return load(question, plans, device, asked) or _timed(question, race, device, key)


def collect(question: Problem, plans: Sequence[Plan], device: torch.device) -> None:
    """What would be timed, for whoever is ``rehearsed``."""
    if _rehearsals is not None:
        _rehearsals.extend((question, plan, str(device)) for plan in plans)


def likely(ranked: Sequence[Plan]) -> list[Plan]:
    """The first of ``ranked``, those whose estimates are near, the cheapest of every strategy."""
    chosen, *others = ranked
    near = [plan for plan in others if plan.time_us <= NEAR * chosen.time_us]
    found = [chosen, *near[: LIMIT - 1]]
    strategies: tuple[Callable[[Plan], Any], ...] = (
        lambda plan: (plan.backend, plan.forward),
        lambda plan: (plan.backend, plan.dx),
        lambda plan: (plan.gradient_backend, plan.gradient),
        lambda plan: Forward.MERGE in (plan.forward, plan.dx) or plan.forward in ROUNDS_ONCE,
    )
    for strategy in strategies:
        for plan in others:
            if strategy(plan) not in map(strategy, found):
                found.append(plan)
    return found


def path() -> Path:
    """The file of times."""
    return env.cache_dir() / "plans.json"


def load(
    question: Problem, plans: Sequence[object], device: torch.device, asked: Any
) -> dict[str, float]:
    """The times that are kept, if all are sound and the best is of one of ``plans``."""
    try:
        row = dict(disk.read(path())[_key(question, device, asked)])
        found = {str(name): float(taken) for name, taken in row["time_us"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    if not found or not all(0 < taken < float("inf") for taken in found.values()):
        return {}
    best = min(found, key=lambda name: found[name])
    return found if best in map(str, plans) else {}


@contextmanager
def rehearsed() -> Iterator[list[tuple[Any, ...]]]:
    """Inside, nothing is timed; what would be is collected, for ``rehearse``."""
    global _rehearsals
    _rehearsals, before = [], _rehearsals
    try:
        yield _rehearsals
    finally:
        _rehearsals = before


def rehearse(question: Problem, plan: Plan | Together, device: str) -> str:
    """Run ``plan`` once, in a process whose compiling serves others."""
    where = torch.device(device)
    if isinstance(plan, Together):
        with torch.inference_mode(), own_stream(where):
            run = _backwards(question, plan, where)
            for name in BOTH:
                run(name)
            del run
        _release_memory(where)
        return str(plan)
    with torch.inference_mode(), own_stream(where):
        operands = _Operands(question, where)
        for part in parts(question, plan):
            operands.run(part, plan)
        del operands
    _release_memory(where)
    return str(plan)


class PlanPart(NamedTuple):
    """A forward or a backward, by what of a plan it depends on."""

    name: str
    how: tuple[Any, ...]


def parts(question: Problem, plan: Plan) -> tuple[PlanPart, ...]:
    """What ``plan`` runs one after the other."""
    bordered = question.bordered or plan.forward is Forward.BORDERED
    copies_h = bordered and plan.keep is Keep.HIDDEN  # else what is kept is there, or let go
    forward = PlanPart("forward", (plan.backend, plan.forward, copies_h))
    if not question.trains:
        return (forward,)
    merged = plan.keep is Keep.MERGED
    how = (plan.backend, plan.dx, plan.gradient, plan.keep, plan.grads_by, merged)
    return forward, PlanPart("backward", how)


BOTH = ("apart", "together")


class Together(NamedTuple):
    """A backward whose dx goes through GELU's derivative, and that of the linear before it."""

    plan: Plan
    kind: str  # of GELU: erf or tanh
    before: Problem  # of the linear that made u
    own: Plan  # of its backward where gradients are formed in passes of their own
    rest: Plan  # and where its db is formed in the tiles of dx

    def __str__(self) -> str:
        return f"{self.plan} before {self.own} or {self.rest}"


def together(question: Problem, both: Together, device: torch.device) -> tuple[float, float] | None:
    """Microseconds of two backwards, their gradients apart and in the tiles of dx; or None.

    They are timed now, or kept; None where the cost model decides.
    """
    if (mode := timing_mode(device)) is TimingMode.MODEL:
        return None
    before = replace(both.before, m=shape_class(both.before.m), packed_with=1)
    asked = ("together", both.kind, before, *map(str, (both.plan, both.own, both.rest)))
    key = _key(question, device, asked)
    with _one_at_a_time:
        found = load(question, BOTH, device, asked)
        if not found and mode is TimingMode.LOOK and _rehearsals is not None:
            _rehearsals.append((question, both, str(device)))
        if not found and mode is TimingMode.MEASURE and time.monotonic() >= _later.get(key, 0.0):
            found = _timed(question, partial(_race_together, question, both, device), device, key)
    return (found[BOTH[0]], found[BOTH[1]]) if found else None


def _race_together(question: Problem, both: Together, device: torch.device) -> dict[str, float]:
    with torch.inference_mode(), own_stream(device):
        return _raced({name: (name,) for name in BOTH}, _backwards(question, both, device), device)


def _backwards(question: Problem, both: Together, device: torch.device) -> Callable[[str], object]:
    """Both backwards, one after the other, by a word of ``BOTH``."""
    from fused_lora.ops.lora_linear import backward

    behind, before = _Operands(question, device), _Operands(both.before, device)
    h, h_before = (
        one.x[:, : one.question.rank].contiguous()  # any numbers of that size
        for one in (behind, before)
    )
    b_grads = [torch.empty_like(b_g) for b_g in before.adapters.b]
    linear = PreviousLinear(h_before, before.adapters, b_grads)

    def run(name: str) -> object:
        joint = name == BOTH[1]
        through = ActivationGrad(both.kind, behind.x, linear if joint else None)
        given = (behind.dy, behind.x, h, behind.w, behind.adapters, question.needs, both.plan)
        du = backward(*given, Impl.AUTO, through, activation=both.kind).x
        assert du is not None
        needs, kept = replace(both.before.needs, b=not joint), None if joint else h_before
        plan = both.rest if joint else both.own
        return backward(du, before.x, kept, before.w, before.adapters, needs, plan, Impl.AUTO)

    return run


def _timed(
    question: Problem, race: Callable[[], dict[str, float]], device: torch.device, key: str
) -> dict[str, float]:
    """In a thread of its own no autocast, fake tensors or capture of the caller's intervene."""
    global _count
    try:
        with ThreadPoolExecutor(1, "fused_lora times") as own:
            found = own.submit(race).result()
    except (torch.OutOfMemoryError, MemoryError):
        _later[key] = time.monotonic() + AGAIN_S
        return {}
    finally:
        _release_memory(device)
    _count += 1
    found = {name: round(taken, 3) for name, taken in found.items()}
    disk.merge(path(), {key: {"m": question.m, "time_us": found}})
    return found


def _release_memory(device: torch.device) -> None:
    """Give back what the allocator holds for streams that nobody will use again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _race(question: Problem, plans: Sequence[Plan], device: torch.device) -> dict[str, float]:
    with torch.inference_mode(), own_stream(device):
        operands = _Operands(question, device)
        by_name = {str(plan): parts(question, plan) for plan in plans}
        of = {part: plan for plan in reversed(plans) for part in by_name[str(plan)]}
        return _raced(by_name, lambda part: operands.run(part, of[part]), device)


def _raced(
    by_name: Mapping[str, Sequence[Part]], run: Callable[[Part], object], device: torch.device
) -> dict[str, float]:
    """Each part run a few times unseen, then all of them in turns."""
    on_gpu = device.type == "cuda"
    repeats: dict[Part, int] = {}
    for part in dict.fromkeys(part for every in by_name.values() for part in every):
        for _ in range(WARM if on_gpu else WARM_CPU):
            run(part)
        if not on_gpu:
            taken = _clock_us(partial(run, part), 1)
            repeats[part] = max(1, round(SAMPLE_US / max(taken, 1.0)))

    def once(part: Part) -> float:
        again = partial(run, part)
        return _events_us(again) if on_gpu else _clock_us(again, repeats[part])

    return time_candidates(by_name, once, *((ROUNDS, MOST) if on_gpu else (ROUNDS_CPU, MOST_CPU)))


def _events_us(run: Callable[[], object]) -> float:
    """Device time of one run; the host gets ahead while the device sleeps."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return max(1e3 * start.elapsed_time(end), 1e-3)


def _clock_us(run: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return max((time.perf_counter() - began) * 1e6 / repeats, 1e-3)


class _Operands:
    """Random tensors of one question; a time does not depend on their values."""

    def __init__(self, question: Problem, device: torch.device) -> None:
        self.question, m, k, n = question, question.m, question.k, question.n
        dtype = getattr(torch, question.dtype.replace("tf32", "float32"))
        low = getattr(torch, question.traits.dtype) if question.traits.dtype else dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, device=device, dtype=to).normal_(generator=generator)

        self.bordered = draw(m, k + question.rank) if question.bordered else None
        self.x = draw(m, k) if self.bordered is None else self.bordered[:, :k]
        self.w, self.dy = draw(n, k), draw(m, n)
        self.bias = draw(n) if question.bias else None
        scales = [2.0 if question.scaled(g) else 1.0 for g in range(len(question.spans))]
        if not question.traits.one_scale:
            scales = [scale + g for g, scale in enumerate(scales)]
        a = [draw(span.rank, k, to=low) for span in question.spans]
        b = [draw(span.width, span.rank, to=low) for span in question.spans]
        self.adapters = Adapters(a, b, scales, question.spans)
        self.given = (self.w, self.bias, self.adapters)
        self.dh = draw(m, question.rank) if question.hidden_grad else None
        self.h: Tensor | None = None
        if question.shrunk:
            right = None if self.bordered is None else self.bordered[:, k:]
            self.h = draw(m, question.rank) if right is None else right
        self._kept: dict[Any, Tensor | None] = {}

    def run(self, part: PlanPart, plan: Plan) -> object:
        """Once, by a plan that ``part`` is of."""
        from fused_lora.ops.lora_linear import backward, forward

        x, needs = self.x, self.question.needs
        impl = Impl.CUDA if plan.backend is Backend.CUDA else Impl.AUTO
        if part.name == "forward":
            return forward(x, *self.given, plan, impl, self.bordered, self.h)
        how = (plan.backend, plan.forward, plan.keep)
        if how not in self._kept:
            _, kept = forward(x, *self.given, plan, impl, self.bordered, self.h)
            self._kept[how] = kept
        w = None if plan.keep is Keep.MERGED else self.w
        given = (self.dy, x, self._kept[how], w, self.adapters, needs, plan, impl)
        return backward(*given, dh=self.dh)


def _key(question: Problem, device: torch.device, asked: Any) -> str:
    rows = shape_class(question.m)
    alone = replace(question, activated=False, input_activated=False, joined=False, packed_with=1)
    plain = replace(alone, m=rows)
    where = f"{device_name(device)}|{identity(device)}"
    return f"{FORMAT}|{where}|{plain}|{asked}"
