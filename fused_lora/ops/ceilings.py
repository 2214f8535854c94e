"""Which ceilings hold for a device: the table's, those kept on disk, or measured now and kept."""

from __future__ import annotations

from functools import lru_cache

import torch

from fused_lora import env
from fused_lora.kernels.aten import probe
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
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    key = str(dtype).removeprefix("torch.")
    key = "tf32" if tf32 and dtype is torch.float32 else key
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _ceilings(device, dtype, key, threads)


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
    with torch.inference_mode():
        measured, steady = probe.measure(device, dtype, name)
    if steady:
        plan_device.store(env.cache_dir(), where, measured)
    return measured
