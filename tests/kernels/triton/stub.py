"""Triton over ``stub_driver.c``: launches on CPU tensors that a driver or a device may refuse.

A process runs over it with the environment of ``environment``, calls ``serve`` once, and then
launches as on a GPU. Before each launch the stub is told what the launcher passes and which memory
is alive, which is every tensor that Python still holds.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends import nvidia as nvidia_folder
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from fused_lora.kernels.triton import available

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PLAIN, POINTER, POINTER_OR_NULL, MAP = range(4)
BYTES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}  # by the digits of a type's name

needed = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not here"),
    pytest.mark.skipif(bool(available.why_not_here()), reason=str(available.why_not_here())),
    pytest.mark.skipif(sys.platform != "linux", reason=f"no ELF on {sysconfig.get_platform()}"),
]


class Told(ctypes.Structure):
    """A parameter, as the stub is told of it."""

    _fields_ = [(name, ctypes.c_int) for name in ("size", "kind", "alignment")]


def build(folder: Path) -> None:
    """The stub as libcuda.so.1 in ``folder``."""
    include = Path(nvidia_folder.__path__[0]) / "include"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-O1"]
    library = ["-o", str(folder / "libcuda.so.1"), str(HERE / "stub_driver.c")]
    subprocess.run(["gcc", *flags, *library], check=True)


def environment(folder: Path, cache: Path | None = None) -> dict[str, str]:
    """Of a process over the stub in ``folder``; compiled kernels are kept in ``cache``."""
    own = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    own |= {"TRITON_CACHE_DIR": cache or folder / "triton"}
    own |= {"FUSED_LORA_CACHE_DIR": folder / "kept"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    names = {**os.environ, **{name: str(value) for name, value in own.items()}}
    names["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    names |= {"OMP_NUM_THREADS": "1"}
    names.pop("TRITON_INTERPRET", None)
    return names


def run(
    folder: Path, module: str, *args: str, cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m tests.kernels.triton.MODULE ARGS`` over the stub."""
    build(folder)
    command = [sys.executable, "-m", f"tests.kernels.triton.{module}", *args]
    environ = environment(folder, cache)
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


class Stub:
    """The loaded library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def be(self, arch: int) -> None:
        """A chip of sm_``arch``."""
        self.library.stub_arch(arch)

    def tell(self, parameters: list[tuple[int, int, int]]) -> None:
        """What the next launch passes, and what is alive now."""
        self.library.stub_told(len(parameters), (Told * len(parameters))(*parameters))
        self.alive()

    def alive(self) -> None:
        """Tell which memory is alive now."""
        ranges = list(live())
        flat = [edge for both in ranges for edge in both]
        self.library.stub_live(len(ranges), (ctypes.c_uint64 * len(flat))(*flat))

    @property
    def launches(self) -> int:
        """That were not refused."""
        return int(self.library.stub_launches())

    @property
    def maps(self) -> int:
        """Tensor maps that were not refused."""
        return int(self.library.stub_maps())


def live() -> Iterator[tuple[int, int]]:
    """Where the storages of tensors begin and end."""
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            if begin := storage.data_ptr():
                yield begin, begin + storage.nbytes()


def parameters(signature: Any, attributes: dict[Any, Any], args: Any) -> list[tuple[int, int, int]]:
    """Size, kind and alignment of what a launcher of this signature passes for ``args``."""
    found = [
        each
        for i, (kind, arg) in enumerate(zip(signature, args, strict=True))
        for each in _parameters(kind, attributes, (i,), arg)
    ]
    scratch = (8, POINTER_OR_NULL, 1)
    return [*found, scratch, scratch]


def _parameters(
    kind: Any, attributes: dict[Any, Any], path: tuple[int, ...], arg: Any
) -> Iterator[tuple[int, int, int]]:
    if isinstance(kind, tuple):
        for i, (inner, part) in enumerate(zip(kind, arg, strict=True)):
            yield from _parameters(inner, attributes, (*path, i), part)
    elif kind.startswith("*"):
        aligned = dict(attributes.get(path, ())).get("tt.divisibility", 1)
        empty = isinstance(arg, Tensor) and arg.numel() == 0
        yield 8, POINTER_OR_NULL if empty else POINTER, aligned
    elif kind.startswith("tensordesc"):
        dimensions = len(arg.shape)
        yield 128, MAP, 64
        yield from [(4, PLAIN, 4)] * dimensions
        yield from [(8, PLAIN, 8)] * dimensions
    elif kind != "constexpr":
        size = BYTES["".join(filter(str.isdigit, kind))]
        yield size, PLAIN, size


class Launcher(nvidia.CudaLauncher):  # type: ignore[misc]
    """Triton's own, which tells the stub first."""

    def __init__(self, source: Any, metadata: Any) -> None:
        super().__init__(source, metadata)
        self.signature = list(source.signature.values())
        self.attributes = source.attrs

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        """Launch it; the first four of the rest are for profilers."""
        served().tell(parameters(self.signature, self.attributes, rest[4:]))
        super().__call__(x, y, z, stream, function, *rest)


class Driver(nvidia.CudaDriver):  # type: ignore[misc]
    """Triton's own, of which torch is not asked for a device."""

    def __init__(self, arch: int, told: bool) -> None:
        self.stub, self.arch = Stub(), arch
        self.stub.be(arch)
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = Launcher if told else nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        """The chip that the stub is."""
        return GPUTarget("cuda", self.arch, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Likewise."""
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


def serve(arch: int, told: bool = True) -> Stub:
    """Triton launches over the stub, as sm_``arch``, in this process.

    Without being told, the stub sees the shape of a launch alone, in the time a driver would.
    What is there already is not looked through for tensors at each launch, which would take longer
    than the launch a hundred times: tensors that are launched on are made after this.
    """
    gc.collect()
    gc.freeze()
    made = Driver(arch, told)
    driver.set_active(made)
    available.why_not = lambda device=None, dtype=None: None
    return made.stub


def served() -> Stub:
    """The stub that serves."""
    return driver.active.stub  # type: ignore[no-any-return]
