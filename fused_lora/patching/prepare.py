"""prepare: what a first step would compile, check and time, done beforehand in many processes.

collect   a step runs by the library; what it asks for is built, and looked at, not kept
check     every kernel that has no verdict, in a pool of processes; asked again until all have
compile   every launch of the programs, likewise; Triton keeps them in its own cache folder
run       one step as it will be: programs are built, and what is measured is timed
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.arguments import brief, module_of, whole
from fused_lora.kernels.triton.launch import requests
from fused_lora.nn import AdaptedLinear
from fused_lora.ops import measured
from fused_lora.patching.report import PatchError
from fused_lora.programs import run as programs
from fused_lora.verify import own_process, verdicts
from fused_lora.verify.check import CannotVerifyNow, Verdict
from fused_lora.verify.kernel_registry import Checked
from fused_lora.worker import Worker, WorkerError

MOST_PROCESSES = 16
ROUNDS = 64  # of asking again, what a verdict makes possible; a step of one kind takes three
COMPILES = {
    "launch": ("fused_lora.kernels.triton.launch", "compile_one"),
    "plan": ("fused_lora.ops.measured", "rehearse"),
}

Tell = Callable[[int, int, str], None]  # done, of how many, what was done last


@dataclass
class Prepared:
    """What ``prepare`` did."""

    device: str
    checked: int = 0  # kernels that got a verdict now
    compiled: int = 0  # launches
    timed: int = 0  # plans chosen by time now
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)  # one sentence for each kernel that failed
    why_nothing: str = ""  # why there was nothing to do

    def __str__(self) -> str:
        if self.why_nothing:
            return f"nothing to prepare: {self.why_nothing}"
        summary = (
            f"prepared {self.device} in {self.seconds:.0f} s: {self.checked} kernels checked, "
            f"{self.compiled} launches compiled, {self.timed} plans timed"
        )
        return "\n".join([summary, *self.wrong])


def prepare(
    model: nn.Module,
    example: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    processes: int | None = None,
    tell: Tell | None = None,
) -> Prepared:
    """Compile, check and time now what the first training step of ``model`` would.

    Runs steps on ``example`` and leaves gradients, buffers and random numbers as they were. Call it
    as the training will run: on its device, in its mode, under its autocast, before a wrapper such
    as DistributedDataParallel, and in one process of several. What is found is kept at once, each
    result as it comes, for every later process on this device.

    Args:
        model: a patched model.
        example: a batch as the training has it: x, a sequence of arguments, or a mapping of them.
        processes: how many compile and check at once; by default one a processor, at most 16.
        tell: called with how much is done, of how much, and what; by default a progress bar.

    Returns:
        What was done; its ``str`` is a sentence. Without a GPU: why there is nothing to do.

    Raises:
        PatchError: the model is not patched, or is wrapped for several processes.
        TypeError: ``example`` is none of these.
        ValueError: ``processes`` is below 1.
    """
    device = _check(model, processes, tell)
    return prepare_call(model, _caller(model, example), device, processes, tell)


def prepare_call(
    model: nn.Module,
    call: Callable[[], object],  # what will be called: a step, or several
    device: torch.device,
    processes: int | None = None,
    tell: Tell | None = None,
) -> Prepared:
    """As ``prepare``, of whatever ``call`` does with ``model``."""
    if reason := _why_nothing(device):
        return Prepared(str(device), why_nothing=reason)
    began, done = time.perf_counter(), Prepared(str(device))
    bar = tell or _Bar()
    pool = _Pool(processes or min(os.cpu_count() or 1, MOST_PROCESSES))
    try:
        with _left_as_it_was(model, device):
            _check_all(call, pool, bar, done)
            pool.close()  # whose processes hold memory of the device
            before = measured.count()
            call()
            done.timed = measured.count() - before
    finally:
        pool.close()
    done.seconds = time.perf_counter() - began
    return done


def _check(model: nn.Module, processes: int | None, tell: Tell | None) -> torch.device:
    module_of(model, error=PatchError)
    if processes is not None:
        whole("processes", processes)
    if tell is not None and not callable(tell):
        raise TypeError(f"tell must be called with (done, of, what), got {brief(tell)}")
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise PatchError(
            f"prepare takes the model before {type(model).__name__} wraps it: its steps would wait "
            "for the other processes"
        )
    linear = next((m for m in model.modules() if isinstance(m, AdaptedLinear)), None)
    if linear is None:
        raise PatchError(f"{type(model).__name__} carries no fused_lora adapters: patch it first")
    return linear.weight.device


def _caller(model: nn.Module, example: Any) -> Callable[[], None]:
    """A training step on ``example``, but for its optimizer."""
    args: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        named = dict(example)
    elif isinstance(example, Sequence) and not isinstance(example, (str, bytes)):
        args = tuple(example)
    else:
        raise TypeError(
            "example must be a tensor, a sequence of arguments or a mapping of them, got "
            f"{brief(example)}"
        )

    def step() -> None:
        found = list(_floats(model(*args, **named)))
        trained = [t for t in found if t.requires_grad]
        if trained:
            torch.autograd.backward([t.float().mean() for t in trained])

    return step


def _floats(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        yield from (t for each in out.values() for t in _floats(each))
    elif isinstance(out, (tuple, list)):
        yield from (t for each in out for t in _floats(each))


def _why_nothing(device: torch.device) -> str:
    if device.type == "cuda" or measured.times_plans(device):
        return ""
    return f"on {device.type} the library's kernels serve, and the plan chooses by their cost"


def _check_all(step: Callable[[], object], pool: _Pool, tell: Tell, done: Prepared) -> None:
    """Verdicts on all that a step asks for, then every launch of its programs compiled."""
    later: set[Any] = set()  # what could not be checked now
    rehearsals: dict[Any, None] = {}
    held = True
    for _ in range(ROUNDS):
        with (
            verdicts.collecting(held) as wanted,
            programs.looking() as seen,
            measured.rehearsed() as timed,
        ):
            refused = None
            try:
                step()
            except RuntimeError as error:  # impl= that nothing unchecked may serve
                refused = error
        rehearsals |= dict.fromkeys(timed)
        anew = {where: checked for where, checked in wanted.items() if where not in later}
        if not anew:
            if refused is None:
                break
            if not held:
                raise refused
            held = False  # it asks for kernels by name: they run, and compile where they do
        for (subject, device), found in pool.checks(anew, tell):
            if isinstance(found, CannotVerifyNow):
                later.add((subject, device))
                done.wrong.append(f"{subject} is not checked: {found}")
                continue
            done.checked += 1
            if not verdicts.accept(anew[subject, device], device, found).passed:
                done.wrong.append(f"{subject} is not used: {found}")
    launches = {repr(one): one for program in seen.values() for one in requests(program)}
    jobs = [("launch", one) for one in launches.values()]
    jobs += [("plan", one) for one in rehearsals if one[2].startswith("cuda")]
    done.compiled = sum(1 for _ in pool.compiles(jobs, tell))


class _Pool:
    """Threads, each with a process of its own to ask."""

    def __init__(self, processes: int) -> None:
        self.size = processes
        self._free: list[Worker] = []
        self._all: list[Worker] = []

    def checks(
        self, wanted: Mapping[Any, Checked], tell: Tell
    ) -> Iterator[tuple[Any, Verdict | CannotVerifyNow]]:
        """Each with what was found of it, as they come."""

        def one(where: Any) -> Verdict | CannotVerifyNow:
            checked, device = wanted[where], where[1]
            try:
                if not own_process.serves(checked, device):
                    return checked.check(device)
                with self._worker() as worker:
                    return own_process.check(checked, device, worker)
            except CannotVerifyNow as reason:
                return reason

        return self._each(one, list(wanted), lambda where: str(where[0]), tell)

    def compiles(self, wanted: Sequence[Any], tell: Tell) -> Iterator[tuple[Any, Any]]:
        """Each as it is compiled; one that is not is left to the step that launches it.

        A plan that will be timed is run once: what it launches is compiled for all processes.
        """

        def one(job: Any) -> Any:
            where = COMPILES[job[0]]
            try:
                with self._worker() as worker:
                    return worker.call(*where, job[1], own_process.limit_s())
            except WorkerError as error:
                return error

        return self._each(one, wanted, lambda job: str(job[1][1]).lstrip("_"), tell)

    def _each(
        self,
        one: Callable[[Any], Any],
        jobs: Sequence[Any],
        name: Callable[[Any], str],
        tell: Tell,
    ) -> Iterator[tuple[Any, Any]]:
        if not jobs:
            return
        with ThreadPoolExecutor(min(self.size, len(jobs)), "fused_lora prepare") as threads:
            running = {threads.submit(one, job): job for job in jobs}
            try:
                for count, each in enumerate(as_completed(running), 1):
                    tell(count, len(jobs), name(running[each]))
                    yield running[each], each.result()
            except BaseException:  # such as Ctrl-C: what is under way is not waited for
                for each in running:
                    each.cancel()
                self.close()
                raise

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        try:
            worker = self._free.pop()
        except IndexError:
            worker = Worker()
            self._all.append(worker)
        try:
            yield worker
        finally:
            self._free.append(worker)

    def close(self) -> None:
        """End every process."""
        for worker in self._all:
            worker.close()


class _Bar:
    """A line that is written over on a terminal; elsewhere a line for each tenth."""

    def __init__(self) -> None:
        self._tenth = -1

    def __call__(self, done: int, of: int, what: str) -> None:
        if sys.stderr.isatty():
            full = 30 * done // of
            line = f"\r  [{'#' * full}{' ' * (30 - full)}] {done}/{of} {what[:60]:60}"
            print(line, end="\n" if done == of else "", file=sys.stderr, flush=True)
            return
        tenth = 10 * done // of
        if tenth != self._tenth or done == of:
            self._tenth = tenth
            print(f"  {done}/{of} {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards gradients, buffers and random numbers are those of before."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta]
    for p, _ in grads:
        p.grad = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
