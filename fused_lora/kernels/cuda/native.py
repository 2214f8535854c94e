"""The compiled module: whether it is there and serves a device, and what a device has for it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from fused_lora import env

ONLY = {"lora_linear": "90a"}  # the kernels of one architecture, and its code
_ENTRY = re.compile(r"(\d+)(\d)([af]?)-(real|virtual)")


def load() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or does not load.
    """
    return importlib.import_module("fused_lora._native")


def why_not(device: torch.device | int | None = None) -> str | None:
    """One sentence why the compiled module cannot serve ``device``; None when it can."""
    return why_not_here() or _why_not_on(device)


def why_not_on(device: torch.device) -> str | None:
    """As ``why_not``, of a device of any kind."""
    if reason := why_not(device if device.type == "cuda" else None):
        return reason
    return None if device.type == "cuda" else f"the tensors are on {device.type}"


def why_not_here() -> str | None:
    """The part of ``why_not`` that no device enters."""
    if env.flag("FUSED_LORA_DISABLE_NATIVE"):
        return "FUSED_LORA_DISABLE_NATIVE is set"
    try:
        load()
    except ModuleNotFoundError:
        return "the compiled module was not built when fused_lora was installed"
    except ImportError as error:
        return f"the compiled module does not load: {error}"
    return None


def _why_not_on(device: torch.device | int | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if not covers(archs(), capability):
        version = ".".join(map(str, capability))
        return f"the compiled module has code for {', '.join(archs())}, none for {version}"
    return None


def archs() -> list[str]:
    """What the module was compiled for, such as ``["80-real", "90a-real"]``."""
    return load().archs.split(",")


def compiled_without() -> dict[str, str]:
    """The kernels that are empty in this module, each with the architecture it was built without.

    A kernel that only one architecture can run is compiled for it alone.
    """
    built = archs()
    return {
        name: f"sm_{code}"
        for name, code in ONLY.items()
        if not any(entry.startswith(f"{code}-") for entry in built)
    }


def covers(entries: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``entries`` runs on a device of this compute capability.

    Machine code runs on its own major version from its minor version up; with suffix ``a`` only on
    exactly its version. PTX runs on anything not older; with a suffix, as its machine code does.
    """
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        assert match, entry
        built = (int(match[1]), int(match[2]))
        if match[3] == "a":
            served = built == capability
        elif match[4] == "real" or match[3]:
            served = built[0] == capability[0] and built[1] <= capability[1]
        else:
            served = built <= capability
        if served:
            return True
    return False


class Chip(NamedTuple):
    """Architecture and size; tests name their own."""

    arch: int  # 90 for compute capability 9.0
    processors: int
    fours: int = -1  # clusters of four blocks, one a processor, that it runs at once; -1: unknown
    eights: int = -1  # of eight, likewise

    @staticmethod
    @lru_cache
    def of(device: torch.device) -> Chip:
        """The chip of a CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        counts = _clusters(device) if arch >= 90 else (-1, -1)
        return Chip(arch, properties.multi_processor_count, *counts)


def _clusters(device: torch.device) -> tuple[int, int]:
    if why_not(device):
        return -1, -1
    index = torch.cuda.current_device() if device.index is None else device.index
    return load().clusters_at_once(index)


def identity(device: torch.device) -> str:
    """A key that changes with the device's name, the driver and the build of the module."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else device.type
    driver = torch._C._cuda_getDriverVersion() if on_cuda else "none"  # type: ignore[attr-defined]
    built = Path(str(load().__file__)).stat()
    return f"{name}|driver {driver}|module {built.st_size} {built.st_mtime_ns}"


def queue(device: torch.device) -> tuple[int, int]:
    """Device number and current stream; a CPU, where tests launch, has neither."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)
