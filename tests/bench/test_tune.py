"""The command line of tune, and the file of winners."""

import json

import pytest
import torch

from fused_lora import cli
from fused_lora.kernels.triton import available, identity, launches, winners
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
    winners._winners.cache_clear()
    launches.tile_of.cache_clear()


@pytest.mark.parametrize("tile", [WINNER, BulkTile(128, 128, 64, 3, 8, rest_n=64)])
def test_a_winner_is_what_is_launched(tile):
    usual = launches.tile_of(*SHAPE, CPU)
    assert usual != tile
    winners.store(CPU, {winners.key(*SHAPE): tile})
    winners.store(CPU, {winners.key("extended", 1, 2, 3, torch.float32): WINNER})
    fresh()
    assert launches.tile_of(*SHAPE, CPU) == tile and type(launches.tile_of(*SHAPE, CPU)) is type(
        tile
    )
    assert len(winners._winners(CPU)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": "wide"}, {"block_m": -1}, {"swizzle": 3}, None, {"stages": 2.5},
    ],
)  # fmt: skip
def test_odd_rows_are_passed_over(change):
    winners.store(CPU, {winners.key(*SHAPE): WINNER})
    rows = json.loads(winners.path().read_text())
    ((here, kept),) = rows.items()
    row = kept[winners.key(*SHAPE)]
    rows[here] = {winners.key(*SHAPE): None if change is None else row | change}
    winners.path().write_text(json.dumps(rows))
    assert launches.tile_of(*SHAPE, CPU) != WINNER


def test_winners_of_other_sources_or_torn_files_are_passed_over(monkeypatch):
    winners.store(CPU, {winners.key(*SHAPE): WINNER})
    monkeypatch.setattr(winners, "identity", lambda device: "another")
    assert launches.tile_of(*SHAPE, CPU) != WINNER
    winners.path().write_text("{")
    fresh()
    assert launches.tile_of(*SHAPE, CPU) != WINNER
    assert "kernels" in identity.identity(CPU)


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
