"""The WeCoLoRA step: every method adapts half of the teacher, which stays as it is."""

from __future__ import annotations

import pytest
import torch

import fused_lora.bench.methods
import fused_lora.bench.suites  # noqa: F401
from fused_lora.bench import correctness_gate
from fused_lora.bench.correctness_gate import Gate, install
from fused_lora.bench.registry import METHODS, SUITES
from fused_lora.bench.runner import step_of
from fused_lora.bench.shapes import ModelShape
from fused_lora.bench.workload import share


@pytest.mark.parametrize("dtype", ["fp32", "amp"])
def test_methods_agree_and_leave_the_teacher_alone(dtype: str) -> None:
    shape = ModelShape("vit_tiny_patch16_224", 192, 197)
    workload = SUITES["wecolora_step"](shape, 1, dtype, "cpu")
    before = {name: value.clone() for name, value in workload.teacher.state_dict().items()}
    assert len(workload.base.blocks) == 6 and len(workload.teacher.blocks) == 12
    gate = Gate(workload, rank=4)
    for name in ("naive", "peft", "fused"):
        model = install(METHODS[name], share(workload.base), 4)
        found, yardstick = gate.errors(METHODS[name], model)
        assert set(found) == {"y", "da", "db"}
        assert not correctness_gate.complaints(found, yardstick, dtype)
        step_of(workload, model)()
    after = workload.teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
