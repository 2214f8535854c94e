"""The persistent form agrees with the other, and knows what it can be given."""

import pytest
import torch

from fused_lora.kernels.triton import lora_extended
from fused_lora.testing.yardstick import error
from fused_lora.types import Span
from tests.kernels.triton.cases import BULK_TILE, DTYPES, TILE, Case, adapters, build
from tests.kernels.triton.guards import fenced

CASES = [
    Case("more tiles than programs, every edge ragged", 70, 40, 104, (Span(0, 104, 5),)),
    Case("qkv with a boundary inside a tile", 37, 48, 120, tuple(
        Span(40 * g, 40 * g + 40, 24) for g in range(3)
    )),
    Case("less than a tile", 3, 16, 8, (Span(0, 8, 1),), bias=False),
]  # fmt: skip
IDS = [case.why for case in CASES]


def runs(p, tile):
    """Forward and dx under every kind of epilogue."""
    group, u = adapters(p), p.x.flip(0).contiguous()
    epilogue = {"factor": p.w[:, 0].contiguous(), "residual": p.dy}
    forward = lora_extended.forward
    light = forward(p.x, p.w, p.bias, group, tile=tile)
    yield "y", light.y
    yield "u", forward(p.x, p.w, p.bias, group, "tanh", light.h, tile).u
    yield "LayerScale", forward(p.x, p.w, p.bias, group, "tanh", light.h, tile, **epilogue).y
    yield "dx", lora_extended.input_grad(p.dy, p.w, group, tile=tile)[0]
    slope = {"activation": "erf", "u": u}
    yield "du", lora_extended.input_grad(p.dy, p.w, group, tile=tile, **slope)[0]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_products(case, dtype, monkeypatch):
    """The sum over a K step may be formed in another order: one rounding apart at most."""
    p = build(case, dtype, torch.float32)
    with fenced(monkeypatch):
        for (name, one), (_, other) in zip(runs(p, TILE), runs(p, BULK_TILE), strict=True):
            assert error(other, one.double()) <= torch.finfo(dtype).eps, name


def test_w_along_either_dimension():
    p = build(CASES[0], torch.float16, torch.float32)
    once = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=BULK_TILE).y
    w = p.w.t().contiguous().t()
    again = lora_extended.forward(p.x, w, p.bias, adapters(p), tile=BULK_TILE).y
    assert torch.equal(once, again)


def test_what_a_descriptor_needs():
    whole = torch.zeros(64, 64).half()
    assert lora_extended.describable(whole, whole.t(), whole[:, :8], whole[8:, 16:])
    assert not lora_extended.describable(whole, whole[:, 1:]), "starts at 2 bytes"
    assert not lora_extended.describable(torch.zeros(64, 12).half()), "rows of 24 bytes"
    assert not lora_extended.describable(whole[:, ::2]), "contiguous neither way"
    assert not lora_extended.describable(whole[:, :0]), "nothing in it"
