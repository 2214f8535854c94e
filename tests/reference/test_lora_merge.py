"""The merge equation."""

from __future__ import annotations

import pytest
import torch

from fused_lora.reference.lora_merge import merge


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype) for shape in [(5, 7), (3, 7), (5, 3)])


def test_float64_is_the_equation() -> None:
    w, a, b = operands(torch.float64)
    assert torch.equal(merge(w, a, b, 0.5), w + 0.5 * (b @ a))


def test_rounds_once() -> None:
    w, a, b = operands(torch.bfloat16)
    wide = w.float() + 0.5 * (b.float() @ a.float())
    assert torch.equal(merge(w, a, b, 0.5), wide.bfloat16())


def test_stochastic_keeps_the_mean_that_nearest_loses() -> None:
    w, a, b = torch.ones(256, 256), torch.full((1, 256), 2.0**-11), torch.ones(256, 1)
    w = w.bfloat16()
    assert torch.equal(merge(w, a, b), w)
    mean = merge(w, a, b, rounding="stochastic").double().mean().item()
    assert mean - 1 == pytest.approx(2.0**-11, rel=0.1)


def test_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="upwards"):
        merge(*operands(torch.bfloat16), rounding="upwards")
