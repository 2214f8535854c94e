"""Which tile is chosen: integers alone, no triton."""

import pytest
import torch

from fused_lora.kernels.triton import tiles

CPU = torch.device("cpu")
ARCHS = (80, 86, 89, 90, 100, 103, 120, 121, 130)  # the last is not known yet


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("heavy, activation", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("bulk", [False, True])
def test_every_chip_has_tiles_that_fit(arch, itemsize, heavy, activation, bulk):
    found = tiles.candidates(arch, itemsize, heavy, bulk, activation)
    assert all(tile.fits(arch, itemsize, heavy) for tile in found)
    persistent = [tile for tile in found if isinstance(tile, tiles.BulkTile)]
    assert len(persistent) < len(found), "operands that no descriptor describes"
    assert bool(persistent) <= (bulk and arch >= 90)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_chip_has_one_pass_tiles_that_fit(arch, itemsize, heavy, ragged):
    found = tiles.one_pass_candidates(arch, itemsize, heavy, ragged)
    assert found and all(tile.fits(arch, itemsize, heavy) for tile in found)


def test_an_activation_has_no_tile_that_would_spill():
    endings = ({}, {"heavy": True}, {"activation": True})
    widest = [max(t.width for t in tiles.candidates(90, 2, bulk=True, **e)) for e in endings]
    assert widest == [256, 192, 128]


@pytest.mark.parametrize(
    "arch, itemsize, widths",
    [
        *((80, 2, []), (90, 2, [256, 192]), (100, 2, [256, 192]), (120, 2, [])),
        *((90, 4, []), (100, 4, [64])),
    ],
)
def test_the_persistent_form_ships_where_pointers_have_nothing_as_good(arch, itemsize, widths):
    found = tiles.candidates(arch, itemsize, bulk=True)
    assert [t.width for t in found if isinstance(t, tiles.BulkTile)] == widths


def test_on_sm_90_two_blocks_of_128_x_128_or_a_fourth_stage():
    """As many stages as leave room for two blocks, where an ending leaves them the registers."""
    square = lambda **ending: [  # noqa: E731
        t.stages for t in tiles.candidates(90, 2, **ending) if t.block_m == t.block_n == 128
    ]
    assert square() == square(activation=True) == square(heavy=True, activation=True) == [3]
    assert square(heavy=True) == [4]
    two_blocks = 2 * (3 * (128 + 128) * 64 * 2 + 1024)
    assert two_blocks <= tiles.shared_bytes(90) + 1024


def test_384_and_768_columns_fill_a_large_chip(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    for columns in (384, 768):
        tile = tiles.gemm_tile(128 * 197, columns, 2, False, CPU, bulk=True)
        assert tile.width == 192


def test_few_rows_take_small_tiles_and_many_take_large_ones(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    small = tiles.gemm_tile(197, 768, 2, False, CPU)
    large = tiles.gemm_tile(25216, 3072, 2, False, CPU)
    assert small.block_m * small.block_n < large.block_m * large.block_n


@pytest.mark.parametrize("size, power", [(1, 16), (16, 16), (17, 32), (48, 64), (65, 64)])
def test_rank_blocks_are_powers_of_two_within_bounds(size, power):
    assert tiles.power_of_two(size, 16, 64) == power


def test_arguments_are_constants_and_options():
    expected = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    options = {"num_stages": 3, "num_warps": 8, "enable_fp_fusion": True}
    assert tiles.SAFE.arguments() == expected | options
