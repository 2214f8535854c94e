"""The self-test: every kernel of a device checked now, as a table, rows and an exit status."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

import torch

from fused_lora.kernels.cuda import lora_linear as hopper
from fused_lora.kernels.cuda import native
from fused_lora.kernels.triton import available, spills
from fused_lora.verify import own_process
from fused_lora.verify.check import CannotVerifyNow, KernelId, Verdict, products_as
from fused_lora.verify.kernel_registry import DTYPES, Checked, every_kernel
from fused_lora.verify.verdicts import renew
from fused_lora.worker import Worker

BACKENDS = ("triton", "cuda")
WORDS = {True: "passed", False: "FAILED", None: "not run"}


@dataclass(frozen=True)
class Result:
    """One subject after its check."""

    subject: KernelId
    verdict: Verdict | None  # None: not run
    reason: str  # the comparison, or why it was not run
    seconds: float

    @property
    def word(self) -> str:
        """passed, FAILED or not run."""
        return WORDS[None if self.verdict is None else self.verdict.passed]

    def row(self) -> dict[str, Any]:
        """As a line of JSON."""
        figures = {} if self.verdict is None else self.verdict.row()
        told = {"verdict": self.word, "reason": self.reason, "seconds": round(self.seconds, 2)}
        return asdict(self.subject) | figures | told

    def __str__(self) -> str:
        s = self.subject
        name = f"{s.backend} {s.kernel}"
        return f"  {self.word:8} {name:18} {s.configuration:34} {s.dtype:9} {self.reason}"


def selftest(
    device: torch.device | str | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    tell: Callable[[Result], None] = lambda result: None,
    backends: Sequence[str] = BACKENDS,
    processes: int = 1,
) -> list[Result]:
    """Check every kernel on ``device``, whatever was found before; verdicts are kept.

    Args:
        device: A CUDA device; None for the current one. Without one nothing runs, and each result
            says why.
        dtypes: Of float32, tf32, bfloat16 and float16.
        tell: Called with each result as it comes.
        backends: Of triton and cuda.
        processes: How many check at once, on a device.

    Raises:
        ValueError: a dtype or backend of another name, no processes, or a device that is not here.
    """
    if odd := [name for name in backends if name not in BACKENDS]:
        raise ValueError(f"backends must be of {BACKENDS}, got {odd}")
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    if odd := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"dtypes must be of {tuple(DTYPES)}, got {odd}")
    target = _target(device)
    wanted = [c for c in every_kernel(dtypes, target) if c.subject.backend in backends]
    results = []
    for result in _results(wanted, target, processes):
        results.append(result)
        tell(result)
    return results


def _results(wanted: Sequence[Checked], device: torch.device, processes: int) -> Iterator[Result]:
    if processes == 1 or not all(own_process.serves(one, device) for one in wanted):
        yield from (_result(one, device) for one in wanted)
        return
    free: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker() for _ in range(min(processes, len(wanted)))]
    for worker in workers:
        free.put(worker)

    def one(checked: Checked) -> Result:
        worker = free.get()
        try:
            return _result(checked, device, worker)
        finally:
            free.put(worker)

    try:
        with ThreadPoolExecutor(len(workers), "fused_lora selftest") as pool:
            for each in as_completed([pool.submit(one, checked) for checked in wanted]):
                yield each.result()
    finally:
        for worker in workers:
            worker.close()


def passed_over(device: torch.device | str | None = None) -> list[str]:
    """A line for each tile that another stands in for on ``device``, since its kernel spills."""
    known = spills.passed_over(_target(device))
    return [f"  passed over: {name}: {reason}" for name, reason in known.items()]


def _target(device: torch.device | str | None) -> torch.device:
    here = torch.cuda.is_available()
    target = torch.device(device or ("cuda" if here else "cpu"))
    if target.type == "cuda" and not here:
        raise ValueError(f"device {str(target)!r}: torch sees no CUDA device")
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target


def _result(checked: Checked, device: torch.device, worker: Worker | None = None) -> Result:
    began = time.perf_counter()
    try:
        if reason := _why_not(checked, device):
            raise CannotVerifyNow(reason)
        if worker is not None:
            verdict = renew(checked, device, worker)
        else:
            with products_as(checked.subject.dtype):
                verdict = renew(checked, device)
    except CannotVerifyNow as reason:
        return Result(checked.subject, None, str(reason), 0.0)
    return Result(checked.subject, verdict, str(verdict), time.perf_counter() - began)


def _why_not(checked: Checked, device: torch.device) -> str | None:
    if checked.subject.backend == "triton":
        return available.why_not(device, DTYPES[checked.subject.dtype])
    if checked.subject.kernel.startswith("lora_linear"):
        return hopper.why_not(device)
    return native.why_not_on(device)


def summary(results: Sequence[Result], device: str) -> str:
    """One sentence on all of them."""
    counts = {word: sum(r.word == word for r in results) for word in WORDS.values()}
    if counts["not run"] == len(results):
        reasons = "; ".join(dict.fromkeys(r.reason for r in results))
        return f"nothing can run here: {reasons}"
    took = sum(r.seconds for r in results)
    counted = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{device}: {counted} in {took:.0f} s"
