"""Where and from what a row came: device, versions, commit, time."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fused_lora

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Provenance:
    """What must be known to believe a row, or to take it again."""

    device: str  # the name its maker gave it
    threads: int  # that torch computes with on the CPU
    driver: str | None  # of the GPU
    torch: str
    triton: str | None
    fused_lora: str
    python: str
    peft: str | None
    timm: str | None
    commit: str  # "+changes" behind it when the package differed from the commit
    time_utc: str  # when the run began


def provenance(device: str) -> Provenance:
    """Of rows taken now on ``device``."""
    return Provenance(
        device=device_name(device),
        threads=torch.get_num_threads(),
        driver=_driver() if device.startswith("cuda") else None,
        torch=torch.__version__,
        triton=_version("triton"),
        fused_lora=fused_lora.__version__,
        python=platform.python_version(),
        peft=_version("peft"),
        timm=_version("timm"),
        commit=commit(),
        time_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def slug(name: str) -> str:
    """A device name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or UNKNOWN


@cache
def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine() or UNKNOWN)


def commit() -> str:
    """The commit the package runs from; "unknown" when it does not lie in its own repository."""
    package = Path(fused_lora.__file__).parent
    if _git(package, "rev-parse", "--show-toplevel") != str(package.parent.resolve()):
        return UNKNOWN
    head = _git(package, "rev-parse", "--short=12", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", str(package))
    return f"{head}+changes" if changed else head or UNKNOWN


def _git(folder: Path, *arguments: str) -> str:
    return _output("git", "-C", str(folder), *arguments) or ""


def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return next(iter(lines.splitlines()), None)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
