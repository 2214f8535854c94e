"""Files that adapt more than the model does, or in other bits: named, and served when asked for."""

import copy

import peft
import pytest
import torch

import fused_lora
from fused_lora import AdapterFileError

MIGRATING = ["qkv", "proj", "fc1", "fc2"]  # of docs/migrating.md; hits patch_embed.proj too


def by_peft(model, folder, noise=0.05, **options):
    """PEFT's model of ``options`` with all its adapters off zero, saved."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or (parameter.requires_grad and "lora_" not in name):
                parameter.add_(noise * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


def without(theirs, name):
    """PEFT's model with the adapter at ``name`` taken back to nothing."""
    with torch.no_grad():
        theirs.get_submodule(f"base_model.model.{name}").lora_B["default"].weight.zero_()
    return theirs


def test_a_convolution_is_named_and_left_out_when_asked(vit, image, tmp_path):
    theirs = by_peft(vit(), tmp_path, target_modules=MIGRATING)
    model = vit()
    fused_lora.patch(model, rank=4, alpha=8, qkv="joint")
    before = model(image)
    message = (
        r"the file adapts patch_embed\.proj \(a Conv2d\), which the model was not patched for: "
        r"patch the model as it was.*leave_out=\['patch_embed\.proj'\]"
    )
    with pytest.raises(AdapterFileError, match=message):
        fused_lora.load(model, tmp_path)
    assert torch.equal(model(image), before)
    fused_lora.load(model, tmp_path, leave_out=["patch_embed.proj"])
    torch.testing.assert_close(
        model(image), without(theirs, "patch_embed.proj")(image), rtol=1e-4, atol=1e-5
    )


def test_patched_as_it_was_nothing_is_left_out(vit, image, tmp_path):
    theirs = by_peft(vit(), tmp_path, target_modules=MIGRATING)
    model = vit()
    report = fused_lora.patch(model, peft.LoraConfig.from_pretrained(tmp_path))
    assert not report.left_alone
    fused_lora.load(model, tmp_path)
    torch.testing.assert_close(model(image), theirs(image), rtol=1e-4, atol=1e-5)


def test_a_head_is_named_with_its_cure(vit, image, tmp_path):
    theirs = by_peft(vit(), tmp_path, target_modules=["qkv", "head"])
    model = vit()
    fused_lora.patch(model, rank=4, targets=["q", "k", "v"], qkv="joint")
    with pytest.raises(AdapterFileError, match=r"head \(a Linear\).*LoraConfig.from_pretrained"):
        fused_lora.load(model, tmp_path)
    fused_lora.load(model, tmp_path, leave_out="^head$")
    y = model(image)
    fused_lora.unpatch(model)
    fused_lora.patch(model, peft.LoraConfig.from_pretrained(tmp_path))
    fused_lora.load(model, tmp_path)
    torch.testing.assert_close(model(image), theirs(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, without(theirs, "head")(image), rtol=1e-4, atol=1e-5)


def test_a_head_saved_whole_is_left_out(vit, image, tmp_path):
    by_peft(vit(), tmp_path, target_modules=["fc1"], modules_to_save=["head"])
    model = vit()
    fused_lora.patch(model, rank=4, targets="fc1")
    head = copy.deepcopy(model.head.weight)
    assert fused_lora.load(model, tmp_path, leave_out="^head") == []
    assert torch.equal(model.head.weight, head)
    assert fused_lora.load(model, tmp_path) == ["head.bias", "head.weight"]
    assert not torch.equal(model.head.weight, head)


def test_what_matches_nothing_is_refused(vit, tmp_path):
    by_peft(vit(), tmp_path, target_modules=["fc1"])
    model = vit()
    fused_lora.patch(model, rank=4, targets="fc1")
    with pytest.raises(AdapterFileError, match=r"leave_out: 'pool' matches nothing in the file"):
        fused_lora.load(model, tmp_path, leave_out=["pool"])
    with pytest.raises(AdapterFileError, match=r"leave_out: '\(' is no regular expression"):
        fused_lora.load(model, tmp_path, leave_out="(")
    with pytest.raises(AdapterFileError, match=r"missing .*blocks\.0\.mlp\.fc1"):
        fused_lora.load(model, tmp_path, leave_out=r"blocks\.0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_file_into_a_model_of_16_bits(vit, image, tmp_path, dtype):
    theirs = by_peft(vit(), tmp_path, target_modules=["fc1"], modules_to_save=["head"])
    model = vit().to(dtype)
    fused_lora.patch(model, peft.LoraConfig.from_pretrained(tmp_path))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        AdapterFileError, match=r"head\.\w+ is torch.float32.*\(and 1 more\): convert"
    ):
        fused_lora.load(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    fused_lora.load(model, tmp_path, allow_rounding=True)
    whole = theirs.base_model.model.head.modules_to_save["default"].weight
    assert torch.equal(model.head.weight, whole.to(dtype))
    a, _ = model.blocks[0].mlp.fc1.adapter()
    assert a.dtype is torch.float32  # the adapters stay to the bit
    assert torch.equal(a, theirs.base_model.model.blocks[0].mlp.fc1.lora_A["default"].weight)
    loose = {"rtol": 0.1, "atol": 0.1}  # 8 bits of mantissa through two blocks
    torch.testing.assert_close(model(image.to(dtype)).float(), theirs(image), **loose)
    twin.head.float()
    fused_lora.load(twin, tmp_path)
    assert torch.equal(twin.head.weight, whole)
    with torch.autocast("cpu", dtype):
        assert twin(image.to(dtype)).isfinite().all()


def test_adapters_of_16_bits_round_when_asked(vit, image, tmp_path):
    theirs = by_peft(vit(), tmp_path, target_modules=["fc1"])
    model = vit()
    fused_lora.patch(model, rank=4, targets="fc1", adapter_dtype=torch.bfloat16)
    with pytest.raises(AdapterFileError, match=r"patch with adapter_dtype=torch.float32, or round"):
        fused_lora.load(model, tmp_path)
    fused_lora.load(model, tmp_path, allow_rounding=True)
    a, _ = model.blocks[0].mlp.fc1.adapter()
    exact = theirs.base_model.model.blocks[0].mlp.fc1.lora_A["default"].weight
    assert torch.equal(a, exact.bfloat16())
