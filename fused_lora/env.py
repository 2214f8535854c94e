"""Every FUSED_LORA_* environment variable, with its meaning and its default."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLES: dict[str, str] = {
    "FUSED_LORA_NATIVE": (
        "build time: 0 skips the compiled module, 1 fails when it cannot be built, here builds "
        "for the GPUs of this machine alone; unset builds for every architecture if it can"
    ),
    "FUSED_LORA_DISABLE_NATIVE": "run time: 1 acts as if the compiled module were not installed",
    "FUSED_LORA_CACHE_DIR": (
        "folder of measured ceilings, verdicts on kernels and tuned tiles; "
        "default $XDG_CACHE_HOME/fused_lora or ~/.cache/fused_lora"
    ),
    "FUSED_LORA_CALIBRATE": (
        "0 never measures a device: unknown ones get the built-in figures of their kind"
    ),
    "FUSED_LORA_IMPL": "overrides impl='auto' everywhere: aten, triton, cuda or reference",
    "FUSED_LORA_PLAN": (
        "how a plan is chosen: measure (the default on CUDA: what is likely is timed once, and "
        "kept on disk) or model (the default elsewhere: by estimated cost)"
    ),
    "FUSED_LORA_PROGRAMS": (
        "0 runs operations as they are written, call by call, instead of the programs made of them"
    ),
    "FUSED_LORA_VERIFY": (
        "when a kernel is checked on this device before it serves: first (the default; the verdict "
        "is kept on disk), always (once in every process) or off (never)"
    ),
    "FUSED_LORA_CHECK_SECONDS": (
        "the time limit of one such check; a kernel whose check takes longer is found wrong; "
        "default 60"
    ),
    "FUSED_LORA_CHECK_PROCESS": (
        "0 checks kernels in the process that asks, where a fault of one is a fault of that process"
    ),
    "FUSED_LORA_FUZZ_SEQUENCES": (
        "tests: how many random orders of patch, merge, save, prune, ... are walked; default 500"
    ),
    "FUSED_LORA_EVERY_ENTRY_POINT": (
        "tests: 1 patches every vision transformer that timm can build (most of an hour), not one "
        "of each module"
    ),
}


def flag(name: str, default: bool = False) -> bool:
    """Whether variable ``name`` is set to something other than 0, false, no, off or nothing."""
    assert name in VARIABLES, name
    value = os.environ.get(name)
    return (
        default if value is None else value.strip().lower() not in {"", "0", "false", "no", "off"}
    )


def text(name: str) -> str | None:
    """The value of variable ``name``; None when unset or blank."""
    assert name in VARIABLES, name
    return (os.environ.get(name) or "").strip() or None


def cache_dir() -> Path:
    """Folder for what is measured and checked on this machine; not created here."""
    if chosen := text("FUSED_LORA_CACHE_DIR"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fused_lora"
    try:
        return Path.home() / ".cache" / "fused_lora"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "fused_lora"
