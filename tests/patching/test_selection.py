"""``layers`` and ``exclude``: which of the projections found are adapted."""

from __future__ import annotations

import pytest
import torchvision

import fused_lora
from fused_lora.patching.report import PatchError
from tests.patching.models import build


def names(**options) -> list[str]:
    report = fused_lora.patch(build(depth=3), rank=4, **options)
    return [row.module for row in report.rows]


def test_layers():
    assert {name.split(".")[1] for name in names(layers=[0, 2])} == {"0", "2"}
    assert len(names(layers=1)) == 4
    assert len(names(layers=range(3))) == 12


def test_exclude():
    left = names(exclude=r"\.0\.attn")
    assert len(left) == 10 and "blocks.0.mlp.fc1" in left
    assert names(exclude=["attn", "fc2"]) == [f"blocks.{i}.mlp.fc1" for i in range(3)]


def test_together():
    assert names(layers=[1], exclude=["mlp"]) == ["blocks.1.attn.qkv", "blocks.1.attn.proj"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [0, 7]}, r"layers: no block \[7\]; the model has \[0, 1, 2\]"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [-1]}, "layers: a block's number must be a whole number from 0 on, got -1"),
        ({"layers": [True]}, "layers: a block's number must be a whole number from 0 on, got True"),
        ({"layers": ["1"]}, "layers: a block's number must be a whole number from 0 on, got '1'"),
        ({"exclude": "head"}, "exclude: 'head' matches no projection's name"),
        ({"exclude": "out"}, "exclude: 'out' matches no projection's name"),
        ({"exclude": "("}, r"exclude: '\(' is no regular expression"),
        ({"exclude": [3]}, r"exclude must be a string, or several, got \[3\]"),
        ({"exclude": "blocks"}, "leave no projection"),
        ({"layers": [0], "exclude": [r"\.0\."]}, "leave no projection"),
    ],
)
def test_bad_input(options, message):
    model = build(depth=3)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(PatchError, match=message):
        fused_lora.patch(model, rank=4, **options)
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_alphas_and_ranks_of_q_k_and_v_on_one_weight():
    model = build()
    fused_lora.patch(model, rank=4, alpha=8, alpha_pattern={"q": 2, "v": 12}, rank_pattern={"v": 6})
    qkv = model.blocks[1].attn.qkv
    assert qkv.scales == (0.5, 2.0, 2.0) and [s.rank for s in qkv.groups.values()] == [4, 4, 6]
    assert model.blocks[1].attn.proj.scales == (2.0,)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_layers_of_torchvision_are_its_encoder_layers(layers):
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).eval()
    report = fused_lora.patch(model, rank=4, layers=layers)
    found = {row.module.split("encoder_layer_")[1][0] for row in report.rows}
    assert found == set(map(str, layers)) and len(report.rows) == 4 * len(layers)
