"""A checkpoint loads strictly with all adapters or without any; never with some of them."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import fused_lora
from fused_lora.nn.child_adapters import FusedLoRAConv2d
from tests.patching.models import build, wake


def patched(**options):
    model = build()
    fused_lora.patch(model, rank=4, **options)
    return wake(model)


def torchvision_vit(**options):
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    fused_lora.patch(model, rank=4, **options)
    return wake(model)


@pytest.mark.parametrize("make", [patched, torchvision_vit])
@pytest.mark.parametrize(
    "saved",
    [{"targets": ["q", "k", "v"]}, {"targets": ["fc2"]}, {"layers": [1]}, {"layers": [0]}],
    ids=str,
)
def test_a_part_of_the_adapters_is_missing_the_rest(make, saved):
    part, whole = make(**saved).state_dict(), make()
    lacking = {k for k in whole.state_dict() if "lora_" in k and k not in part}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
        copy.deepcopy(whole).load_state_dict(part)
    found = whole.load_state_dict(part, strict=False)
    assert set(found.missing_keys) == lacking and len(lacking) >= 8
    assert not found.unexpected_keys


def test_adapters_of_modules_that_have_none_here():
    found = patched(targets=["fc1"]).load_state_dict(
        patched(targets=["q", "k", "v"]).state_dict(), strict=False
    )
    assert {key.rpartition(".")[0] for key in found.unexpected_keys} == {
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
    }
    assert set(found.missing_keys) == {
        f"blocks.{i}.mlp.fc1.lora_{half}" for i in range(2) for half in "AB"
    }


@pytest.mark.parametrize("make", [patched, torchvision_vit])
def test_all_or_none_load_strictly_in_any_order_of_loads(make):
    plain = {k: v for k, v in make().state_dict().items() if "lora_" not in k}
    model, whole = make(), make().state_dict()
    for state in (plain, whole, plain, plain, whole):
        assert not any(model.load_state_dict(state))
    one = {k: v for k, v in whole.items() if not k.endswith("lora_A")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(one)
    assert not any(model.load_state_dict(plain))
    assert not any(model.load_state_dict(whole, assign=True))


def test_a_convolution_beside_linears():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = FusedLoRAConv2d.adopt(nn.Conv2d(3, 8, 3), 2)
            self.linear = fused_lora.FusedLoRALinear(8, 8, rank=2)

    model = Both()
    whole = model.state_dict()
    plain = {k: v for k, v in whole.items() if "lora_" not in k}
    assert not any(model.load_state_dict(plain)) and not any(model.load_state_dict(whole))
    for part in ("conv", "linear"):
        state = {k: v for k, v in whole.items() if not k.startswith(f"{part}.lora_")}
        found = model.load_state_dict(state, strict=False)
        assert found.missing_keys == [f"{part}.lora_A", f"{part}.lora_B"]


def test_the_students_own_keys_are_none_of_the_load():
    state = torch.nn.Linear(8, 8).state_dict()
    assert not any(fused_lora.FusedLoRALinear(8, 8, rank=2).load_state_dict(state))
