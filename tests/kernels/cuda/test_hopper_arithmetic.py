"""Indices of lora_linear on sm_90, every one of them; and what its emulated block must see."""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import CSRC, HERE, compile_host, cxx

WORLDS = list(product((False, True), repeat=2))  # threads backwards, copies and products late
TILES = [(128, 128), (128, 192), (128, 256), (64, 128), (64, 256)]
UNSEEN_EARLY = ["no copy wait", "no product wait", "no publish", "no meeting"]
REFUSED = [
    *("no fence", "no barrier published", "not aligned", "outside", "no store wait"),
    *("few bytes", "many bytes", "different products", "not swizzled"),
]


@pytest.fixture
def library(host: ModuleType) -> ctypes.CDLL:
    """The parts of the module that only tests see."""
    library = ctypes.CDLL(host.__file__)
    library.host_linear_descriptor.restype = ctypes.c_uint64
    library.host_linear_staged.restype = ctypes.c_uint32
    library.host_linear_meets.restype = ctypes.c_bool
    return library


def test_a_right_kernel_is_right_in_every_world(library: ctypes.CDLL) -> None:
    assert [library.host_hopper_misses(0, *world) for world in WORLDS] == [0] * 4


@pytest.mark.parametrize("flaw", UNSEEN_EARLY)
def test_a_missing_wait_is_seen_in_some_world(library: ctypes.CDLL, flaw: str) -> None:
    number = 1 + UNSEEN_EARLY.index(flaw)
    assert any(library.host_hopper_misses(number, *world) for world in WORLDS)


@pytest.mark.parametrize("flaw", REFUSED)
def test_what_is_refused(library: ctypes.CDLL, flaw: str) -> None:
    number = 1 + len(UNSEEN_EARLY) + REFUSED.index(flaw)
    assert [library.host_hopper_misses(number, *world) for world in WORLDS] == [-1] * 4


FLAWED_CLUSTERS = [
    *("hears itself", "no remote arrive", "mask of itself", "mask of the other"),
    *("mask beyond", "half expected", "no meeting before", "no meeting behind"),
]


def test_a_right_pair_of_blocks_is_right_in_every_world(library: ctypes.CDLL) -> None:
    assert [library.host_cluster_misses(0, *world) for world in WORLDS] == [0] * 4


@pytest.mark.parametrize("flaw", FLAWED_CLUSTERS)
def test_a_flaw_between_blocks_is_seen_in_some_world(library: ctypes.CDLL, flaw: str) -> None:
    number = 1 + FLAWED_CLUSTERS.index(flaw)
    assert any(library.host_cluster_misses(number, *world) for world in WORLDS)


EXTENDED = "lora_linear_sm90/extended.h"
FLAWED_PING_PONG = {  # the kernel's own source, and what it is made of that
    "no turns": ("if (Tile::kPingPong) await_turn(count / 2);", ""),
    "a turn that nobody gives": ("if (Tile::kPingPong) give_turn();", ""),
    "turns of eight warps": ("init_barrier(turn(0), 4)", "init_barrier(turn(0), 8)"),
    "too few stages passed over": ("at.skip(stages_of(c));", "at.skip(stages_of(c) - 1);"),
    "no parity passed over": ("parity ^= stage / stages % 2;", ""),
    "a group's stages forgotten": ("meets_group(tile, g)) stages", "!meets_group(tile, g)) stages"),
    "the other's last stage released": ("    if (add) {\n      wait", "    {\n      wait"),
    "stages that eight warps empty": ("4 * Tile::kReaders", "4 * kConsumers"),
    "staged before the last store has read": ("if (leads) wait_stores_read();\n      sync", "sync"),
}  # fmt: skip


def test_consumers_in_ping_pong_are_right_in_every_world(library: ctypes.CDLL) -> None:
    assert [library.host_ping_pong_misses(*world) for world in WORLDS] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("flaw", FLAWED_PING_PONG)
def test_a_flaw_in_ping_pong_is_seen_in_some_world(flaw: str, tmp_path: Path) -> None:
    right, wrong = FLAWED_PING_PONG[flaw]
    source = (CSRC / EXTENDED).read_text()
    assert source.count(right) == 1
    (tmp_path / EXTENDED).parent.mkdir()
    (tmp_path / EXTENDED).write_text(source.replace(right, wrong))
    sources = [HERE / "host_hopper.cpp", HERE / "emulated_hopper.cpp"]
    compile_host(cxx(), [str(tmp_path)], tmp_path / "flawed.so", sources)
    flawed = ctypes.CDLL(str(tmp_path / "flawed.so"))
    assert any(flawed.host_ping_pong_misses(*world) for world in WORLDS)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_cover_y_once_columns_first(library: ctypes.CDLL, tile: tuple[int, int]) -> None:
    for rows, columns in product((1, 63, 64, 129, 400), (8, 128, 136, 192, 520)):
        found = []
        corner = (ctypes.c_int * 2)()
        for i in range(-(-rows // tile[0]) * -(-columns // tile[1])):
            library.host_linear_corner(ctypes.c_int64(i), columns, *tile, corner)
            found.append(tuple(corner))
        assert found == list(product(range(0, rows, tile[0]), range(0, columns, tile[1])))


def test_a_tile_meets_the_groups_it_shares_columns_with(library: ctypes.CDLL) -> None:
    for column, first, count in product((0, 4, 8), range(14), range(1, 6)):
        shared = set(range(column, column + 4)) & set(range(first, first + count))
        assert library.host_linear_meets(column, 4, first, count) == bool(shared)


def test_products_cover_every_rank_of_a_stage(library: ctypes.CDLL) -> None:
    for rank in range(1, 200):
        for first in range(0, rank, 64):
            ranks = min(64, rank - first)
            assert library.host_linear_products(rank, first) == -(-ranks // 16)


def test_staged_pieces_fill_boxes_and_strike_every_bank_once(library: ctypes.CDLL) -> None:
    at = [[library.host_linear_staged(row, c) for c in range(0, 192, 8)] for row in range(64)]
    assert sorted(place for row in at for place in row) == list(range(0, 3 * 8192, 16))
    for row, piece in product(range(0, 64, 8), range(24)):
        banks = {at[row + i][piece] % 128 for i in range(8)}  # of one 8 x 8 matrix
        assert len(banks) == 8


@pytest.mark.parametrize("transposed", [False, True])
def test_descriptors_say_what_the_manual_asks(library: ctypes.CDLL, transposed: bool) -> None:
    """Bits 0 to 13 the address, 16 to 29 and 32 to 45 two distances, all by 16; 62 the swizzle."""
    for stage, first, step in product((1024, 130 * 1024), (0, 64, 128), range(4)):
        found = library.host_linear_descriptor(transposed, stage, first, step)
        at = stage + first * 128 + (2048 if transposed else 32) * step
        leading = 64 * 128 if transposed else 16
        assert found == at // 16 | leading // 16 << 16 | 8 * 128 // 16 << 32 | 1 << 62
