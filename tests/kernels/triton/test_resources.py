"""Every launch on every architecture, in each tile it may take: what it takes of the chip.

The chip's matrix instruction in the big product, loads asynchronous, stores of 16 bytes; for every
launch a tile without spilled registers, within the chip's shared memory; and no launch that the
stub driver refuses. A column is one test: two would wait for the one process that compiles it, a
core idle. ``passed_over.json`` has the tiles that spill, by version of Triton, each with another
that stands in for it.
``make test-triton`` asks the same of another version, whose ptxas is another too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from fused_lora.kernels.triton import lora_extended
from fused_lora.kernels.triton.tiles import Tile, shared_bytes
from fused_lora.verify.kernel_registry import LEAST_FP8
from tests.kernels.triton import stub
from tests.kernels.triton.compiler import Resources, compiled
from tests.kernels.triton.matrix import KINDS, Column, column
from tests.kernels.triton.shipped import K, M, N, group

ARCHS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
ON = [pytest.param(kind, arch, marks=stub.needed) for kind in KINDS for arch in ARCHS]
BIG = (
    "_extended",
    "_extended_grads",
    "_extended_bulk",
    "_extended_fp8",
    "_one_pass",
)  # in its own matrix instruction
FP32_PRODUCTS = ("_merge", "_merge_many")
HELD = "_activation_grads"  # whose rows wait in registers; borders' 2 bytes a thread are no copies
NO_PRODUCTS = (
    "_add_blocks",
    "_add_slices",
    "_border_weight",
    "_gelu_rows",
    "_layer_norm",
    "_layer_norm_grad",
    "_pack",
    "_quantise",
)

NO_COPIES = ("_norm_expand", "_residual_expand")  # ahead of a step: blocks overlap instead

KNOWN = Path(__file__).parent / "passed_over.json"
Columns = Callable[[str, int], Column]


@pytest.fixture(scope="session")
def columns(request: pytest.FixtureRequest) -> Iterator[Columns]:
    """Columns of the matrix; a process that tests alone begins all that it will ask for at once."""
    folder = request.config.cache.mkdir("triton")
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    pool, begun = ThreadPoolExecutor(os.cpu_count() if alone else 1), {}

    def begin(kind: str, arch: int) -> Future[Column]:
        return begun.setdefault((kind, arch), pool.submit(column, kind, arch, folder))

    wanted = test_every_launch_fits_in_a_tile_and_is_accepted.__name__
    for item in request.session.items if alone else ():
        if getattr(item, "originalname", "") == wanted:
            begin(**item.callspec.params)
    yield lambda *which: (begun.get(which) or begin(*which)).result()
    pool.shutdown(cancel_futures=True)


def passed_over() -> dict[str, list[str]]:
    """By column, the tiles that another stands in for under this Triton; None where nobody looked.

    A compiler that spills in other tiles is told by a test that fails: then change the file.
    """
    return json.loads(KNOWN.read_text()).get(".".join(triton.__version__.split(".")[:2]))


def few(kernel: Resources) -> bool:
    """Whether no thread stores 16 bytes of h: its rows are short, or its tile stands in for one."""
    rows, ranks, *_ = (int(size) for size in kernel.tile.split(" ")[0].split("x"))
    return kernel.ragged or 2 * rows * ranks < 16 * 32 * kernel.warps


def complaints(kernel: Resources, arch: int, kind: str) -> list[str]:
    """What is wrong with one kernel of one column, but for what it takes of the chip."""
    wrong = []
    narrow = kernel.name in ("_add_blocks", "_add_slices")
    narrow |= kernel.name == "_shrink" and few(kernel)
    narrow |= kernel.name == "_border_weight" and kernel.ragged
    if not narrow and not kernel.stores_wide:
        wrong.append(f"{kernel.name}: stores are narrower than 16 bytes")
    if kernel.name in NO_PRODUCTS or kernel.name in FP32_PRODUCTS:
        return wrong
    if kind != "fp32" and not kernel.multiplies:
        wrong.append(f"{kernel.name}: no matrix instruction")
    if kind == "bf16" and kernel.name in BIG and ARCHS[arch] not in kernel.instructions:
        wrong.append(f"{kernel.name}: {kernel.instructions}, not {ARCHS[arch]}")
    if kernel.of_codes != (kernel.name == "_extended_fp8"):
        wrong.append(f"{kernel.name}: e4m3 in matrix instructions: {kernel.of_codes}")
    if kernel.name in NO_COPIES:
        return wrong
    copies = "cp.async.bulk.tensor" if kernel.name == "_extended_bulk" else "cp.async"
    if copies not in kernel.instructions and kernel.name != HELD:
        wrong.append(f"{kernel.name}: loads are not asynchronous")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind, arch", ON)
def test_every_launch_fits_in_a_tile_and_is_accepted(arch, kind, columns, record_property):
    kernels, refused, launches, maps = vars(columns(kind, arch)).values()
    record_property("kernels", len(kernels))
    assert not refused, "\n".join(refused)
    assert launches >= len(kernels) >= 30
    assert (maps > 0) == any(kernel.name == "_extended_bulk" for kernel in kernels)
    assert maps > 0 or arch not in (90, 100) or kind != "bf16"
    assert any(k.name == "_extended_fp8" for k in kernels) == (kind == "bf16" and arch >= LEAST_FP8)
    wrong = [said for kernel in kernels for said in complaints(kernel, arch, kind)]
    assert not wrong, "\n".join(wrong)
    found: dict[str, dict[str, list[str]]] = {}
    for kernel in kernels:
        said = kernel.complaints(shared_bytes(arch))
        found.setdefault(kernel.of, {}).setdefault(kernel.tile, []).extend(said)
    for launch, tiles in found.items():
        assert not all(tiles.values()), f"no tile of {launch} is clean: {tiles}"
    over = {
        f"{launch}: {tile}": said
        for launch, tiles in found.items()
        for tile, said in tiles.items()
        if said
    }
    print(f"{kind} {arch}: passed over {over}")
    if (known := passed_over()) is not None:
        assert sorted(over) == known.get(f"{kind} {arch}", []), over


@pytest.mark.parametrize(
    "tile, why",
    [
        (Tile(128, 128, 64, 4, 4), "bytes of shared memory"),
        (Tile(128, 256, 32, 2, 4), "bytes of spilled registers"),
    ],
)
def test_what_does_not_fit_is_seen(tile, why, request, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
    x, w, adapters = torch.zeros(M, K).half(), torch.zeros(N, K).half(), group(16).to(torch.half)
    with compiled(89) as kernels:
        lora_extended.forward(x, w, None, adapters, h=x.new_zeros(M, 16), tile=tile)
    (kernel,) = kernels
    assert why in "".join(kernel.complaints(64 << 10))
