"""``patch(model, LoraConfig(...))``: the same adapters as PEFT puts there, on blocks alone."""

import copy
import json

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.nn import AdaptedLinear
from tests.patching.models import build
from tests.patching.test_bad_input import refuse
from tests.peft_live.test_live import BASES, CLOSE, hf, out, stir

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TIMM = ["qkv", "proj", "fc1", "fc2"]


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 6, "use_rslora": True, "init_lora_weights": "gaussian"},
        {"rank_pattern": {"fc1": 8}, "alpha_pattern": {"fc2": 5}, "lora_alpha": 4},
        {"exclude_modules": r".*\.0\..*"},
        {"modules_to_save": ["norm"]},
    ],
    ids=["plain", "rslora", "patterns", "one block alone", "a norm"],
)
def test_what_peft_would_adapt_it_adapts(name, options, tmp_path):
    make, targets = BASES[name]
    if name == "transformers" and "modules_to_save" in options:
        options = {"modules_to_save": ["layernorm"]}
    config = peft.LoraConfig(r=4, target_modules=targets, **options)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make(), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = make()
    fused_lora.patch(ours, config)
    wanted = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    adapted = {n for n, m in ours.named_modules() if isinstance(m, AdaptedLinear)}
    assert {f"base_model.model.{each}" for each in adapted} == wanted
    fused_lora.load(ours, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(out(ours, x), out(theirs, x), **CLOSE)
    fused_lora.save(ours, tmp_path / "back")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "back").eval()
    torch.testing.assert_close(out(again, x), out(theirs, x), **CLOSE)


def test_the_patch_embedding_that_shares_a_name_stays_as_it_is():
    model = build()
    report = fused_lora.patch(model, peft.LoraConfig(r=4, target_modules=TIMM, lora_dropout=0.1))
    assert type(model.patch_embed.proj) is nn.Conv2d
    assert len(report.rows) == 8
    assert list(report.left_alone) == ["patch_embed.proj"]
    assert "left alone: patch_embed.proj: named by the LoraConfig, but lora_dropout=0.1" in str(
        report
    )
    assert model.blocks[0].attn.qkv.config.dropout == 0.1
    assert list(model.blocks[0].attn.qkv.groups) == [""]


def test_separate_adapters_and_a_head_on_request():
    model = build()
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["head"])
    fused_lora.patch(model, config, qkv="separate", trainable="^norm")
    trains = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {"blocks", "head", "norm"}
    assert list(model.blocks[0].attn.qkv.groups) == ["q", "k", "v"]
    fused_lora.unpatch(model)
    fused_lora.patch(model, peft.LoraConfig(target_modules=r".*\.fc1"))
    assert model.blocks[0].mlp.fc1.groups[""].rank == 8
    assert type(model.blocks[0].mlp.fc2) is nn.Linear


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"use_dora": True}, {}, "LoraConfig.use_dora is True, which is not served"),
        ({"bias": "all"}, {}, "LoraConfig.bias is 'all', which is not served"),
        ({"lora_bias": True}, {}, "LoraConfig.lora_bias is True"),
        ({"fan_in_fan_out": True}, {}, "LoraConfig.fan_in_fan_out is True"),
        (
            {"init_lora_weights": "pissa"},
            {},
            "init_lora_weights is 'pissa'; .True, 'gaussian'. are",
        ),
        ({"init_lora_weights": False}, {}, "init_lora_weights is False"),
        ({"target_modules": ["norm"]}, {}, "names 'norm', which is no projection of a block"),
        ({"target_modules": ["qkv", "c_fc"]}, {}, "names 'c_fc', which is no projection"),
        ({"target_modules": r".*\.gate"}, {}, "matches none of"),
        ({"exclude_modules": r".*"}, {}, "matches none of"),
        ({"r": 49}, {}, r"rank 49 is above"),
        ({"rank_pattern": {"c_fc": 3}}, {}, r"rank_pattern: .* matches no projection's name"),
        ({}, {"alpha": 3}, "alpha=3: the LoraConfig says that already"),
        ({}, {"targets": "q"}, "targets='q': the LoraConfig says that already"),
        ({}, {"rank_pattern": {"q": 2}}, "rank_pattern=.*: the LoraConfig says that already"),
        (
            {"modules_to_save": ["classifier"]},
            {},
            r"trainable: .*classifier.* matches no parameter",
        ),
    ],
)
def test_refusals(config, options, message):
    config = peft.LoraConfig(**{"target_modules": TIMM} | config)
    refuse(build(), message, **{"rank": config} | options)


def test_three_adapters_on_a_fused_qkv_come_back_from_peft(tmp_path):
    model = build()
    fused_lora.patch(model, peft.LoraConfig(r=4, target_modules=["qkv"]), qkv="separate")
    stir(model)
    fused_lora.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 12


def with_pooler():
    """transformers' ViT with a pooler and a classifier."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config).eval()


LINEARS = {  # (model, target_modules, how many linears beside the blocks)
    "timm": (build, "all-linear", 1),
    "transformers": (with_pooler, "all-linear", 1),
    "a head alone": (build, ["head"], 1),
    "by pattern": (build, r"head|blocks\.0\..*fc1", 1),
    "a deep head": (with_pooler, ["classifier", "q_proj"], 1),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linears_beside_the_blocks_are_adapted_as_peft_does(name, tmp_path):
    make, targets, beside = LINEARS[name]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make(), copy.deepcopy(config)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    mine = make()
    report = fused_lora.patch(mine, config)
    wanted = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    found = {
        f"base_model.model.{n}" for n, m in mine.named_modules() if isinstance(m, AdaptedLinear)
    }
    assert found == wanted and sum(row.role == "-" for row in report.rows) == beside
    fused_lora.load(mine, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)
    for model in (mine.train(), theirs.train()):
        logits(model, x).square().sum().backward()
    head = next(m for n, m in mine.named_modules() if n in ("head", "classifier"))
    other = next(m for n, m in theirs.named_modules() if n.endswith((".head", ".classifier")))
    torch.testing.assert_close(
        head.adapter()[1].grad, other.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-4
    )
    fused_lora.merge(mine.eval())
    torch.testing.assert_close(logits(mine, x), logits(theirs.eval(), x), **CLOSE)
    fused_lora.unpatch(mine)
    torch.manual_seed(0)
    torch.testing.assert_close(logits(mine, x), logits(make(), x))


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def test_a_linear_that_the_forward_does_without_is_named():
    model = build()
    model.unused = nn.Linear(48, 4)
    report = fused_lora.patch(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert report.left_alone == {"unused": "neither called nor read by the model's forward"}
    assert type(model.unused) is nn.Linear and type(model.head) is not nn.Linear


def test_a_config_does_not_fit_where_there_is_no_projection():
    model = nn.Sequential(nn.Linear(4, 4))
    refuse(model, "no projection with a role", rank=peft.LoraConfig(r=2))
    assert hf()
