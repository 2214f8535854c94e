"""Which ceilings hold for a device: the table's, those kept on disk, or measured now and kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from fused_lora import env
from fused_lora.kernels.aten import probe
from fused_lora.kernels.precision import is_tf32
from fused_lora.plan import device as plan_device
from fused_lora.plan.device import Ceilings
from fused_lora.trust.verify import why_not_now
from fused_lora.version import __version__


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
    versions = f"torch {torch.__version__}|fused_lora {__version__}|probe {probe.REVISION}"
    return f"{name}|{key}|{versions}"


def _measure(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Ceilings, bool]:
    """In a thread of its own no autocast, fake tensors or counters of the caller's intervene."""
    with torch.inference_mode():
        return probe.measure(device, dtype, name)
