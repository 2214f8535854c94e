"""fused-lora tune on small tiles: what wins is kept, and the next process launches it."""

from functools import partial

import pytest
import torch

from fused_lora import cli
from fused_lora.bench import tune as command
from fused_lora.bench.tune import launched
from fused_lora.kernels.triton import launches
from fused_lora.kernels.triton.tiles import GradTile, ThinTile, Tile
from fused_lora.verify import launch_checks, verdicts
from fused_lora.verify.check import equations
from tests.kernels.triton.interpreted.serving import serving  # noqa: F401
from tests.verify.conftest import RESULTS

CPU = torch.device("cpu")
TILES = {
    "extended": [Tile(64, 64, 64, 3, 4), Tile(32, 32, 32, 2, 4)],
    "one_pass": [Tile(64, 64, 64, 3, 8), Tile(32, 32, 32, 2, 4)],
    "shrink": [ThinTile(64, 16, 64, 4, 4)],
    "grad": [GradTile(16, 128, 64, 4, 4)],
}


class Clock:
    """The time of a step is that of the tile it was run in."""

    def __init__(self):
        self.last, self.seconds = None, 0.0

    def now(self):
        self.seconds += 0.01
        return self.seconds

    def measure_ms(self, step):
        step()
        return float(self.last.block_m)


@pytest.fixture
def tuning(serving, monkeypatch):  # noqa: F811
    clock = Clock()
    every = [launches.Launch(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles]
    monkeypatch.setattr(command, "every_launch", lambda dtype, device: every)
    monkeypatch.setattr(command, "clock_for", lambda device: clock)
    whole = command._step
    monkeypatch.setattr(
        command,
        "_step",
        lambda job, launch: lambda: setattr(clock, "last", launch.tile) or whole(job, launch)(),
    )
    fresh()
    yield monkeypatch
    fresh()


def fresh():
    launches._winners.cache_clear()
    launches.tile_of.cache_clear()


def tune():
    shape = ["--shapes", "33x24x32", "--rank", "4", "--device", "cpu"]
    return cli.main(["tune", *shape, "--budget-seconds", "0.001"])


def test_the_fastest_tile_is_kept_and_launched(tuning, capsys):
    shape = (33, 32, 24, torch.bfloat16, CPU)
    before = launches.tile_of("extended", *shape)
    tuning.setitem(TILES, "extended", [before, Tile(32, 32, 32, 2, 4)])
    every = [launches.Launch(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles]
    tuning.setattr(command, "every_launch", lambda dtype, device: every)
    assert tune() == 0
    assert "extended bfloat16 33x32x24" in capsys.readouterr().out
    assert launches.tile_of("extended", *shape) is before  # this process has begun with it
    fresh()
    assert launches.tile_of("extended", *shape) == Tile(32, 32, 32, 2, 4)
    assert launches.tile_of("extended", 34, 32, 24, torch.bfloat16, CPU) == before


def test_a_wrong_tile_cannot_win(tuning):
    def run(p, tile, names):
        right = equations(p.to(p.x.dtype))
        return {name: right[name] * (tile.block_m != 32) for name in names}

    tuning.setenv("FUSED_LORA_VERIFY", "first")
    for kernel, names in RESULTS.items():
        tuning.setitem(launch_checks.RUNS, kernel, partial(run, names=names))
    tuning.setattr(command, "launched", lambda *asked: [only("extended", *asked)])
    with pytest.warns(RuntimeWarning, match="triton extended .32x32x32"):
        tune()
    fresh()
    assert not launches._winners(CPU)
    assert verdicts.path().exists()


def only(kernel, *asked):
    return next(job for job in launched(*asked) if job.kernel == kernel)
