"""The least time of a step, and the ways to time one that a GPU alone has."""

from pathlib import Path

import pytest
import torch

from fused_lora.bench import main
from fused_lora.bench.clock import FLOOD_BYTES, CpuClock, CudaClock, clock_for, recorded
from fused_lora.bench.options import chosen, parser
from fused_lora.bench.roofline import Linear, Roof, measured
from fused_lora.bench.rows import Row, read
from fused_lora.bench.shapes import SHAPES, ModelShape
from fused_lora.bench.suites.six_projections import SixProjections
from fused_lora.bench.table import ratio_rows
from tests.bench.samples import row


def test_the_roof_is_the_higher_of_products_and_bytes():
    linear = Linear(25216, 768, 768, 16)
    assert linear.flops == 2 * 2 * 25216 * 768 * 768 + 6 * 25216 * 16 * 1536
    assert linear.elements() == 25216 * 5 * 768 + 2 * 768 * 768
    narrow, slow = Roof(790_000, 1e9), Roof(1e12, 4_300)
    assert narrow.least_ms([linear], 2) == pytest.approx(linear.flops / 790_000e6)
    assert slow.least_ms([linear, linear], 2) == pytest.approx(4 * linear.elements() / 4_300e6)


def test_each_adapter_of_a_fused_qkv_expands_into_its_own_third():
    found = SixProjections(ModelShape("tiny", 24, 5), 2, "fp32", "cpu").linears(4)
    assert found[0] == Linear(10, 24, 72, 12, 3)
    assert found[0].flops == 4 * 10 * 24 * 72 + 6 * 10 * 12 * (24 + 24)
    assert [(each.k, each.n, each.rank) for each in found[1:]] == [
        (24, 24, 4), (24, 96, 4), (96, 24, 4),
    ]  # fmt: skip


def test_a_measured_roof_is_plausible(monkeypatch):
    monkeypatch.setattr("fused_lora.bench.roofline.PEAK_SIZE", {"cpu": 256})
    monkeypatch.setattr("fused_lora.bench.roofline.COPY_BYTES", {"cpu": 1 << 20})
    roof = measured("cpu", torch.float32, CpuClock())
    assert 0.1 < roof.peak_gflops < 1e6 and 0.1 < roof.bandwidth_gbs < 1e5


def test_rows_carry_their_roof(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "vit_small_patch16_224", ModelShape("tiny", 24, 5))
    monkeypatch.setattr("fused_lora.bench.correctness_gate.limit", lambda naive, dtype: 1.0)
    argv = ["--suite", "six_projections", "--models", "vit_small_patch16_224", "--ranks", "2"]
    argv += ["--batch", "2", "--methods", "frozen,naive", "--budget-seconds", "0.1"]
    argv += ["--device", "cpu", "--out", str(tmp_path / "r.html"), "--rows", str(tmp_path)]
    assert main(argv) == 0
    found = list(read(tmp_path))
    assert len({each.roofline_ms for each in found}) == 1 and found[0].roofline_ms > 0
    assert all(each.case.mode == "eager" and each.case.cache == "warm" for each in found)
    assert "x roofline" in capsys.readouterr().out


def test_rows_of_before_are_read():
    import json

    fields = json.loads(row().to_json())
    del fields["roofline_ms"], fields["case"]["mode"], fields["case"]["cache"]
    assert Row.from_json(json.dumps(fields)) == row()


def test_the_readme_compares_eager_runs_on_a_warm_cache_alone():
    from dataclasses import replace

    cold = row(case=replace(row().case, cache="cold"))
    assert len(ratio_rows([row(), cold])) == 1


@pytest.mark.parametrize("argv", [["--mode", "graph"], ["--cache", "cold"]])
def test_graphs_and_cold_caches_are_a_gpus(argv, capsys):
    with pytest.raises(SystemExit):
        main(["--suite", "six_projections", "--device", "cpu", *argv])
    assert "a GPU's, got --device cpu" in capsys.readouterr().err


def test_only_a_suite_without_an_optimizer_is_recorded():
    options = parser().parse_args(["--device", "cpu", "--mode", "graph"])
    options.device = "cuda"
    with pytest.raises(ValueError, match="only six_projections is recorded"):
        chosen(options)


@pytest.mark.gpu
def test_a_recorded_step_is_replayed():
    x, y = torch.ones(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
    replay = recorded(lambda: y.add_(x))
    before = float(y[0, 0])
    replay()
    torch.cuda.synchronize()
    assert float(y[0, 0]) == before + 1


@pytest.mark.gpu
def test_a_cold_clock_floods_the_cache_before_it_starts():
    clock = CudaClock(cold=True)
    clock._flood.fill_(1)
    assert clock.measure_ms(lambda: None) >= 0
    assert not clock._flood.any() and clock._flood.numel() == FLOOD_BYTES


def test_a_cpu_has_one_clock():
    assert type(clock_for("cpu", cold=True)) is CpuClock
