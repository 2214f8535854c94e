"""Whether Triton serves here, and which build of it and of the driver that is."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import torch

from fused_lora.version import __version__

LEAST_CAPABILITY = (8, 0)  # cp.async and bf16 matrix instructions
LEAST_VERSION = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_CAPABILITY = (8, 9)  # matrix instructions of e4m3
FP8_DTYPES = (torch.bfloat16, torch.float16)  # of the x that is quantised


def why_not(
    device: torch.device | int | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """One sentence why Triton cannot serve ``dtype`` on ``device``; None when it can."""
    return why_not_here() or _why_not_on(device) or _why_not_in(dtype)


def why_not_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence why Triton cannot serve a base in FP8 for x in ``dtype``; None when it can."""
    if reason := why_not(device, dtype):
        return reason
    if dtype not in FP8_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the FP8 kernels take x in bfloat16 and float16, not in {name}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (FP8_CAPABILITY, capability))
        return f"the device has compute capability {found}, FP8 matrix units begin at {least}"
    return None


def why_not_here() -> str | None:
    """The part of ``why_not`` that no device and no dtype enters."""
    try:
        from triton import __version__ as version
    except ModuleNotFoundError:
        return "triton is not installed"
    except ImportError as error:
        return f"triton does not load: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return f"triton is {version}, these kernels are written for {least} and later"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes"):
        return "TRITON_INTERPRET is set, and the interpreter computes bf16 wrongly"
    return None


def _why_not_on(device: torch.device | int | None) -> str | None:
    if isinstance(device, torch.device) and device.type != "cuda":
        return f"the tensors are on {device.type}, Triton's kernels run on CUDA devices"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        return f"the device has compute capability {found}, these kernels need {least}"
    return None


def _why_not_in(dtype: torch.dtype | None) -> str | None:
    if dtype is None or dtype in DTYPES:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"these kernels compute in float32, bfloat16 and float16, not in {name}"


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
