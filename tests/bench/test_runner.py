"""Whole cases on tiny layers: methods agree, wrong ones are refused, rows are complete."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fused_lora.bench.methods  # noqa: F401  registers them
from fused_lora.bench import correctness_gate
from fused_lora.bench.clock import Step
from fused_lora.bench.correctness_gate import Gate, install
from fused_lora.bench.methods import Naive
from fused_lora.bench.registry import METHODS, register
from fused_lora.bench.runner import Phases, time_methods
from fused_lora.bench.shapes import ModelShape
from fused_lora.bench.suites.six_projections import Projections, SixProjections
from fused_lora.bench.workload import adapters, projections, share
from tests.bench.samples import CASE, ORIGIN

TINY = ModelShape("tiny", 24, 5)  # odd rows, three heads' worth of columns
RANK = 3
ADAPTED = [c for c in METHODS.values() if c.form != "none" and c.why_not("fp32") is None]


class CountingClock:
    """Each step takes one millisecond."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def measure_ms(self, step: Step) -> float:
        step()
        self.seconds += 1e-3
        return 1.0


@pytest.fixture
def workload() -> SixProjections:
    return SixProjections(TINY, batch=2, dtype="fp32", device="cpu")


@pytest.fixture
def wrong() -> Iterator[str]:
    class Wrong(Naive):
        name, title = "wrong", "naive LoRA, v left out"

        def install(self, model: nn.Module, rank: int) -> nn.Module:
            model = super().install(model, rank)
            model.qkv.spans.pop("v")
            return model

    register(Wrong)
    yield "wrong"
    del METHODS["wrong"]


@pytest.mark.parametrize("method", ADAPTED, ids=lambda c: c.name)
def test_methods_agree_in_float64(method: object, workload: SixProjections) -> None:
    gate = Gate(workload, RANK)
    truth, _ = gate.of(method.form)
    model = install(method, share(workload.base), RANK).double()
    found = workload.outcome(model, gate.inputs(torch.float64), exact=True)
    assert set(found) == {"y", "dx", "da", "db"}
    assert max(correctness_gate.errors(found, truth).values()) < 1e-14


def test_no_gradient_of_a_contender_is_trivially_zero(workload: SixProjections) -> None:
    truth, _ = Gate(workload, RANK).of("separate")
    assert all(tensor.abs().max() > 0 for tensors in truth.values() for tensor in tensors)


def test_a_wrong_contender_is_refused(workload: SixProjections, wrong: str) -> None:
    entered = METHODS.pick(["frozen", "naive", wrong])
    rows, refusals = time_methods(workload, CASE, entered, Phases(CountingClock()), 0.0, ORIGIN)
    assert [row.method for row in rows] == ["frozen", "naive"]
    assert [refusal.method for refusal in refusals] == [wrong]
    assert "limit" in refusals[0].reason


def test_nan_never_passes() -> None:
    yardstick = {"y": 1.0}
    broken = correctness_gate.errors({"y": [torch.tensor([float("nan")])]}, {"y": [torch.ones(1)]})
    assert correctness_gate.complaints(broken, yardstick, "fp32")
    assert correctness_gate.complaints({"y": float("nan")}, yardstick, "fp32")


def test_limit_is_twice_naive_and_a_rounding() -> None:
    assert correctness_gate.complaints({"y": 2.0}, {"y": 1.0}, "fp32") == []
    assert correctness_gate.complaints({"y": 2.1}, {"y": 1.0}, "fp32")
    assert (
        correctness_gate.complaints({"y": torch.finfo(torch.bfloat16).eps}, {"y": 0.0}, "bf16")
        == []
    )


def test_rows_carry_ratios_and_memory(workload: SixProjections) -> None:
    entered = METHODS.pick(["frozen", "naive"])
    (frozen, naive), _ = time_methods(workload, CASE, entered, Phases(CountingClock()), 0.0, ORIGIN)
    assert (frozen.saved_bytes, frozen.errors, frozen.ratio_naive) == (0, {}, 1.0)
    inputs = sum(x.nbytes for x in workload.inputs)
    assert naive.saved_bytes == inputs + 4 * 2 * TINY.tokens * CASE.rank * 6  # x once, six h
    assert naive.rounds == 3 and naive.ratio_peft is None


def test_methods_share_the_base(workload: SixProjections) -> None:
    model = install(METHODS["naive"], share(workload.base), RANK)
    assert model.fc1.base.weight is workload.base.fc1.weight
    assert len(adapters(model)) == 12 and not adapters(workload.base)
    assert list(projections(Projections(24, 4))) == ["qkv", "proj", "fc1", "fc2"]


def test_timm_targets_by_structure() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=2)
    names = list(projections(model))
    assert len(names) == 8 and "blocks.1.attn.proj" in names
    assert not any("patch_embed" in name for name in names)
