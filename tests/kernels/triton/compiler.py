"""What the launchers would run on a GPU that is not here: compiled and measured.

A stand-in for Triton's driver names an architecture; every launch inside ``compiled`` then compiles
with exactly the arguments, alignments and constants of that launch, and stops there, or goes on to
the stub driver (stub.py) where that serves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fused_lora.kernels.triton import spills

WIDE_STORE = re.compile(r"st\.global(\.\w+)*\.v4\.(b|f|u)32")
MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")  # of sm_80, 90 and 100
OF_CODES = re.compile(r"mma[\w.:]*(\.e4m3\.e4m3|kind::f8f6f4)")
COPIES = ("cp.async", "cp.async.bulk.tensor")
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    name: str
    registers: int  # per thread
    spilled_bytes: int  # the stack, where anything is read back from it
    shared_bytes: int
    tensor_columns: int  # of tensor memory
    warps: int
    instructions: list[str]  # of MATRIX and COPIES
    stores_wide: bool  # 16 bytes by one thread, somewhere
    of_codes: bool = False  # a matrix instruction on e4m3
    of: str = ""  # the launch, as launches.py names it
    tile: str = ""  # that it was compiled in

    @property
    def multiplies(self) -> bool:
        """Whether there is a matrix instruction in it."""
        return any(name in self.instructions for name in MATRIX)

    @property
    def ragged(self) -> bool:
        """Whether it is of ranks that 16 does not divide."""
        return self.of.endswith("ragged")

    def complaints(self, limit_bytes: int) -> list[str]:
        """Why a chip with this much shared memory would not run it, or not well."""
        wrong = []
        if self.spilled_bytes:
            wrong.append(f"{self.spilled_bytes} bytes of spilled registers")
        if self.shared_bytes > limit_bytes:
            wrong.append(f"{self.shared_bytes} bytes of shared memory, {limit_bytes} there are")
        if self.registers * self.warps * 32 > REGISTERS:
            wrong.append(f"{self.registers} registers")
        if self.tensor_columns > 512:
            wrong.append(f"{self.tensor_columns} columns of tensor memory")
        return [f"{self.name} in {self.warps} warps: {said}" for said in wrong]


class _Chip:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # a kernel keeps what it compiled by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiled(
    arch: int, kept: list[object] | None = None, refused: list[str] | None = None
) -> Iterator[list[Resources]]:
    """Every launch inside is compiled for sm_``arch`` and appended; ``kept`` gets the kernels.

    With ``refused`` each is then launched by the driver that serves, which is one of sm_``arch``,
    and what it says no to is appended there.
    """
    found: list[Resources] = []
    run, known = JITFunction.run, {}

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> object:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        if kernel.hash not in known:
            known[kernel.hash] = _resources(kernel, kwargs.get("num_warps", 4))
        found.append(known[kernel.hash])
        if kept is not None:
            kept.append(kernel)
        if refused is not None:
            try:
                run(self, *args, **kwargs)
            except Exception as error:
                refused.append(f"{self.__name__}: {type(error).__name__}: {error}")
        return kernel

    before = driver._active
    if refused is None:
        driver.set_active(_Chip(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = before


def _resources(kernel: object, warps: int) -> Resources:
    metadata, cubin = kernel.metadata, kernel.asm["cubin"]
    registers, spilled = spills.usage(cubin)
    ptx = kernel.asm["ptx"]
    columns = getattr(metadata, "tmem_size", 0) or 0
    found = [name for name in MATRIX + COPIES if name in ptx]
    wide = bool(WIDE_STORE.search(ptx))
    taken = (registers, spilled, metadata.shared, columns, warps)
    return Resources(metadata.name, *taken, found, wide, bool(OF_CODES.search(ptx)))
