"""What a verdict or a measured tile holds for: this device, these versions, these very sources."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

from fused_lora.version import __version__

DRIVER = Path("/sys/module/nvidia/version")


@lru_cache(maxsize=64)
def identity(device: torch.device) -> str:
    """A key that changes with the device's name, the driver, torch, triton and this room."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"driver {_driver()}|torch {torch.__version__}|triton {_triton()}"
    return f"{name}|{versions}|fused_lora {__version__}|kernels {sources(Path(__file__).parent)}"


def sources(*folders: Path) -> str:
    """A digest of every Python file in ``folders``."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    if DRIVER.exists():
        return DRIVER.read_text().strip()
    if not torch.cuda.is_available():
        return "none"
    return f"for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _triton() -> str:
    try:
        from triton import __version__ as version
    except ImportError:
        return "none"
    return version
