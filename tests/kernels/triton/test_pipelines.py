"""What overlaps in a kernel, as the compiler's own IR says it and docstrings may claim it.

Of each loop: how many copies may still fly where a step waits for its operands, and on sm_90 how
many products run on behind a step's wait for products.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from fused_lora.kernels.triton import lora_extended, lora_one_pass
from fused_lora.kernels.triton.tiles import BulkTile, candidates, one_pass_candidates
from tests.kernels.triton.compiler import compiled
from tests.kernels.triton.shipped import K, M, N, group, words

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
def compiled_body(request, monkeypatch) -> Callable[[int, Callable[[], object]], Body]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))

    def compile_one(arch: int, run: Callable[[], object]) -> Body:
        with compiled(arch, kept := []):
            run()
        (kernel,) = kept
        return body(kernel.asm["ttgir"].splitlines())

    return compile_one


def extended(tile: object) -> Callable[[], object]:
    x, w, bias = torch.zeros(M, K).bfloat16(), torch.zeros(N, K).bfloat16(), torch.zeros(N)
    h = x.new_zeros(M, 192)
    return lambda: lora_extended.forward(x, w, bias, group(64, 64, 64), h=h, tile=tile)


def one_pass(tile: object) -> Callable[[], object]:
    x, w, bias = torch.zeros(M, K).bfloat16(), torch.zeros(N, K).bfloat16(), torch.zeros(N)
    return lambda: lora_one_pass.forward(x, w, bias, group(16, 16, 16), tile)


def tiles(arch: int, find: Callable[..., tuple], **how: bool) -> list:
    return [pytest.param(arch, tile, id=f"{arch} {words(tile)}") for tile in find(arch, 2, **how)]


BY_POINTERS = tiles(80, candidates) + tiles(90, candidates)
BULK = [p for p in tiles(90, candidates, bulk=True) if isinstance(p.values[1], BulkTile)]
ONE_PASS = tiles(80, one_pass_candidates) + tiles(90, one_pass_candidates)


@pytest.mark.parametrize("arch, tile", BY_POINTERS)
def test_extended_keeps_all_stages_but_one_in_flight(arch, tile, compiled_body):
    """x and w of later steps, and on sm_90 one product; ranks, cast on load, wait in each step."""
    ranks, depth = of(compiled_body(arch, extended(tile)), "loop")
    assert not of(ranks, "loop") and not of(depth, "loop")
    assert set(of(ranks, "copies may fly")) == {0}
    assert set(of(depth, "copies may fly")) == {2 * (tile.stages - 2)}
    assert of(ranks, "products may run") == ([0] if arch == 90 else [])
    assert of(depth, "products may run") == ([1] if arch == 90 else [])


@pytest.mark.parametrize("arch, tile", BULK)
def test_persistent_extended_is_no_single_loop(arch, tile, compiled_body):
    """Loops within one over tiles: nothing of a tile is copied while the one before is stored."""
    (over_tiles,) = of(compiled_body(arch, extended(tile)), "loop")
    *ranks, depth = of(over_tiles, "loop")
    accumulators = 2 if tile.rest_n else 1
    assert len(ranks) == accumulators and all(of(r, "products may run") == [0] for r in ranks)
    assert of(depth, "product") == [1] * accumulators
    assert of(depth, "products may run") == [accumulators]  # those of the step itself
    kinds = [kind for kind, _ in over_tiles]
    after = kinds[len(kinds) - kinds[::-1].index("loop") :]
    assert "store" in after and "copy" not in after and "store" not in kinds[: -len(after)]


@pytest.mark.parametrize("arch, tile", ONE_PASS)
def test_one_pass_waits_for_its_products_in_each_step(arch, tile, compiled_body):
    """Copies of later steps fly; on sm_90 no product runs beyond its step: a border is cast."""
    (depth,) = of(compiled_body(arch, one_pass(tile)), "loop")
    assert set(of(depth, "copies may fly")) == {3 * (tile.stages - 2)}
    assert of(depth, "products may run") == ([0] if arch == 90 else [])


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
