"""What a device is capable of at most: kept figures, the usual ones, or a measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from fused_lora import env
from fused_lora.kernels.gemm import is_tf32
from fused_lora.plan import problem as plan_device
from fused_lora.plan.problem import Ceilings
from fused_lora.verify.verdicts import why_not_now
from fused_lora.version import __version__

HALF_RANKS = (4.0, 64.0)  # what vector and matrix units make plausible
BUDGET_S = 0.5
REVISION = 3  # of this file's method: figures of another are measured anew
STEADY = 1.25  # median over minimum of a machine that does nothing else
SLEEP_CYCLES = 1_000_000  # half a millisecond, in which a host gets ahead of its device
QUEUED = 64  # launches behind one another, whose gaps are timed


@dataclass(frozen=True)
class Sizes:
    """What is large for a kind of device."""

    rows: int
    width: int
    thin: int  # a usual small rank
    copy_bytes: int


# A ViT-B projection of ten images; copies larger than most last-level caches' share.
CPU = Sizes(2048, 768, 16, 32 << 20)
# 1,024 tiles of 128 x 128, several waves of the largest chip; copies larger than any L2.
GPU = Sizes(8192, 2048, 16, 512 << 20)


def measure(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Ceilings, bool]:
    """Ceilings of ``device`` in ``dtype``, in about half a second; and whether to believe them.

    They are not to be believed where times scatter, as beside another busy program.
    """
    on_gpu = device.type == "cuda"
    sizes = _that_fit(device) if on_gpu else CPU
    calls, clock = _probes(device, dtype, sizes), _device_s if on_gpu else _host_s
    full, thin, copy, call = _times_s(calls, clock)
    gap_s = min(call)  # on a CPU that is the call
    call_s = min(_host_of(calls[-1], device)) if on_gpu else gap_s
    gap_us = _gap_us(calls[-1]) if on_gpu else None
    rows, width, narrow = sizes.rows, sizes.width, sizes.thin
    rate = 2 * rows * width * width / min(full) * 1e-9
    thin_rate = 2 * rows * width * narrow / max(min(thin) - gap_s, 1e-7) * 1e-9
    half_rank = min(max(narrow * (rate / thin_rate - 1), HALF_RANKS[0]), HALF_RANKS[1])
    bandwidth = 2 * sizes.copy_bytes / min(copy) * 1e-9
    key = str(dtype).removeprefix("torch.")
    steady = statistics.median(full) <= STEADY * min(full)
    return Ceilings(name, key, rate, half_rank, bandwidth, call_s * 1e6, True, gap_us), steady


def _that_fit(device: torch.device) -> Sizes:
    """``GPU``, with copies that the free memory has room for."""
    free, _ = torch.cuda.mem_get_info(device)
    return Sizes(GPU.rows, GPU.width, GPU.thin, max(16 << 20, min(GPU.copy_bytes, free // 8)))


def _probes(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Callable[[], object]]:
    """A large GEMM, a thin one, a copy, and a call too small to count."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    rows, width = sizes.rows, sizes.width
    x, w, thin, tiny = ones(rows, width), ones(width, width), ones(width, sizes.thin), ones(8, 8)
    block = ones(sizes.copy_bytes // dtype.itemsize)
    target = torch.empty_like(block)
    return [lambda: x @ w, lambda: x @ thin, lambda: target.copy_(block), lambda: tiny @ tiny]


def _times_s(
    calls: Sequence[Callable[[], object]], clock: Callable[[Callable[[], object]], float]
) -> list[list[float]]:
    """Times of each call, taken in turns until the budget is spent; the first is warm-up."""
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - began < BUDGET_S:
        for call, taken in zip(calls, times, strict=True):
            taken.append(clock(call))
    return [taken[1:] for taken in times]


def _host_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_s(call: Callable[[], object], times: int = 1) -> float:
    """By device events, the host being ahead: its own time does not enter."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return max(1e-3 * start.elapsed_time(end), 1e-7)


def _host_of(call: Callable[[], object], device: torch.device) -> list[float]:
    """What it takes the host to queue ``call``."""
    torch.cuda.synchronize(device)
    return [_host_s(call) for _ in range(QUEUED)]


def _gap_us(call: Callable[[], object]) -> float:
    """From one queued launch of next to nothing to the next."""
    return min(_device_s(call, QUEUED) for _ in range(3)) / QUEUED * 1e6


def device_name(device: torch.device) -> str:
    """The device's own name; a CPU's carries its thread count, on which its rates depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}-{_cpu_model()}-{torch.get_num_threads()}-threads"


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return "unknown"


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings of ``device`` in ``dtype``; measures an unknown device once, in half a second.

    Not in a capture or a trace: there figures of its kind serve, and are not kept.
    """
    key, threads = conditions(device, dtype)
    if device.type == "cuda" and (reason := why_not_now(device)):
        return _kept_or_usual(device, key, reason)
    return _ceilings(device, dtype, key, threads)


def _kept_or_usual(device: torch.device, key: str, reason: str) -> Ceilings:
    name = device_name(device)
    there = plan_device.known(name, key) or plan_device.load(env.cache_dir(), _where(name, key))
    return there or plan_device.unmeasured(name, key, device.type)


def conditions(device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
    """What ceilings depend on that may change while the program runs: the rate, the threads."""
    if device.type == "cpu":
        return str(dtype).removeprefix("torch."), torch.get_num_threads()
    tf32 = device.type == "cuda" and is_tf32(dtype)
    return "tf32" if tf32 else str(dtype).removeprefix("torch."), 0


@lru_cache(maxsize=64)
def _ceilings(device: torch.device, dtype: torch.dtype, key: str, threads: int) -> Ceilings:
    name = device_name(device)
    if device.type == "cuda" and (found := plan_device.known(name, key)):
        return found
    if device.type == "meta" or not env.flag("FUSED_LORA_CALIBRATE", default=True):
        return plan_device.unmeasured(name, key, device.type)
    where = _where(name, key)
    if kept := plan_device.load(env.cache_dir(), where):
        return kept
    with ThreadPoolExecutor(1) as own:
        measured, steady = own.submit(_measure, device, dtype, name).result()
    if steady:
        plan_device.store(env.cache_dir(), where, measured)
    return measured


def _where(name: str, key: str) -> str:
    versions = f"torch {torch.__version__}|fused_lora {__version__}|probe {REVISION}"
    return f"{name}|{key}|{versions}"


def _measure(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Ceilings, bool]:
    """In a thread of its own no autocast, fake tensors or counters of the caller's intervene."""
    with torch.inference_mode():
        return measure(device, dtype, name)
