"""The command line of tune, and the file of launches."""

import json

import pytest
import torch

from fused_lora import cli
from fused_lora.kernels.triton import available, launches
from fused_lora.kernels.triton.tiles import BulkTile, Tile

CPU = torch.device("cpu")
SHAPE = ("extended", 25216, 768, 768, torch.bfloat16)
WINNER = Tile(64, 64, 64, 3, 4)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    fresh()
    yield tmp_path
    fresh()


def fresh():
    launches._winners.cache_clear()
    launches.tile_of.cache_clear()


@pytest.mark.parametrize("tile", [WINNER, BulkTile(128, 128, 64, 3, 8, rest_n=64)])
def test_a_winner_is_what_is_launched(tile):
    usual = launches.tile_of(*SHAPE, CPU)
    assert usual != tile
    launches.store(CPU, {launches.key(*SHAPE): tile})
    launches.store(CPU, {launches.key("extended", 1, 2, 3, torch.float32): WINNER})
    fresh()
    assert launches.tile_of(*SHAPE, CPU) == tile and type(launches.tile_of(*SHAPE, CPU)) is type(
        tile
    )
    assert len(launches._winners(CPU)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": "wide"}, {"block_m": -1}, {"swizzle": 3}, None, {"stages": 2.5},
    ],
)  # fmt: skip
def test_odd_rows_are_passed_over(change):
    launches.store(CPU, {launches.key(*SHAPE): WINNER})
    rows = json.loads(launches.path().read_text())
    ((here, kept),) = rows.items()
    row = kept[launches.key(*SHAPE)]
    rows[here] = {launches.key(*SHAPE): None if change is None else row | change}
    launches.path().write_text(json.dumps(rows))
    assert launches.tile_of(*SHAPE, CPU) != WINNER


def test_winners_of_other_sources_or_torn_files_are_passed_over(monkeypatch):
    launches.store(CPU, {launches.key(*SHAPE): WINNER})
    monkeypatch.setattr(launches, "identity", lambda device: "another")
    assert launches.tile_of(*SHAPE, CPU) != WINNER
    launches.path().write_text("{")
    fresh()
    assert launches.tile_of(*SHAPE, CPU) != WINNER
    assert "kernels" in available.identity(CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shapes", "5x7"], "'5x7' is not MxKxN"), (["--shapes", "5x0x7"], "'5x0x7'"),
     (["--model", "vit_huge"], "vit_huge"), (["--rank", "0"], "'0'")],
)  # fmt: skip
def test_wrong_words_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", *arguments])
    assert message in capsys.readouterr().err


def test_without_a_device_it_says_why(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert cli.main(["tune"]) == 2
    why = available.why_not(torch.device("cuda"), torch.float32)
    assert f"nothing to tune here: {why}" in capsys.readouterr().err
    assert why and ("torch sees no CUDA device" in why or "triton" in why)
