"""A check: one kernel on small problems against float64, by the yardstick rule, twice.

In 16 bits an element may be wrong by a hundredth and still look rounded, so products are formed of
small integers as well, where every result is exact and is asked for to the bit.

It runs in a thread and on a stream of its own, where no autocast, mode or capture of the caller's
reaches, and draws from no random state but its own. Running out of memory is nobody's verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_lora.testing.yardstick import Comparison, judge
from fused_lora.trust.verdict import Verdict, broken, worst


class NotNow(Exception):
    """Nothing can be checked at this moment; asked again later, it may be."""


class FullMemory(NotNow):
    """Nothing can be checked for want of memory or of a process: not worth asking at once again."""


def check(
    cases: Callable[[torch.dtype, torch.device], Iterator[Comparison | str]],
    dtype: torch.dtype,
    device: torch.device,
) -> Verdict:
    """The verdict on what ``cases`` yields: comparisons, or a sentence that fails the kernel.

    Raises:
        FullMemory: the device's memory is full.
    """
    with ThreadPoolExecutor(1, "fused_lora check") as own:
        return own.submit(_check, cases, dtype, device).result()


def _check(
    cases: Callable[[torch.dtype, torch.device], Iterator[Comparison | str]],
    dtype: torch.dtype,
    device: torch.device,
) -> Verdict:
    try:
        with torch.inference_mode(), own_stream(device):
            found = list(cases(dtype, device))
    except torch.OutOfMemoryError as error:
        raise FullMemory(f"no memory is left to check a kernel in: {error}") from None
    except Exception as error:  # of a compiler, a launch or the device: the kernel does not serve
        if _out_of_memory(error):
            raise FullMemory(f"no memory is left to check a kernel in: {error}") from None
        return broken(f"{type(error).__name__}: {_first_line(error)}")
    compared = [c for c in found if isinstance(c, Comparison)]
    said = [line for line in found if isinstance(line, str)]
    return broken(said[0]) if said and all(c.passed for c in compared) else worst(compared)


def _out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, is a full memory by its own words."""
    words = str(error).lower()
    cause = error.__cause__ or error.__context__
    full = isinstance(error, MemoryError) or "out of memory" in words
    return full or (cause is not None and _out_of_memory(cause))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


@contextmanager
def products_as(dtype: str) -> Iterator[None]:
    """Inside, torch forms fp32 products as ``dtype`` says."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a fresh stream of ``device``, finished at the end."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def compare(
    run: Callable[[], Mapping[str, Tensor]],
    plain: Sequence[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
    band: float | None,
) -> Iterator[Comparison | str]:
    """``run`` against ``truth``, beside every ``plain``; and against itself, bit by bit.

    A name of what ``run`` gives may say after a comma how it was found.
    """
    once, again = run(), run()
    for name, ours in once.items():
        if not torch.equal(ours, again[name]):
            yield f"two runs gave different bits of {name}"
        quantity = name.partition(",")[0]
        theirs = [found[quantity] for found in plain]
        yield judge(name, ours, theirs, truth[quantity], dtype, band)


def compare_exact(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Iterator[str]:
    """A complaint for each of ``ours`` that is not ``truth`` to the bit."""
    for name, found in ours.items():
        right = truth[name.partition(",")[0]].to(found.dtype)
        if found.shape != right.shape or not torch.equal(found, right):
            yield f"{name} is not exact where small integers make it so"
