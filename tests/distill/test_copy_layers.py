"""copy_layers: which blocks stay, what is shared, what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import fused_lora
from fused_lora.distill import copy_layers
from fused_lora.distill.stack import pairs_of, spans_of, tokens_of
from fused_lora.distill.wecolora import token_loss
from tests.patching.models import build, images


@pytest.mark.parametrize("reduction, kept", [(2, [0, 2, 4]), (3, [0, 3]), (4, [0, 4]), (5, [0])])
def test_keeps_every_nth_block_and_shares_it(reduction: int, kept: list[int]) -> None:
    teacher = build(depth=5)
    student = copy_layers(teacher, reduction)
    assert len(student.blocks) == len(kept) and len(teacher.blocks) == 5
    for mine, i in zip(student.blocks, kept, strict=True):
        theirs = dict(teacher.blocks[i].named_parameters())
        assert all(p is theirs[name] for name, p in mine.named_parameters())
    assert student.head.weight is teacher.head.weight
    assert student.pos_embed is teacher.pos_embed
    assert not any(p.requires_grad for p in teacher.parameters())
    assert len(student.feature_info) == len(kept)


def test_a_student_is_its_teacher_without_the_skipped_blocks() -> None:
    teacher = build(depth=4)
    student = copy_layers(teacher, 2)
    teacher.blocks[1] = nn.Identity()
    teacher.blocks[3] = nn.Identity()
    x = images(teacher)
    assert torch.equal(student(x), teacher(x))


def test_owned_and_copied_parameters_are_new() -> None:
    teacher = build(depth=4)
    student = copy_layers(teacher, 2, own=["^head", "norm.weight$"])
    assert student.head.weight is not teacher.head.weight
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert student.norm.weight is not teacher.norm.weight and student.norm.bias is teacher.norm.bias
    apart = copy_layers(build(depth=4), 2, share=False)
    assert all(p.requires_grad for p in apart.parameters())


def test_training_the_student_leaves_the_teacher_alone() -> None:
    teacher = build(depth=4)
    x, before = images(teacher), {k: v.clone() for k, v in teacher.state_dict().items()}
    student = copy_layers(teacher, 2, own="^head")
    fused_lora.patch(student, rank=2, trainable=["^head"])
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        (pair,) = pairs_of(teacher, 2)
        y, (tokens,) = tokens_of(student, x, [pair.student])
        with torch.no_grad():
            _, (wanted,) = tokens_of(teacher, x, [pair.teacher])
        (token_loss(tokens, wanted) + y.square().mean()).backward()
        optimizer.step()
    fused_lora.unpatch(student, merge=True)
    assert not torch.equal(student.head.weight, teacher.head.weight)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)


def test_a_resnet_is_thinned_stage_by_stage() -> None:
    teacher = timm.create_model("resnet50", pretrained=False).eval()
    student = copy_layers(teacher, 2)
    stages = [student.layer1, student.layer2, student.layer3, student.layer4]
    assert [len(stage) for stage in stages] == [2, 2, 3, 2]
    assert student(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_pairs_and_spans() -> None:
    teacher = build(depth=5)
    assert [(p.teacher, p.student) for p in pairs_of(teacher, 3)] == [("blocks.4", "blocks.1")]
    every = pairs_of(teacher, 2, "every")
    assert [p.teacher for p in every] == ["blocks.1", "blocks.3", "blocks.4"]
    assert spans_of(teacher, 3)["blocks.1"] == ["blocks.3", "blocks.4"]


def test_tokens_are_those_before_the_final_norm() -> None:
    model = build(depth=3)
    x = images(model)
    _, (tokens,) = tokens_of(model, x, ["blocks.2"])
    assert torch.equal(model.norm(tokens), model.forward_features(x))
    assert not model.blocks[2]._forward_hooks


@pytest.mark.parametrize("bad", [1, 0, -2, True, 2.0, "2"])
def test_refuses_a_reduction(bad: object) -> None:
    with pytest.raises(ValueError, match=f"from 2 on, got {bad!r}"):
        copy_layers(build(), bad)  # type: ignore[arg-type]


def test_refuses_what_it_cannot_thin() -> None:
    with pytest.raises(ValueError, match="3 is above the depth of every stack: {'blocks': 2}"):
        copy_layers(build(), 3)
    with pytest.raises(ValueError, match="Sequential holds no stack of equal blocks"):
        copy_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2)
    with pytest.raises(ValueError, match="'haed' matches no parameter"):
        copy_layers(build(), 2, own=["haed"])
    patched = build()
    fused_lora.patch(patched, rank=2)
    with pytest.raises(RuntimeError, match="blocks.0.attn.qkv carries adapters"):
        copy_layers(patched, 2)
    with pytest.raises(TypeError, match="teacher: expected a torch.nn.Module, got 'vit'"):
        copy_layers("vit", 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction, kept", [(2, [0, 1, 2]), (4, [0, 1]), (5, [0])])
def test_keeps_the_first_blocks(reduction: int, kept: list[int]) -> None:
    teacher = build(depth=5)
    student = copy_layers(teacher, reduction, keep="first")
    for mine, theirs in zip(student.blocks, kept, strict=True):
        assert mine.mlp.fc1.weight is teacher.blocks[theirs].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"keep must be one of .* got 'top'"):
        copy_layers(teacher, reduction, keep="top")
