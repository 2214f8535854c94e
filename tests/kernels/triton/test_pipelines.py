"""What overlaps in a kernel, as the compiler's own IR says it and docstrings may claim it.

Of each loop: how many copies may still fly where a step waits for its operands, and on sm_90 how
many products run on behind a step's wait for products. What ptxas makes of them it says itself.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.nvidia.compiler import get_ptxas  # which of two is Triton's to say

from fused_lora.kernels.triton import lora_extended, lora_grad, lora_one_pass, lora_shrink
from fused_lora.kernels.triton.tiles import (
    BulkTile,
    ThinTile,
    candidates,
    gelu_grads_candidates,
    one_pass_candidates,
)
from tests.kernels.triton.compiler import compiled
from tests.kernels.triton.shipped import K, M, N, borders, group, words

OPERATIONS = {
    "product": r"(?:ttng\.warp_group_dot|tt\.dot) ",
    "products may run": r"ttng\.warp_group_dot_wait .*pendings = (\d+)",
    "copy": r"(?:ttng\.async_tma_copy|ttg\.async_copy)_global_to_local ",
    "copies may fly": r"ttg\.async_wait .*num = (\d+)",
    "store": r"tt\.store ",
}

Body = list[tuple[str, object]]  # operations in order: a number, or the body of a loop


def body(lines: list[str]) -> Body:
    """Of a function or of a loop, which ends at the next line as far left as its first."""
    found: Body = []
    while lines:
        line = lines.pop(0)
        if "scf.for " in line:
            left = len(line) - len(line.lstrip())
            end = next(i for i, one in enumerate(lines) if one.startswith(" " * left + "}"))
            found.append(("loop", body(lines[:end])))
            del lines[:end]
        for kind, pattern in OPERATIONS.items():
            if said := re.search(pattern, line):
                found.append((kind, int(said[1]) if said.groups() else 1))
    return found


def of(found: Body, kind: str) -> list:
    """What the operations of one kind say, those of loops inside apart."""
    return [value for name, value in found if name == kind]


@pytest.fixture
def compiled_kernel(request, monkeypatch) -> Callable[[int, Callable[[], object]], Any]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))

    def compile_one(arch: int, run: Callable[[], object]) -> Any:
        with compiled(arch, kept := []):
            run()
        (kernel,) = kept
        return kernel

    return compile_one


@pytest.fixture
def compiled_body(compiled_kernel) -> Callable[[int, Callable[[], object]], Body]:
    return lambda *what: body(compiled_kernel(*what).asm["ttgir"].splitlines())


def operands() -> list[torch.Tensor]:
    """x, w and a bias."""
    return [torch.zeros(*size).bfloat16() for size in ((M, K), (N, K), (N,))]


def extended(tile: object) -> Callable[[], object]:
    x, w, bias = operands()
    (border,), h = borders(x, 64, 64, 64), x.new_zeros(M, 192)
    return lambda: lora_extended.forward(x, w, bias, border, h=h, tile=tile)


def one_pass(tile: object, back: bool, own: bool) -> Callable[[], object]:
    """With adapters packed, or as they are; dx, which shrinks by b, or y."""
    x, w, bias = operands()
    border = borders(x, 16)[own]
    if back:
        return lambda: lora_one_pass.input_grad(x, w, border, tile)
    return lambda: lora_one_pass.forward(x, w, bias, border, tile)


def shrink(tile: object, back: bool, own: bool) -> Callable[[], object]:
    """Likewise."""
    x, *_ = operands()
    border = borders(x, 16)[own]
    run = lora_shrink.shrink_grad if back else lora_shrink.shrink
    return lambda: run(x, border, tile=tile)


def tiles(arch: int, find: Callable[..., tuple], **how: bool) -> list:
    return [pytest.param(arch, tile, id=f"{arch} {words(tile)}") for tile in find(arch, 2, **how)]


BY_POINTERS = tiles(80, candidates) + tiles(90, candidates)
BULK = [p for p in tiles(90, candidates, bulk=True) if isinstance(p.values[1], BulkTile)]
ONE_PASS = tiles(80, one_pass_candidates) + tiles(90, one_pass_candidates)
WHICH = pytest.mark.parametrize("own", [False, True], ids=["packed", "as it is"])
BACK = pytest.mark.parametrize("back", [False, True], ids=["forward", "dx"])


@pytest.mark.parametrize("arch, tile", BY_POINTERS)
def test_extended_keeps_all_stages_but_one_in_flight(arch, tile, compiled_body):
    """x and w of later steps, and on sm_90 one product; of ranks the next step's, two stages."""
    ranks, depth = of(compiled_body(arch, extended(tile)), "loop")
    assert not of(ranks, "loop") and not of(depth, "loop")
    assert set(of(ranks, "copies may fly")) == {0}
    assert set(of(depth, "copies may fly")) == {2 * (tile.stages - 2)}
    assert of(ranks, "products may run") == ([1] if arch == 90 else [])
    assert of(depth, "products may run") == ([1] if arch == 90 else [])


@pytest.mark.parametrize("arch, tile", BULK)
def test_persistent_extended_is_no_single_loop(arch, tile, compiled_body):
    """Loops within one over tiles: nothing of a tile is copied while the one before is stored."""
    (over_tiles,) = of(compiled_body(arch, extended(tile)), "loop")
    *ranks, depth = of(over_tiles, "loop")
    accumulators = 2 if tile.rest_n else 1
    assert len(ranks) == accumulators and all(of(r, "products may run") == [1] for r in ranks)
    assert of(depth, "product") == [1] * accumulators
    assert of(depth, "products may run") == [accumulators]  # those of the step itself
    kinds = [kind for kind, _ in over_tiles]
    after = kinds[len(kinds) - kinds[::-1].index("loop") :]
    assert "store" in after and "copy" not in after and "store" not in kinds[: -len(after)]


@WHICH
@BACK
@pytest.mark.parametrize("arch, tile", ONE_PASS)
def test_one_pass_keeps_copies_and_both_products_in_flight(arch, tile, back, own, compiled_body):
    """x, w and the border of later steps, and on sm_90 the products of a step behind it."""
    (depth,) = of(compiled_body(arch, one_pass(tile, back, own)), "loop")
    assert set(of(depth, "copies may fly")) == {3 * (tile.stages - 2)}
    assert of(depth, "products may run") == ([2] if arch == 90 else [])


@WHICH
@BACK
@pytest.mark.parametrize("arch", [80, 90])
def test_shrink_keeps_copies_and_its_product_in_flight(arch, back, own, compiled_body):
    """x and the border of later steps, and on sm_90 one product."""
    tile = ThinTile(128, 16, 64, 4, 4)
    (columns,) = of(compiled_body(arch, shrink(tile, back, own)), "loop")
    assert set(of(columns, "copies may fly")) == {2 * (tile.stages - 2)}
    assert of(columns, "products may run") == ([1] if arch == 90 else [])


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_derivative_holds_a_step_ahead_and_forms_gelu_once(arch, rank, compiled_kernel):
    """dg and u of the next rows, in registers or copied; one exponential an element for both GELU
    and its derivative."""
    (x, *_), adapters = operands(), group(rank)
    h, tile = x.new_zeros(M, rank), gelu_grads_candidates(K, arch)[0]
    given = (x, adapters, h, "erf", x, h, adapters, tile)
    run = lambda: lora_grad.activation_grad_and_slices(*given)  # noqa: E731
    text = compiled_kernel(arch, run).asm["ttgir"]
    assert text.count("math.exp2") == text.count("rcp.approx") == 1
    ahead, _, loop = text.partition("scf.for")
    load = r"(?:tt\.load|ttg\.async_copy_global_to_local)"
    rows = rf"{load} .*tensor<{tile.block_n}x{tile.block_m}x!tt\.ptr<bf16>"
    assert len(re.findall(rows, ahead)) == len(re.findall(rows, loop)) == 2


SERIAL = [p for p in BY_POINTERS + BULK if p.values[0] == 90]
SERIAL = [(extended, p.values[1]) for p in SERIAL]
SERIAL += [(lambda t: one_pass(t, True, False), p.values[1]) for p in ONE_PASS if p.values[0] == 90]
SERIAL += [(lambda t: shrink(t, True, False), ThinTile(128, 16, 64, 4, 4))]


@pytest.mark.parametrize("run, tile", SERIAL, ids=[words(tile) for _, tile in SERIAL])
def test_ptxas_serialises_no_products(run, tile, compiled_kernel, tmp_path):
    """Its remarks C7510 to C7519 say where products of sm_90 wait for each other."""
    assert not remarks(compiled_kernel(90, run(tile)).asm["ptx"], tmp_path)


def test_products_that_ptxas_serialises_would_be_seen(compiled_kernel, tmp_path):
    """An accumulator that is read between two products."""
    ptx = compiled_kernel(90, extended(BY_POINTERS[-1].values[1])).asm["ptx"]
    *_, last = re.findall(r"wgmma\.mma_async\S+ \{(%\w+),", ptx)
    before, commit, after = ptx.rpartition("wgmma.commit_group")
    changed = f"add.f32 {last}, {last}, 0f3F800000;\n\t"
    assert remarks(before + changed + commit + after, tmp_path)


def remarks(ptx: str, folder: Path) -> list[str]:
    """What ptxas says of asynchronous products that do not run on."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [
        get_ptxas(90).path,
        "-v",
        "--gpu-name=sm_90a",
        str(source),
        "-o",
        str(folder / "kernel"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.findall(r"C75\d\d", done.stderr + done.stdout)


def test_an_overlap_that_is_not_there_would_be_seen():
    """The reader tells a loop's own operations from those around it and inside it."""
    found = body([
        "  %0 = ttg.async_copy_global_to_local %p, %q : tensor",
        "  %1:2 = scf.for %i = %a to %b step %c iter_args(%d = %e) -> (f32) {",
        "    %2 = scf.for %j = %a to %b step %c iter_args(%d = %e) -> (f32) {",
        "      %3 = ttng.warp_group_dot %l, %r, %d {isAsync = true} : f32",
        "      %4 = ttng.warp_group_dot_wait %3 {pendings = 1 : i32} : f32",
        "    } loc(#loc)",
        "    ttg.async_wait %0 {num = 4 : i32}",
        "  } {tt.flatten}",
        "  tt.store %s, %1#0 : tensor",
    ])  # fmt: skip
    inner = [("product", 1), ("products may run", 1)]
    outer = [("loop", inner), ("copies may fly", 4)]
    assert found == [("copy", 1), ("loop", outer), ("store", 1)]
