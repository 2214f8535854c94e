"""The fused-lora command: one function per subcommand, each with its arguments beside it."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from fused_lora import env
from fused_lora.kernels.cuda import native
from fused_lora.version import __version__

TRITON = "Triton kernels are not part of this version"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit status."""
    parser = argparse.ArgumentParser(prog="fused-lora", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_env,):
        add(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _add_env(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("env", help="versions, devices, backends and variables")
    command.set_defaults(run=_run_env)


def _run_env(args: argparse.Namespace) -> int:
    for title, rows in environment().items():
        print(title)
        for name, value in rows:
            print(f"  {name:<28}{value}")
    return 0


def environment() -> dict[str, list[tuple[str, str]]]:
    """What a bug report should hold: sections of (name, value)."""
    return {
        "versions": list(_versions()),
        "devices": list(_devices()),
        "backends": list(_backends()),
        "variables": [(name, _variable(name)) for name in env.VARIABLES],
        "folders": [("cache", str(env.cache_dir()))],
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "fused_lora", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "triton", _installed("triton")
    yield "CUDA of torch", torch.version.cuda or "none"
    driver = Path("/sys/module/nvidia/version")
    yield "NVIDIA driver", driver.read_text().strip() if driver.exists() else "none"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory_gib = device.total_memory / 2**30
        yield f"cuda:{index}", f"{device.name}, {device.major}.{device.minor}, {memory_gib:.0f} GiB"


def _backends() -> Iterator[tuple[str, str]]:
    yield "aten", "available"
    yield "triton", TRITON
    yield "cuda", native.why_not() or "available"


def _variable(name: str) -> str:
    """The value set, if any, and what the variable means."""
    return f"{env.text(name) or 'unset'} ({env.VARIABLES[name]})"


if __name__ == "__main__":
    raise SystemExit(main())
