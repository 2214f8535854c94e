"""PEFT reads what we write and we read what PEFT writes, to the same outputs."""

import json

import pytest
import torch

import fused_lora

peft = pytest.importorskip("peft")

TARGETS = ["attn.qkv", "attn.proj", "fc1", "fc2"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, two blocks, another order of summation


def _to_peft(vit, config, noise=0.1):
    model = peft.get_peft_model(vit(), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("error::RuntimeWarning")  # PEFT warns of patterns that match nothing
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 16, "rank_pattern": {"q": 3, "k": 5, "blocks.1.mlp.fc1": 7}},
        {"alpha": 16, "rank_stabilized": True, "rank_pattern": {"fc1": 8}},
        {"qkv": "joint", "alpha": 8},
        {"alpha": 8, "alpha_pattern": {"q": 4, "v": 32}, "rank_pattern": {"k": 2}},
        {"targets": ("q", "v")},
        {"trainable": ("^head", "norm")},  # also the norms that PEFT's endswith would catch
    ],
    ids=["default", "odd scales", "rslora", "joint", "alphas", "subset", "head and norms"],
)
def test_peft_loads_ours(vit, patched, image, tmp_path, options):
    model = patched(**options)
    fused_lora.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path / "ours").eval()
    assert (model(image) - vit()(image)).abs().max() > 0.01
    torch.testing.assert_close(theirs(image), model(image), **CLOSE)
    adapted = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    wanted = {n for n, m in model.named_modules() if isinstance(m, fused_lora.nn.AdaptedLinear)}
    assert adapted == {f"base_model.model.{name}" for name in wanted}  # patch_embed.proj is not
    theirs.save_pretrained(tmp_path / "theirs")
    other = patched(**{**options, "noise": 0})
    fused_lora.load(other, tmp_path / "theirs")  # still block-diagonal: it splits again
    torch.testing.assert_close(other(image), model(image), **CLOSE)


@pytest.mark.parametrize("cast", [True, False])  # PEFT's default makes 16-bit adapters fp32
def test_peft_loads_bf16(vit, patched, tmp_path, cast):
    model = patched(adapter_dtype=torch.bfloat16)
    fused_lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path, autocast_adapter_dtype=cast)
    a = theirs.base_model.model.blocks[0].attn.qkv.lora_A["default"].weight
    ours = torch.cat([a for a, _ in model.blocks[0].attn.qkv.adapters()])
    assert torch.equal(a, ours.float())


def test_peft_loads_ours_without_materialising_first(vit, patched, image, tmp_path):
    model = patched(alpha=16, rank_pattern={"q": 3})  # keys set aside must not disturb assign=True
    fused_lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(theirs(image), model(image), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1},
        {
            "rank_pattern": {"fc1": 8, "^blocks.1.attn.proj": 2},
            "alpha_pattern": {"blocks.0.mlp.fc1": 32, r"blocks\.\d+\.attn\.qkv": 5.5},
        },
        {"modules_to_save": ["head"], "init_lora_weights": "gaussian"},
        {"exclude_modules": ["patch_embed.proj"], "target_modules": ["qkv", "proj", "fc1", "fc2"]},
    ],
    ids=["plain", "rslora", "patterns", "head", "excluded"],
)
def test_we_load_peft(vit, patched, image, tmp_path, options):
    config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})
    theirs = _to_peft(vit, config)
    theirs.save_pretrained(tmp_path)
    ranks = {"fc1": 8, "blocks.1.attn.proj": 2} if "rank_pattern" in options else {}
    model = patched(qkv="joint", rank_pattern=ranks)
    others = fused_lora.load(model, tmp_path)
    assert others == ["head.bias", "head.weight"] * ("modules_to_save" in options)
    torch.testing.assert_close(model(image), theirs(image), **CLOSE)


def test_one_trained_adapter_does_not_split(vit, patched, snapshot, same, tmp_path):
    _to_peft(vit, peft.LoraConfig(r=12, target_modules=TARGETS)).save_pretrained(tmp_path)
    model = patched(rank=12, rank_pattern={"q": 4, "k": 4, "v": 4})
    before = snapshot(model)
    with pytest.raises(fused_lora.AdapterFileError, match=r'qkv="joint" and rank 12'):
        fused_lora.load(model, tmp_path)
    assert same(model, before)


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config"])
def test_other_methods_are_refused(vit, patched, tmp_path, kind):
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    _to_peft(vit, getattr(peft, kind)(target_modules=TARGETS, **more)).save_pretrained(tmp_path)
    with pytest.raises(fused_lora.AdapterFileError, match="peft_type is '(LOHA|IA3)'"):
        fused_lora.load(patched(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),  # changes the base
    ],
)
def test_lora_variants_are_refused(vit, patched, tmp_path, options, message):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **options)
    _to_peft(vit, config).save_pretrained(tmp_path)
    with pytest.raises(fused_lora.AdapterFileError, match=message):
        fused_lora.load(patched(qkv="joint"), tmp_path)


def test_config_is_read_by_peft_without_a_warning(patched, tmp_path, recwarn):
    fused_lora.save(patched(), tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert not list(recwarn) and config.peft_type == "LORA" and config.inference_mode
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written) <= set(config.to_dict())
