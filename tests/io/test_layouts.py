"""BdLora's layout, names of other releases, and models whose weights are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_lora
from fused_lora.io.keys import translation
from fused_lora.testing.families import of_timm, of_torchvision, of_transformers
from tests.patching.models import wake

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
B = "base_model.model.blocks.0.attn.qkv.lora_B.weight"


def edit(folder, **changes):
    """Change the config, and drop what says that it was not."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    save_file(load_file(folder / TENSORS), folder / TENSORS)


class TestBlocks:
    def test_peft_reads_three_adapters_as_bdlora(self, vit, patched, image, tmp_path):
        model = patched(alpha=8)
        fused_lora.save(model, tmp_path / "ours", layout="blocks")
        assert load_file(tmp_path / "ours" / TENSORS)[B].shape == (144, 4)
        theirs = peft.PeftModel.from_pretrained(vit(), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(image), model(image), **CLOSE)
        theirs.save_pretrained(tmp_path / "theirs")
        other = patched(noise=0)
        fused_lora.load(other, tmp_path / "theirs")
        torch.testing.assert_close(other(image), model(image), **CLOSE)

    def test_bdlora_of_peft_loads_apart_or_joint(self, vit, patched, image, tmp_path):
        blocks = peft.BdLoraConfig(target_modules_bd_b=["qkv"], nblocks=3, match_strict=False)
        config = peft.LoraConfig(r=12, target_modules=["qkv", "fc1"], use_bdlora=blocks)
        theirs = peft.get_peft_model(vit(), config).eval()
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        theirs.save_pretrained(tmp_path)
        targets = ["q", "k", "v", "fc1"]
        apart = patched(targets=targets, rank_pattern={"fc1": 12})
        joint = patched(targets=targets, rank=12, qkv="joint")
        for model in (apart, joint):
            fused_lora.load(model, tmp_path)
            torch.testing.assert_close(model(image), theirs(image), **CLOSE)

    def test_round_trip_keeps_every_bit(self, patched, snapshot, same, tmp_path):
        model, other = patched(alpha=8), patched(noise=0)
        fused_lora.save(model, tmp_path, layout="blocks")
        fused_lora.load(other, tmp_path)
        assert same(other, snapshot(model))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"qkv": "joint"}, "no module has several adapters"),
            ({"targets": ("q", "v")}, "leave columns out"),
            ({"rank_pattern": {"q": 2}}, "differ in columns, rank or scale"),
        ],
    )
    def test_what_has_no_equal_blocks_is_refused(self, patched, tmp_path, options, message):
        with pytest.raises(fused_lora.AdapterFileError, match=message):
            fused_lora.save(patched(**options), tmp_path / "a", layout="blocks")
        assert not (tmp_path / "a").exists()

    def test_an_unknown_layout(self, patched, tmp_path):
        with pytest.raises(fused_lora.AdapterFileError, match=r"layout must be one of .*'sparse'"):
            fused_lora.save(patched(), tmp_path / "a", layout="sparse")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"target_modules_bd_a": ["proj"]}, r"has \['proj'\] in blocks of lora_A"),
            ({"nblocks": 0}, "use_bdlora cannot be read"),
            ({"nblocks": 5}, r"\(144, 4\) are not 5 equal blocks"),
            ({"nblocks": 2}, r"lora_B.weight has shape \(144, 8\), the model's has \(144, 12\)"),
            ({"shards": 2}, "use_bdlora is .* its fields are"),
        ],
    )
    def test_bad_configs(self, patched, snapshot, same, tmp_path, change, message):
        fused_lora.save(patched(), tmp_path, layout="blocks")
        noted = json.loads((tmp_path / CONFIG).read_text())["use_bdlora"]
        edit(tmp_path, use_bdlora=noted | change)
        model = patched(noise=0)
        before = snapshot(model)
        with pytest.raises(fused_lora.AdapterFileError, match=message):
            fused_lora.load(model, tmp_path)
        assert same(model, before)


OLD = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def test_names_of_transformers_4_load_into_5(tmp_path):
    torch.manual_seed(0)
    model, other = of_transformers.build("ViT"), of_transformers.build("ViT")
    for each in (model, other):
        fused_lora.patch(each, rank=2, rank_pattern={"fc1": 3}, alpha_pattern={"layers.1.*fc2": 7})
    wake(model)
    fused_lora.save(model, tmp_path)

    def older(name):
        for new, old in OLD.items():
            name = name.replace(f".{new}", f".{old}")
        return name.replace("layers.", "encoder.layer.")

    config = json.loads((tmp_path / CONFIG).read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {older("." + name)[1:]: value for name, value in config[key].items()}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / TENSORS)
    save_file({older(key): tensor for key, tensor in tensors.items()}, tmp_path / TENSORS)
    assert any(
        "encoder.layer.0.attention.attention.query" in k for k in load_file(tmp_path / TENSORS)
    )
    fused_lora.load(other, tmp_path)
    ours, theirs = (
        [
            half
            for _, m in fused_lora.patching.patch.adapted(each)
            for p in m.adapters()
            for half in p
        ]
        for each in (other, model)
    )
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_a_translation_is_whole_or_none():
    wanted = ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]
    found = [
        "encoder.layer.0.attention.attention.query",
        "encoder.layer.1.attention.attention.query",
    ]
    assert translation(found, wanted) == dict(zip(found, wanted, strict=True))
    assert not translation(found[:1], wanted)
    assert not translation([*found, "decoder.layer.0.attention.attention.query"], wanted)
    assert not translation(found, ["layers.0.attention.q_proj", "layers.0.self_attn.q_proj"])


READ = {"timm": (of_timm, "BEiT"), "torchvision": (of_torchvision, "ViT")}


@pytest.mark.parametrize("library", READ)
def test_adapters_in_read_weights_round_trip(library, tmp_path):
    home, family = READ[library]
    torch.manual_seed(0)
    model = home.build(family)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(1, 3, 32, 32)
    plain = model(x)
    fused_lora.patch(model, rank=2, alpha=3, example_input=x)
    y = wake(model)(x)
    assert not torch.allclose(y, plain)
    fused_lora.save(model, tmp_path)
    assert not any("parametriz" in key for key in load_file(tmp_path / TENSORS))
    other = home.build(family)
    other.load_state_dict(bits)
    fused_lora.patch(other, rank=2, example_input=x)
    fused_lora.load(other, tmp_path)
    assert torch.equal(other(x), y)
    fused_lora.merge(other)
    torch.testing.assert_close(other(x), y, **CLOSE)
    with fused_lora.disable(other):
        torch.testing.assert_close(other(x), plain, **CLOSE)  # torch may take a fast path now
    fused_lora.unmerge(other)
    fused_lora.unpatch(other)
    assert other.state_dict().keys() == bits.keys()
    assert all(torch.equal(value, bits[key]) for key, value in other.state_dict().items())
    if library == "timm":  # PEFT computes it once merged, where the model reads what it merged
        theirs = peft.PeftModel.from_pretrained(other, tmp_path).merge_and_unload()
        torch.testing.assert_close(theirs(x), y, **CLOSE)
