"""Launches with a planted fault each, over the stub driver as sm_90.

    python -m tests.kernels.triton.planted

Prints a line for each: its name, and what the driver said; "launched" where it said nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import elementwise, lora_extended, tiles
from fused_lora.types import Span
from tests.kernels.triton import stub

ARCH = 90
FAULTS: dict[str, Callable[[], object]] = {}
MAX_DYNAMIC_SHARED = 8  # as cuda.h numbers attributes
BF16, SWIZZLE_128B = 9, 3


def fault(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Plant it under this name."""

    def plant(run: Callable[[], object]) -> Callable[[], object]:
        FAULTS[name] = run
        return run

    return plant


class Freed:
    """What is left of a tensor that is gone: an address."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.address = torch.zeros(16 << 20, dtype=self.dtype).data_ptr()

    def data_ptr(self) -> int:
        """Where it was."""
        return self.address


def rows() -> Tensor:
    """u [64, 1024] of GELU."""
    return torch.zeros(64, 1024, dtype=torch.bfloat16)


def launch(
    grid: tuple[int, int] = (16, 2),
    u: Any = None,
    function: Any = None,
    warps: int | None = None,
    shared: int | None = None,
) -> None:
    """GELU, by the compiled kernel and the launcher made for it, with what is not None replaced."""
    given, out = rows(), rows()
    compiled = elementwise._gelu_rows[(16, 2)](*arguments(given, out), **constants())
    metadata = list(compiled.packed_metadata)
    metadata[0] = metadata[0] if warps is None else warps
    metadata[2] = metadata[2] if shared is None else shared
    args = arguments(given if u is None else u, out)
    after = [constants()[p.name] for p in elementwise._gelu_rows.params[len(args) :]]
    called = function or compiled.function
    compiled.run(*grid, 1, 0, called, tuple(metadata), None, None, None, *args, *after)


def arguments(u: Any, out: Tensor) -> tuple[Any, ...]:
    """Of the kernel, forward."""
    return u, 1024, None, 0, out, 1024, 64, 1024


def constants() -> dict[str, Any]:
    """Likewise."""
    return dict(KIND="erf", **tiles.ELEMENTS.arguments())


def bulk(change: Callable[[Any], None] | None = None) -> Any:
    """A product that reads by tensor maps; ``change`` spoils the descriptor of x."""
    x, w = (torch.zeros(256, 128, dtype=torch.bfloat16) for _ in range(2))
    a, b = torch.zeros(16, 128).bfloat16(), torch.zeros(256, 16).bfloat16()
    adapters = Adapters([a], [b], [0.5], [Span(0, 256, 16)])
    tile = next(t for t in tiles.candidates(ARCH, 2, bulk=True) if isinstance(t, tiles.BulkTile))
    right = lora_extended._descriptor

    def spoiled(matrix: Tensor, *block: int) -> Any:
        made = right(matrix, *block)
        if change is not None and matrix is x:
            change(made)
        return made

    lora_extended._descriptor = spoiled
    try:
        return lora_extended.forward(x, w, None, adapters, h=x.new_zeros(256, 16), tile=tile)
    finally:
        lora_extended._descriptor = right


def encode(box: list[int]) -> object:
    """A tensor map of [512, 512] in bf16 with a 128-byte swizzle."""
    utils = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    whole = torch.zeros(512, 512, dtype=torch.bfloat16)
    stub.served().alive()
    return fill(whole.data_ptr(), SWIZZLE_128B, 2, BF16, box, [512, 512], [512, 1], 0)


@fault("nothing")
def _() -> object:
    launch()
    encode([64, 64])
    return bulk()


@fault("grid: 65,536 blocks along y")
def _() -> object:
    return launch(grid=(1, 65536))


@fault("block: 2,048 threads")
def _() -> object:
    return launch(warps=64)


@fault("block: other threads than it was compiled for")
def _() -> object:
    return launch(warps=8)


@fault("shared memory: beyond the attribute")
def _() -> object:
    return launch(shared=64 << 10)


@fault("shared memory: an attribute beyond the chip")
def _() -> object:
    compiled = elementwise._gelu_rows[(16, 2)](*arguments(rows(), rows()), **constants())
    library, text = stub.served().library, ctypes.c_char_p()
    function = ctypes.c_void_p(compiled.function)
    code = library.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, 228 << 10)
    library.cuGetErrorString(code, ctypes.byref(text))
    if code:
        raise RuntimeError((text.value or b"").decode())
    return None


@fault("module: a cubin of another chip")
def _() -> object:
    driver.active.stub.be(80)
    try:
        compiled = elementwise._gelu_rows[(16, 2)](*arguments(rows(), rows()), **constants())
        cubin, name = compiled.asm["cubin"], compiled.metadata.name
        return driver.active.utils.load_binary(name, cubin, 0, 0)
    finally:
        driver.active.stub.be(ARCH)


@fault("parameters: another kernel's")
def _() -> object:
    other = elementwise._gelu_rows[(16, 2)](
        rows(), 1024, rows(), *arguments(0, rows())[3:], **constants()
    )
    return launch(function=other.function)


@fault("parameters: a wider one")
def _() -> object:
    far = elementwise._gelu_rows[(1, 2)](rows(), 1 << 40, *arguments(0, rows())[2:], **constants())
    return launch(function=far.function)


@fault("pointer: null")
def _() -> object:
    return launch(u=0)


@fault("pointer: freed memory")
def _() -> object:
    return launch(u=Freed())


@fault("pointer: freed memory, as a number")
def _() -> object:
    return launch(u=Freed().address)


@fault("pointer: no multiple of 16, as it was compiled for")
def _() -> object:
    return launch(u=torch.zeros(1 << 20, dtype=torch.bfloat16)[1:])


@fault("map: an address that 16 does not divide")
def _() -> object:
    def change(made: Any) -> None:
        made.base = torch.zeros(1 << 20, dtype=torch.bfloat16)[1:]

    return bulk(change)


@fault("map: a stride that 16 does not divide")
def _() -> object:
    def change(made: Any) -> None:
        made.base, made.strides = torch.zeros(1 << 20, dtype=torch.bfloat16), [129, 1]

    return bulk(change)


@fault("map: rows that overlap")
def _() -> object:
    def change(made: Any) -> None:
        made.strides = [64, 1]

    return bulk(change)


@fault("map: beyond the tensor")
def _() -> object:
    def change(made: Any) -> None:
        made.shape = [257, 128]

    return bulk(change)


@fault("map: freed memory")
def _() -> object:
    def change(made: Any) -> None:
        made.base = Freed()

    return bulk(change)


@fault("map: a box of 512 rows")
def _() -> object:
    return encode([512, 64])


@fault("map: a box wider than its swizzle")
def _() -> object:
    return encode([64, 128])


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    stub.serve(ARCH)
    for name, run in FAULTS.items():
        try:
            run()
            said = "launched"
        except Exception as error:
            said = str(error).replace("\n", " ")
        print(f"{name}\t{said}")


if __name__ == "__main__":
    main()
