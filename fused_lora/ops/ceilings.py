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
    """Ceilings of ``device`` in ``dtype``; measures an unknown device once, in half a second."""
    return _ceilings(device, dtype, *conditions(device, dtype))


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
        return plan_device.unmeasured(name, key)
    versions = f"torch {torch.__version__}|fused_lora {__version__}|probe {probe.REVISION}"
    where = f"{name}|{key}|{versions}"
    if kept := plan_device.load(env.cache_dir(), where):
        return kept
    with ThreadPoolExecutor(1) as own:
        measured, steady = own.submit(_measure, device, dtype, name).result()
    if steady:
        plan_device.store(env.cache_dir(), where, measured)
    return measured


def _measure(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Ceilings, bool]:
    """In a thread of its own no autocast, fake tensors or counters of the caller's intervene."""
    with torch.inference_mode():
        return probe.measure(device, dtype, name)
