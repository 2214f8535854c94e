"""A tile that spills is passed over: seen once, remembered on disk, another stands in for it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fused_lora import cli, disk
from fused_lora.kernels.triton import launches, lora_extended, spills, tiles
from fused_lora.verify import verdicts
from fused_lora.verify.kernel_registry import of_launch
from tests.kernels.triton.compiler import compiled
from tests.kernels.triton.shipped import K, M, N, group
from tests.verify.conftest import kernels  # noqa: F401

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    """Nothing known, a folder of the test's own."""
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    spills.forget()
    yield
    monkeypatch.undo()
    spills.forget()


class Compiled:
    """As much of Triton's compiled kernel as is looked at."""

    def __init__(self, n_spills):
        self.n_spills, self.asm = n_spills, {"cubin": b""}


def chosen(name="extended", dtype=FP32, ragged=False):
    return launches.tile_of(name, 197, 384, 384, dtype, CPU, ragged)


@pytest.fixture
def taken(monkeypatch):
    """Every spill is of 24 bytes; how often machine code was read."""
    reads = []
    monkeypatch.setattr(spills, "usage", lambda cubin: (reads.append(cubin), (255, 24))[1])
    return reads


def test_the_next_candidate_serves(taken):
    first, second = tiles.candidates(80, 4)
    assert chosen() == first
    spills.look(Compiled(6), "extended", first, torch.zeros(1))
    assert chosen() == second
    assert chosen(ragged=True) == first and chosen("extended_scale") == first  # other kernels
    (name,) = spills.passed_over(CPU)
    assert name.startswith("extended in float32: block_m 64 block_n 64 block_k 32 stages 3 warps 8")
    assert spills.passed_over(CPU)[name] == "24 bytes of spilled registers"


def test_a_kernel_is_looked_at_once_and_a_clean_one_is_not_read(taken):
    clean, spilling = Compiled(0), Compiled(6)
    for each in (clean, spilling):
        assert not spills.seen(each)
        spills.look(each, "extended", tiles.SAFE, torch.zeros(1))
        assert spills.seen(each)
    assert len(taken) == 1
    assert spills.seen(None)  # of the interpreter


def test_a_frame_that_is_never_read_is_no_spill(monkeypatch):
    monkeypatch.setattr(spills, "usage", lambda cubin: (168, 0))
    spills.look(Compiled(2), "extended", tiles.SAFE, torch.zeros(1))
    assert spills.passed_over(CPU) == {}


def test_where_all_spill_the_least_does():
    first, second = tiles.candidates(80, 4)
    for tile, size in ((first, 8), (second, 24)):
        spills.remember("extended", tile, "float32", CPU, size)
    assert chosen() == first


def test_what_fits_comes_before_what_spills_and_that_before_what_does_not_fit():
    first, second = tiles.candidates(80, 4)
    spills.remember("extended", first, "float32", CPU, spills.TOO_LARGE)
    spills.remember("extended", second, "float32", CPU, 24)
    assert chosen() == second
    assert "it does not fit the chip" in spills.passed_over(CPU).values()


def test_it_is_kept_for_later_processes_of_the_same_versions(monkeypatch):
    first, second = tiles.candidates(80, 4)
    spills.remember("extended", first, "float32", CPU, 8)
    spills.forget()
    assert chosen() == second
    spills.forget()
    monkeypatch.setattr(spills, "identity", lambda device: "another version of triton")
    assert chosen() == first
    spills.remember("one_pass", first, "float32", CPU, 8)
    assert len(disk.read(spills.path())) == 2  # neither drops the other's


@pytest.mark.parametrize("kept", ["", "[]", '{"x": 1}', "torn {"])
def test_odd_files_are_passed_by(kept):
    spills.path().write_text(kept)
    assert chosen() == tiles.candidates(80, 4)[0]


def test_every_kernel_with_a_product_has_something_to_stand_in():
    for arch in (80, 86, 90, 100, 120):
        for dtype in (FP32, BF16):
            for name in (
                "extended",
                "extended_gelu",
                "extended_scale",
                "one_pass",
                "one_pass_scale",
            ):
                listed = (
                    tiles.one_pass_candidates(arch, dtype.itemsize, name != "one_pass")
                    if name.startswith("one_pass")
                    else tiles.candidates(
                        arch, dtype.itemsize, name != "extended", True, name == "extended_gelu"
                    )
                )
                for tile in listed:
                    order = launches.in_its_place(name, tile, dtype, arch)
                    assert order[0] == tile and len(set(order)) == len(order)
    for tile in (tiles.ThinTile(64, 16, 64, 4, 4), tiles.GradTile(16, 64, 32, 4, 4)):
        assert len(launches.in_its_place("shrink", tile, FP32, 80)) == 2
    assert len(launches.in_its_place("merge", tiles.MergeTile(), FP32, 80)) == 2


def test_a_check_of_a_tile_that_spills_is_one_of_what_stands_in(kernels, taken, monkeypatch):  # noqa: F811
    """What serves in its place has been checked, before anybody's data reach it."""
    first, second = tiles.candidates(80, 4)
    ran = []
    right = kernels.run

    def run(name, p, tile):
        ran.append(tile)
        if tile == first:
            spills.look(Compiled(6), name, tile, p.x)
        return right(name, p, tile)

    monkeypatch.setattr(kernels, "run", run)
    checked = of_launch(launches.Launch("extended", first), "float32")
    assert verdicts.verdict(checked, CPU).passed
    assert set(ran) == {first, second} and chosen() == second
    verdicts.forget()
    kernels.faults["extended"] = lambda t: t + 1
    with pytest.warns(RuntimeWarning, match="over the budget"):
        assert not verdicts.verdict(
            of_launch(launches.Launch("extended", second), "float32"), CPU
        ).passed


def test_a_tile_that_does_not_fit_is_passed_over_in_its_check(kernels, monkeypatch):  # noqa: F811
    class OutOfResources(Exception):
        """Of Triton."""

    first, second = tiles.candidates(80, 4)
    right = kernels.run

    def run(name, p, tile):
        if tile == first:
            raise OutOfResources("out of resource: shared memory, Required: 300000")
        return right(name, p, tile)

    monkeypatch.setattr(kernels, "run", run)
    assert verdicts.verdict(of_launch(launches.Launch("extended", first), "float32"), CPU).passed
    assert chosen() == second


def test_the_selftest_shows_it(kernels, capsys):  # noqa: F811
    spills.remember("extended", tiles.candidates(80, 4)[0], "float32", CPU, 24)
    assert cli.main(["selftest", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "passed over: extended in float32: block_m 64" in said
    assert "24 bytes of spilled registers" in said


@pytest.mark.parametrize(
    "tile, spilled", [(tiles.Tile(128, 256, 32, 2, 4), True), (tiles.SAFE, False)]
)
def test_a_real_compiler_s_spill_is_seen(tile, spilled, request, monkeypatch):
    """What a device's loader would count, from the machine code of sm_89."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
    x, w, adapters = torch.zeros(M, K).half(), torch.zeros(N, K).half(), group(16).to(torch.half)
    with compiled(89) as found:
        lora_extended.forward(x, w, None, adapters, h=x.new_zeros(M, 16), tile=tile)
    assert bool(found[0].spilled_bytes) is spilled
    from triton.runtime.jit import JITFunction

    caches = lora_extended._extended.device_caches
    assert isinstance(lora_extended._extended, JITFunction) and caches
    before = dict(spills.passed_over(CPU))
    real = [each for cache in caches.values() for each in cache[0].values()]
    match = [k for k in real if k.metadata.num_warps == tile.warps]
    for each in match:
        each.n_spills = spills.usage(each.asm["cubin"])[1] // 4
        spills.look(each, "extended", tile, x)
    assert before == {} and bool(spills.passed_over(CPU)) is spilled
