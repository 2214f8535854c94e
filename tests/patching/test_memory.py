"""What a patched model keeps for backward: never more than naive LoRA, and no fp32 copy of x."""

import copy

import pytest
import torch

import fused_lora
from fused_lora.bench.methods import Naive
from fused_lora.bench.saved_tensors import SavedBytes, WideCopies
from tests.patching.models import build, images, wake


def kept_bytes(model, x, autocast):
    """Bytes the second block keeps, the weights of the model aside."""
    blocks = list(model.blocks)
    with (
        SavedBytes(model, [x], blocks) as saved,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = model(x)
    del y
    return saved.by_section["1"]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("rank", [4, 16, 48])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_block_keeps_no_more_than_naive_lora(rank, batch, autocast):
    base = build(qkv_bias=True).train().requires_grad_(False)
    x = images(base, batch)
    fused, naive = copy.deepcopy(base), Naive().install(copy.deepcopy(base), rank)
    fused_lora.patch(fused, rank=rank)
    assert kept_bytes(fused, x, autocast) <= kept_bytes(naive, x, autocast)


def test_autocast_makes_no_fp32_copy_of_x():
    model = build().train()
    fused_lora.patch(model, rank=4)
    wake(model)
    x = images(model, 4)
    with WideCopies(min_elements=4 * 17 * 48) as wide, torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.requires_grad
    assert wide.count == 0
