"""U-Nets: thinned stage by stage, with ConvLoRA on what is kept, trained beside naive ConvLoRA."""

from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.distill import copy_layers
from fused_lora.distill.convolutions import (
    adapt_convolutions,
    hold_statistics,
    merge_convolutions,
    release_statistics,
)
from fused_lora.distill.models import UNet, WeightsError, build
from fused_lora.distill.recipe.tables import Teacher
from fused_lora.distill.stack import pairs_of, stacks_of, tokens_of
from fused_lora.nn.child_adapters import FusedLoRAConv2d
from fused_lora.testing.yardstick import in_every_order, judge
from tests.distill.runs import fit_of, unet

DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}


def resnet(name: str) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, channels=(8, 8, 12, 16), zero_init_last=False).eval()


def storages(*models: nn.Module) -> int:
    """Bytes of parameters, each storage once."""
    found = [p.untyped_storage() for model in models for p in model.parameters()]
    return sum({each.data_ptr(): each.nbytes() for each in found}.values())


def adapted(teacher: nn.Module, rank: int = 3, **options) -> nn.Module:
    student = copy_layers(teacher, 2, own=options.get("trainable", ()))
    adapt_convolutions(student, [stack.name for stack in stacks_of(teacher)], rank, 5, **options)
    return student.train()


def wake(student: nn.Module) -> nn.Module:
    for module in student.modules():
        if isinstance(module, FusedLoRAConv2d):
            nn.init.normal_(module.lora_B, std=0.05)
    return student


@pytest.mark.parametrize("reduction", [2, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_a_stage_keeps_its_first_block_and_every_nth(name: str, reduction: int) -> None:
    teacher = resnet(name)
    if reduction > max(DEPTHS[name]):
        with pytest.raises(ValueError, match="3 is above the depth of every stack"):
            copy_layers(teacher, reduction)
        return
    before = storages(teacher)
    student = copy_layers(teacher, reduction)
    assert storages(teacher, student) == before
    for i, depth in enumerate(DEPTHS[name], start=1):
        theirs, mine = teacher.get_submodule(f"layer{i}"), student.get_submodule(f"layer{i}")
        kept = list(range(0, depth, reduction))
        assert len(mine) == len(kept) and len(theirs) == depth
        assert (mine[0].downsample is None) == (theirs[0].downsample is None)
        for block, place in zip(mine, kept, strict=True):
            own = dict(theirs[place].named_parameters())
            assert all(p is own[n] for n, p in block.named_parameters())
        for place in sorted({*range(depth)} - {*kept}):
            theirs[place] = nn.Identity()
    x = torch.randn(2, 3, 40, 33)
    assert torch.equal(student(x), teacher(x))


def test_only_the_encoder_of_a_unet_is_thinned() -> None:
    teacher = unet(widths=[8, 8])  # the decoder's two blocks are of one class
    assert [stack.name for stack in stacks_of(teacher)] == ["encoder.layer1", "encoder.layer2"]
    student = copy_layers(teacher, 2)
    assert [len(student.encoder.layer1), len(student.encoder.layer2)] == [2, 2]
    assert len(student.decoder) == 2 and student.head.weight is teacher.head.weight
    stages = pairs_of(teacher, 2, "stages")
    assert [pair.teacher for pair in stages] == ["encoder.layer1.2", "encoder.layer2.3"]
    assert pairs_of(teacher, 2) == stages[1:]
    x = torch.randn(1, 1, 16, 16)
    _, maps = tokens_of(teacher, x, [pair.teacher for pair in stages], whole=False)
    assert all(map(torch.equal, maps, teacher.encoder(x)[1:]))


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (5, 9)])
def test_a_unet_labels_every_pixel_of_any_size(size: tuple[int, int]) -> None:
    assert unet()(torch.randn(2, 1, *size)).shape == (2, 11, *size)


def test_norms_keep_their_statistics_in_training() -> None:
    teacher = unet()
    theirs = {name: value.clone() for name, value in teacher.named_buffers()}
    student = adapted(teacher)
    before = {name: value.clone() for name, value in student.named_buffers()}
    x = torch.randn(3, 1, 16, 16)
    expected = student.eval()(x)
    assert torch.equal(student.train()(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in student.named_buffers())
    release_statistics(student)
    assert not torch.allclose(student.train()(x), expected)
    assert not all(torch.equal(value, before[name]) for name, value in student.named_buffers())
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.named_buffers())


def test_norms_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    assert hold_statistics(model) == ["0"] and hold_statistics(model) == ["0"]
    assert len(model[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adapters_on_every_kept_convolution_and_the_way_back(dtype: torch.dtype) -> None:
    teacher = unet().to(dtype)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = wake(adapted(teacher, rank=9))
    convolutions = [m for m in student.encoder.modules() if isinstance(m, nn.Conv2d)]
    carry = [m for m in convolutions if isinstance(m, FusedLoRAConv2d)]
    assert len(convolutions) - len(carry) == 1  # the stem
    assert {conv.rank for conv in carry} == {8, 9}  # 8 where the kernel expresses no more
    assert not any(isinstance(m, FusedLoRAConv2d) for m in student.decoder.modules())
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    x = torch.randn(2, 1, 16, 16, dtype=dtype)
    expected = student(x)
    merge_convolutions(student)
    assert torch.equal(student.eval()(x), expected)
    assert set(student.state_dict()) == set(copy_layers(teacher, 2).state_dict())
    assert not torch.allclose(copy_layers(teacher, 2)(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_further_parameters_train_beside_the_adapters() -> None:
    student = adapted(unet(), trainable=["^head"])
    trained = {n for n, p in student.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="trainable: '.haed' matches no parameter"):
        adapt_convolutions(copy_layers(unet(), 2), ["encoder.layer1"], 2, 0, ["^haed"])
    with pytest.raises(ValueError, match=r"UNet has no plain convolution within \['decoder.9'\]"):
        adapt_convolutions(unet(), ["decoder.9"], 2, 0)


def test_refuses() -> None:
    with pytest.raises(RuntimeError, match="encoder.layer1.0.conv1 carries adapters"):
        copy_layers(adapted(unet()), 2)
    with pytest.raises(ValueError, match="two stages or more, got stages = 1"):
        UNet(stages=1)
    with pytest.raises(ValueError, match=r"3 stages want 2 widths, got \[4\]"):
        UNet("resnet18", stages=3, widths=[4])
    with pytest.raises(WeightsError, match="teacher.model = 'unet': .*stages = 0"):
        build(Teacher(model="unet", options={"stages": 0}))


def test_the_library_is_named_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(WeightsError, match=r"smp/Unet'.*pip install fused_lora\[segmentation\]"):
        build(Teacher(model="smp/Unet"))


def test_a_unet_of_the_library() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    given = {"encoder_name": "tu-resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    given |= {"in_channels": 1, "num_classes": 4}
    teacher = build(Teacher(model="smp/Unet", options=given)).eval()
    homes = [stack.name for stack in stacks_of(teacher)]
    assert homes == ["encoder.model.layer1", "encoder.model.layer2"]
    student = wake(adapted(teacher))
    x = torch.randn(2, 1, 32, 32)
    expected = student(x)
    assert expected.shape == (2, 4, 32, 32) and not torch.allclose(expected, teacher(x))
    merge_convolutions(student)
    assert torch.equal(student.eval()(x), expected)
    for options, message in [
        ({"encoder_name": "resnet18", "encoder_depth": 3}, "give 'tu-resnet18', timm's"),
        ({"encoder_name": "resnet99"}, "resnet99"),
    ]:
        with pytest.raises(WeightsError, match=message):
            build(Teacher(model="smp/Unet", options=options))
    with pytest.raises(WeightsError, match="has no such model"):
        build(Teacher(model="smp/Unit"))


class NaiveConv(nn.Module):
    """Three convolutions: the frozen one, down to the rank, and up again."""

    def __init__(self, conv: nn.Conv2d, like: FusedLoRAConv2d) -> None:
        super().__init__()
        self.conv, self.scale = conv, like.scale
        size = (like.rank, *conv.weight.shape[1:])
        self.down = nn.Parameter(like.lora_A.detach().clone().view(size))  # [R, C, kh, kw]
        self.up = nn.Parameter(like.lora_B.detach().clone()[:, :, None, None])  # [N, R, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.down, None, self.conv.stride, self.conv.padding)
        return self.conv(x) + self.scale * F.conv2d(h, self.up)


def fused_of(teacher: nn.Module) -> nn.Module:
    student = copy_layers(teacher, 2)
    adapt_convolutions(student, [stack.name for stack in stacks_of(student)], 3, seed=5)
    return student


def naive_of(teacher: nn.Module, like: nn.Module) -> nn.Module:
    """Naive ConvLoRA that starts where ``like`` does."""
    student = copy_layers(teacher, 2)
    for name, theirs in like.named_modules():
        if isinstance(theirs, FusedLoRAConv2d):
            home, _, leaf = name.rpartition(".")
            conv = student.get_submodule(name)
            setattr(student.get_submodule(home), leaf, NaiveConv(conv, theirs))
    hold_statistics(student)
    return student


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_fused_learns_what_naive_learns_step_for_step(precision: str) -> None:
    teacher = unet()
    fused = fused_of(teacher)
    naive = naive_of(teacher, fused)
    exact_teacher = copy.deepcopy(teacher).double()
    exact = naive_of(exact_teacher, fused)

    def losses(teacher: nn.Module, student: nn.Module, precision: str) -> torch.Tensor:
        fit = fit_of(teacher, student, precision, blocks="stages")
        fit.run()
        return torch.tensor(fit.losses, dtype=torch.float64)

    truth, ours = losses(exact_teacher, exact, "fp64"), losses(teacher, fused, precision)
    plain = in_every_order(lambda: losses(teacher, copy.deepcopy(naive), precision))
    assert truth[-1] < 0.9 * truth[0]  # it learns
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for step in range(1, len(truth) + 1):
        mine, right, *theirs = (run[:step] for run in (ours, truth, *plain))
        verdict = judge(f"loss {step}", mine, theirs, right, dtype)
        assert verdict.passed, verdict
