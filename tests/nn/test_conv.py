"""FusedLoRAConv2d: the equation, its gradients, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora.nn.child_adapters import FusedLoRAConv2d
from fused_lora.testing.yardstick import in_every_order, judge

SHAPES = [
    {"stride": 1},
    {"stride": 2, "padding": 1},
    {"groups": 2, "bias": False},
    {"dilation": 2, "padding": "same"},
    {"groups": 6, "stride": (2, 1), "padding_mode": "circular", "padding": 1},
]


def adapted(dtype: torch.dtype = torch.float64, **options) -> tuple[FusedLoRAConv2d, torch.Tensor]:
    conv = nn.Conv2d(6, 12, (3, 2) if "padding" not in options else 3, dtype=dtype, **options)
    weight = conv.weight
    conv = FusedLoRAConv2d.adopt(conv, 4, scale=0.5)
    nn.init.normal_(conv.lora_B)
    assert conv.weight is weight and not weight.requires_grad
    return conv, weight


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_is_the_low_rank_convolution_beside_the_frozen_one(options: dict) -> None:
    conv, weight = adapted(**options)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    frozen = conv._conv_forward(x, weight, conv.bias)
    low = (conv.lora_B @ conv.lora_A).view_as(weight)
    beside = conv._conv_forward(x, low, None)
    assert torch.allclose(conv(x), frozen + 0.5 * beside)


def test_gradients() -> None:
    conv, _ = adapted(stride=2, padding=1, groups=2)
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(call, (x, conv.lora_A, conv.lora_B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_worse_than_two_convolutions(dtype: torch.dtype) -> None:
    conv, weight = adapted(padding=1)
    x = torch.randn(2, 6, 14, 14, dtype=torch.float64)
    small = (conv.lora_A.to(dtype), conv.lora_B.to(dtype), weight.to(dtype), conv.bias.to(dtype))
    a, b, w, bias = small
    truth = F.conv2d(
        x.to(dtype).double(),
        w.double() + 0.5 * (b.double() @ a.double()).view_as(w),
        bias.double(),
        padding=1,
    )

    def two_convolutions() -> torch.Tensor:
        h = F.conv2d(x.to(dtype), a.view(4, 6, 3, 3), padding=1)
        return F.conv2d(x.to(dtype), w, bias, padding=1) + 0.5 * F.conv2d(h, b[:, :, None, None])

    plain = [y.detach() for y in in_every_order(two_convolutions)]
    other = FusedLoRAConv2d.adopt(nn.Conv2d(6, 12, 3, padding=1, dtype=dtype), 4, scale=0.5)
    own = (other.lora_A, other.lora_B, other.weight, other.bias)
    with torch.no_grad():
        for mine, value in zip(own, small, strict=True):
            mine.copy_(value)
        y = other(x.to(dtype))
    verdict = judge("y", y, plain, truth.detach(), dtype)
    assert verdict.passed, verdict


def test_the_way_back_and_checkpoints() -> None:
    conv, weight = adapted(padding=1)
    x = torch.randn(1, 6, 8, 8, dtype=torch.float64)
    y, before = conv(x), weight.clone()
    vanilla = nn.Conv2d(6, 12, 3, dtype=torch.float64).state_dict()
    conv.load_state_dict(conv.state_dict())
    other, _ = adapted(padding=1)
    other.load_state_dict(vanilla)  # strictly, without adapters
    with pytest.raises(RuntimeError, match="lora_B"):
        other.load_state_dict(vanilla | {"lora_A": other.lora_A})
    assert "rank=4, scale=0.5" in repr(conv)
    plain = conv.release(merge=True)
    assert type(plain) is nn.Conv2d and torch.allclose(plain(x), y)
    assert torch.equal(weight, before) and plain.weight is not weight
    assert set(plain.state_dict()) == {"weight", "bias"}
    back, same = adapted(padding=1)
    assert back.release().weight is same


def test_refuses() -> None:
    with pytest.raises(TypeError, match="plain torch.nn.Conv2d, got Conv1d"):
        FusedLoRAConv2d.adopt(nn.Conv1d(2, 2, 1), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got FusedLoRAConv2d"):
        FusedLoRAConv2d.adopt(adapted()[0], 1)
    with pytest.raises(ValueError, match=r"rank 5 is above .* = min\(8, 4\)"):
        FusedLoRAConv2d.adopt(nn.Conv2d(4, 8, 1), 5)
    with pytest.raises(ValueError, match="rank must be a whole number from 1 on, got 0"):
        FusedLoRAConv2d.adopt(nn.Conv2d(4, 8, 1), 0)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        FusedLoRAConv2d.adopt(nn.Conv2d(4, 8, 1), 1, scale=float("nan"))
