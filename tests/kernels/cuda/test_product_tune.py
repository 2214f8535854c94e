"""Measured tiles of the compiled product: timed by ``tune`` with planted times, kept, launched."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from fused_lora import cli
from fused_lora.bench import tune as command
from fused_lora.kernels.cuda import lora_extended as compiled
from fused_lora.kernels.cuda import lora_linear as room
from fused_lora.kernels.cuda.lora_extended import CLUSTERS, PING_PONG, ProductTile
from fused_lora.kernels.triton import available, launches
from fused_lora.ops.backends import why_not_product_behind
from fused_lora.programs import run
from fused_lora.types import Backend, Impl
from fused_lora.verify import launch_checks

from .serving import Served, forget, one_element, served  # noqa: F401
from .test_dispatch import BF16, CPU, Layer, keeps_the_yardstick, plan
from .test_product_dispatch import hopper  # noqa: F401

M, N, K = 136, 40, 72  # rows for two blocks of a cluster
SMALL, LARGE, PAIR = ProductTile(64, 128), ProductTile(128, 128), CLUSTERS[0]
TURNS = PING_PONG[0]
SHAPES = ((21, 40, 72, "rows"), (21, 72, 40, "columns"))  # of y and dx of test_dispatch's problem


@pytest.fixture
def rule(hopper, monkeypatch) -> ProductTile:  # noqa: F811
    """The tile that serves M rows where nothing was measured; PAIR and TURNS are there too."""
    monkeypatch.setattr(compiled, "TILES", (SMALL, LARGE, PAIR, TURNS))
    assert tiles_now() == {SMALL}
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == LARGE
    return LARGE


class Clock:
    """The time of a step is that of the tile whose plan it launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = {PAIR: 1.0}  # of the other tiles 2.0
        self.launched: list[ProductTile] = []
        self.seconds = 0.0
        right = compiled._plan

        def watched(*args, **options):
            found = right(*args, **options)
            self.launched.append(ProductTile.of(found))
            return found

        monkeypatch.setattr(compiled, "_plan", watched)

    def now(self) -> float:
        self.seconds += 1.0
        return self.seconds

    def measure_ms(self, step) -> float:
        step()
        return self.ms.get(self.launched[-1], 2.0)


@pytest.fixture
def clock(rule, monkeypatch) -> Clock:
    made = Clock(monkeypatch)
    monkeypatch.setattr(command, "clock_for", lambda device: made)
    monkeypatch.setattr(room, "why_not", lambda device: None)
    monkeypatch.setattr(available, "why_not", lambda device, dtype: "there is no Triton here")
    return made


def tune(*more: str) -> int:
    words = ("--shapes", f"{M}x{K}x{N}", "--rank", "8", "--device", "cpu", *more)
    return cli.main(["tune", *words, "--budget-seconds", "1"])


def kept() -> dict[str, dict[str, object]]:
    ((_, rows),) = json.loads(compiled.path().read_text()).items()
    return rows


def plant(rows: dict[str, object]) -> None:
    """``rows`` on disk, for a process that begins."""
    compiled.store(CPU, {"y bfloat16 1x8x8": PAIR})
    ((here, _),) = json.loads(compiled.path().read_text()).items()
    compiled.path().write_text(json.dumps({here: rows}))
    forget()


def test_the_fastest_tile_is_kept_and_launched(rule, clock, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    assert tune() == 0
    said = capsys.readouterr().out
    assert f"lora_linear y bfloat16 {M}x{N}x{K}" in said and "128 x 128, 2 blocks" in said
    assert f"2.00x of {rule}" in said and "not timed: there is no Triton here" in said
    tile = {"rows": 128, "columns": 128, "cluster": 2, "ping_pong": False}
    assert kept() == {f"y bfloat16 {M}x{N}x{K}": tile, f"dx bfloat16 {M}x{K}x{N}": tile}
    assert compiled.path() == launches.path()  # beside the others
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == rule  # this process has begun with it
    forget()
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == PAIR
    assert compiled.tile_of(M, K, N, 8, BF16, CPU, "columns") == PAIR
    assert compiled.tile_of(M, K, N, 8, BF16, CPU).cluster == 1  # of a y none was measured
    assert compiled.tile_of(M, N, K, 8, torch.float16, CPU).cluster == 1


def test_consumers_in_ping_pong_are_timed_and_kept_too(rule, clock, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    clock.ms = {TURNS: 1.0}
    assert tune() == 0
    assert "64 x 256, ping-pong" in capsys.readouterr().out
    assert kept()[compiled.key(M, N, K, BF16)] == {
        **dict(rows=64, columns=256, cluster=1), "ping_pong": True
    }  # fmt: skip
    forget()
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == TURNS
    clock.launched.clear()
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "1")
    keeps_the_yardstick(Layer(m=M), "cuda")
    assert set(clock.launched) == {TURNS}


def test_a_program_takes_it_when_it_is_built_and_asks_nobody_then(rule, clock, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "1")
    assert tune() == 0
    forget()
    clock.launched.clear()
    keeps_the_yardstick(Layer(m=M), "cuda")
    assert clock.launched and set(clock.launched) == {PAIR}
    monkeypatch.setattr(compiled, "winner", None)
    monkeypatch.setattr(compiled, "_plan", None)
    keeps_the_yardstick(Layer(m=M), "cuda")
    run.forget()
    with pytest.raises(TypeError):
        keeps_the_yardstick(Layer(m=M), "cuda")


def test_what_is_as_fast_is_not_kept(clock, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    clock.ms = {PAIR: 1.99}
    assert tune() == 0
    assert "1.01x of" in capsys.readouterr().out and not compiled.path().exists()


def test_a_wrong_tile_cannot_win(clock, monkeypatch):
    right = launch_checks.run_product

    def broken(p, behind, tile):
        named = right(p, behind, tile)
        return named | {"y": one_element(named["y"])} if tile == PAIR else named

    monkeypatch.setattr(launch_checks, "run_product", broken)
    with pytest.warns(RuntimeWarning, match="128 x 128, 2 blocks"):
        assert tune() == 0
    assert not compiled.path().exists()


def test_sizes_that_the_product_does_not_take_are_said(clock, capsys):
    assert cli.main(["tune", "--shapes", "9x70x40", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "9x40x70: the compiled product is not timed: w (40, 70) must have sizes that" in said


@pytest.mark.parametrize("dtype, why", [("fp32", "for 16 bits, got torch.float32"), ("bf16", "no")])
def test_where_neither_is_there_both_reasons_are_said(clock, monkeypatch, capsys, dtype, why):
    monkeypatch.setattr(room, "why_not", lambda device: "no Hopper")
    assert tune("--dtype", dtype) == 2
    said = capsys.readouterr().err
    assert "nothing to tune here: there is no Triton here; " in said and why in said


@pytest.mark.parametrize(
    "row",
    [
        None, 3, [], PAIR._asdict() | {"rows": 96}, {"rows": 128, "columns": 128, "cluster": 2},
        PAIR._asdict() | {"rows": "128"}, PAIR._asdict() | {"cluster": 4},
        PAIR._asdict() | {"stages": 3}, PAIR._asdict() | {"ping_pong": True},
    ],
    ids=str,
)  # fmt: skip
def test_odd_rows_are_passed_over(rule, row):
    name = compiled.key(M, N, K, BF16)
    plant({name: row, "dx": 5})
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == rule
    plant({name: PAIR._asdict(), "dx": row})
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == PAIR


@pytest.mark.parametrize("text", ["{", "[]", '{"compiled tiles 1|cpu": 3}'])
def test_torn_files_are_passed_over(rule, text):
    compiled.path().write_text(text)
    forget()
    assert compiled.tile_of(M, N, K, 8, BF16, CPU) == rule


def test_winners_of_another_build_are_passed_over(rule, monkeypatch, tmp_path):
    plant({compiled.key(M, N, K, BF16): PAIR._asdict()})
    module = tmp_path / "_native.so"
    module.write_text("another")
    monkeypatch.setattr(compiled.native, "load", lambda: SimpleNamespace(__file__=module))
    assert compiled._winners(CPU) == {}


def winners() -> dict[str, object]:
    """PAIR for y and dx."""
    return {compiled.key(*size, BF16, right): PAIR._asdict() for *size, right in SHAPES}


def broken_where(monkeypatch: pytest.MonkeyPatch, epilogue: str) -> None:
    right = launch_checks.run_product

    def check(p, behind, tile):
        named = right(p, behind, tile)
        wrong = tile == PAIR and behind == epilogue
        return {name: one_element(t) if wrong else t for name, t in named.items()}

    monkeypatch.setattr(launch_checks, "run_product", check)


def tiles_now() -> set[ProductTile]:
    return {compiled.tile_of(*size, 13, BF16, CPU, right) for *size, right in SHAPES}


def test_a_winner_is_checked_before_it_serves(rule, monkeypatch):
    plant(winners())
    checked = []
    right = launch_checks.run_product
    monkeypatch.setattr(
        launch_checks, "run_product", lambda *a, **o: checked.append(o["tile"]) or right(*a, **o)
    )
    assert plan(Impl.CUDA).backend is Backend.CUDA
    assert set(checked) == {PAIR} == tiles_now()


def test_a_wrong_winner_is_passed_over_and_the_rule_s_tile_serves(rule, monkeypatch):
    plant(winners())
    broken_where(monkeypatch, "")
    with pytest.warns(RuntimeWarning, match="128 x 128, 2 blocks"):
        chosen = plan(Impl.CUDA)
    assert chosen.backend is Backend.CUDA and tiles_now() == {SMALL}
    keeps_the_yardstick(Layer(), "cuda")
    forget()  # a later process knows the verdict from the disk
    assert plan(Impl.CUDA) == chosen and tiles_now() == {SMALL}


def test_a_winner_that_is_wrong_with_an_epilogue_alone_is_passed_over_there(rule, monkeypatch):
    plant(winners())
    broken_where(monkeypatch, "gelu")
    assert plan(Impl.CUDA).backend is Backend.CUDA and tiles_now() == {PAIR}
    with pytest.warns(RuntimeWarning, match="lora_linear_gelu .128 x 128, 2 blocks"):
        assert why_not_product_behind(SHAPES[0][:3], 13, "gelu", BF16, CPU) is None
    assert tiles_now() == {SMALL}


def test_a_wrong_tile_by_rule_is_no_winner_to_pass_over(rule):
    assert not compiled.pass_over(SMALL, BF16, CPU)
    plant(winners())
    assert not compiled.pass_over(SMALL, BF16, CPU)
    assert compiled.pass_over(PAIR, BF16, CPU) and not compiled.pass_over(PAIR, BF16, CPU)
