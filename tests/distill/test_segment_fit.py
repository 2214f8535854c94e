"""ConvLoRA in the loop: fused against naive, step for step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.distill import copy_layers
from fused_lora.distill.convolutions import adapt_convolutions, hold_statistics
from fused_lora.distill.stack import stacks_of
from fused_lora.nn.child_adapters import FusedLoRAConv2d
from fused_lora.testing.yardstick import in_every_order, judge
from tests.distill.runs import fit_of
from tests.distill.unets import unet


class NaiveConv(nn.Module):
    """Three convolutions: the frozen one, down to the rank, and up again."""

    def __init__(self, conv: nn.Conv2d, like: FusedLoRAConv2d) -> None:
        super().__init__()
        self.conv, self.scale = conv, like.scale
        size = (like.rank, *conv.weight.shape[1:])
        self.down = nn.Parameter(like.lora_A.detach().clone().view(size))  # [R, C, kh, kw]
        self.up = nn.Parameter(like.lora_B.detach().clone()[:, :, None, None])  # [N, R, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.down, None, self.conv.stride, self.conv.padding)
        return self.conv(x) + self.scale * F.conv2d(h, self.up)


def fused_of(teacher: nn.Module) -> nn.Module:
    student = copy_layers(teacher, 2)
    adapt_convolutions(student, [stack.name for stack in stacks_of(student)], 3, seed=5)
    return student


def naive_of(teacher: nn.Module, like: nn.Module) -> nn.Module:
    """Naive ConvLoRA that starts where ``like`` does."""
    student = copy_layers(teacher, 2)
    for name, theirs in like.named_modules():
        if isinstance(theirs, FusedLoRAConv2d):
            home, _, leaf = name.rpartition(".")
            conv = student.get_submodule(name)
            setattr(student.get_submodule(home), leaf, NaiveConv(conv, theirs))
    hold_statistics(student)
    return student


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_fused_learns_what_naive_learns_step_for_step(precision: str) -> None:
    teacher = unet()
    fused = fused_of(teacher)
    naive = naive_of(teacher, fused)
    exact_teacher = copy.deepcopy(teacher).double()
    exact = naive_of(exact_teacher, fused)

    def losses(teacher: nn.Module, student: nn.Module, precision: str) -> torch.Tensor:
        fit = fit_of(teacher, student, precision, blocks="stages")
        fit.run()
        return torch.tensor(fit.losses, dtype=torch.float64)

    truth, ours = losses(exact_teacher, exact, "fp64"), losses(teacher, fused, precision)
    plain = in_every_order(lambda: losses(teacher, copy.deepcopy(naive), precision))
    assert truth[-1] < 0.9 * truth[0]  # it learns
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for step in range(1, len(truth) + 1):
        mine, right, *theirs = (run[:step] for run in (ours, truth, *plain))
        verdict = judge(f"loss {step}", mine, theirs, right, dtype)
        assert verdict.passed, verdict
