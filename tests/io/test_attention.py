"""torch's MultiheadAttention in adapter folders: PEFT's one adapter, our two projections."""

import pytest
import torch

import fused_lora
from fused_lora.io.keys import AdapterFileError

peft = pytest.importorskip("peft")
torchvision = pytest.importorskip("torchvision")


def plain():
    torch.manual_seed(1)
    model = torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=3).eval()
    torch.nn.init.normal_(model.heads[0].weight)
    return model


def patched(**options):
    model = plain()
    fused_lora.patch(model, **{"rank": 4} | options)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return model


def attention(model):
    return model.encoder.layers.encoder_layer_0.self_attention


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


CASES = [
    {},
    {"qkv": "joint"},
    {"rank_pattern": {"out": 16}},
    {"targets": ["out"]},
    {"targets": ["q", "v"]},
]


@pytest.mark.parametrize("options", CASES)
def test_to_peft_and_back(options, tmp_path):
    model, x = patched(**options), torch.randn(2, 3, 32, 32)
    fused_lora.save(model, tmp_path, trainable=False)
    theirs = attention(peft.PeftModel.from_pretrained(plain(), tmp_path).base_model.model)
    base, ours = theirs.base_layer, attention(model)
    merged = {
        "in_proj": base.in_proj_weight + theirs.get_delta_weight("default"),
        "out_proj": base.out_proj.base_layer.weight + base.out_proj.get_delta_weight("default")
        if "out_proj" in str(adapters(model).keys())
        else base.out_proj.base_layer.weight,
    }
    torch.testing.assert_close(merged["in_proj"], ours.in_proj_weight)
    torch.testing.assert_close(merged["out_proj"], ours.out_proj.weight)

    again = patched(**options)
    fused_lora.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    for name, p in adapters(model).items():
        assert torch.equal(again.get_parameter(name), p), name


def test_from_peft(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["self_attention", "mlp.0", "mlp.3"])
    theirs = peft.get_peft_model(plain(), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    model = plain()
    fused_lora.patch(model, rank=4, qkv="joint")
    fused_lora.load(model, tmp_path)
    wrapped = attention(theirs.base_model.model)
    expected = wrapped.base_layer.in_proj_weight + wrapped.get_delta_weight("default")
    torch.testing.assert_close(attention(model).in_proj_weight, expected)
    out = wrapped.base_layer.out_proj
    expected = out.base_layer.weight + out.get_delta_weight("default")
    torch.testing.assert_close(attention(model).out_proj.weight, expected)


def test_two_scales_have_no_place(tmp_path):
    model = patched(alpha=8, alpha_pattern={"out": 4})
    with pytest.raises(
        AdapterFileError,
        match=r"one scale for both projections .*2\.0.*1\.0",
    ):
        fused_lora.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_with_more_than_the_model_is_refused(tmp_path):
    fused_lora.save(patched(), tmp_path, trainable=False)
    model = patched(targets=["q", "k", "v", "fc1", "fc2"])
    before = {name: p.clone() for name, p in adapters(model).items()}
    with pytest.raises(AdapterFileError, match=r"no adapter at .*self_attention\.out_proj"):
        fused_lora.load(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in adapters(model).items())


def test_blocks_are_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="BdLora has no MultiheadAttention"):
        fused_lora.save(patched(), tmp_path, layout="blocks")
