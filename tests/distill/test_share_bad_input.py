"""What cannot be shared is named, and both models stay as they were."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.io import AdapterFileError
from fused_lora.patching.report import PatchError
from tests.distill.pairs import images, student, teacher
from tests.patching.models import GluMlp, SwiGLU, build


def state_of(model):
    """Everything that share_adapters could change."""
    return {
        "kinds": [type(m) for m in model.modules()],
        "values": {name: p.detach().clone() for name, p in model.named_parameters()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "lent": [getattr(m, "_has_sharers", None) for m in model.modules()],
    }


def unchanged(model, before):
    now = state_of(model)
    values, old = now.pop("values"), before.pop("values")
    return now == before and all(
        p.is_meta or torch.equal(values[name], p) for name, p in old.items()
    )


def refused(message, big=None, small=None, *args, error=PatchError, **options):
    big, small = big or teacher(), small or student()
    before = state_of(big), state_of(small)
    with pytest.raises(error, match=message):
        fused_lora.share_adapters(big, small, *args, **options)
    assert unchanged(big, before[0])
    assert unchanged(small, before[1])


def merged():
    big = teacher()
    fused_lora.merge(big)
    return big


def patched_student():
    small = student()
    fused_lora.patch(small)
    return small


@pytest.mark.parametrize(
    ("big", "small", "message"),
    [
        (build, student, "VisionTransformer carries no fused_lora adapters: patch it first"),
        (merged, student, "the teacher's blocks.0.attn.qkv is merged"),
        (teacher, patched_student, "the student's blocks.0.attn.qkv carries adapters already"),
        (teacher, lambda: nn.Linear(3, 3), "Linear has no transformer block"),
        (
            teacher,
            lambda: student(embed_dim=64),
            r"student's blocks.0.attn.qkv \(q\) is \[64, 64\], the\s+teacher's blocks.0.attn.qkv "
            r"\[48, 48\]: a student may be no wider",
        ),
        (
            teacher,
            lambda: student(mlp_ratio=8),
            r"blocks.0.mlp.fc1 \(fc1\) is \[256, 32\].*\[192, 48\]",
        ),
        (
            teacher,
            lambda: student(mlp_layer=SwiGLU),
            r"no counterpart for \['fc1_2'\]: the student's blocks.0 has",
        ),
        (
            lambda: teacher(mlp_layer=SwiGLU),
            lambda: student(mlp_layer=GluMlp),
            "gate and the value of blocks.0 and blocks.0 are packed in one linear",
        ),
    ],
)
def test_models_that_do_not_fit(big, small, message):
    refused(message, big(), small())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("middle", r"mapping must be one of \['first', 'last', 'even'\] or a function, got 'mid"),
        (
            lambda i: i + 3,
            r"sends block 1 of the student's 2 to 4; the\s+teacher's blocks are 0 to 3",
        ),
        (lambda i: -1, "block 0 of the student's 2 to -1"),
        (lambda i: 1.0, "to 1.0"),
        (lambda i: None, "to None"),
        (lambda i: True, "to True"),
    ],
)
def test_mappings(mapping, message):
    refused(message, None, None, mapping)


@pytest.mark.parametrize("mapping", ["first", "last"])
def test_a_deeper_student(mapping):
    refused(f"mapping '{mapping}' sends block", None, student(depth=5), mapping)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "blocks.0.attn.qkv: rank must be a whole number from 1 on, got 0"),
        (2.0, "got 2.0"),
        (True, "got True"),
        (5, "rank 5 is above that of the teacher's blocks.0.attn.qkv, 4"),
    ],
)
def test_ranks(rank, message):
    refused(message, rank=rank)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"trainable": "^nothing"}, "'\\^nothing' matches no parameter", PatchError),
        ({"trainable": "["}, "is no regular expression", PatchError),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0", ValueError),
        ({"example_input": torch.zeros(1, 1)}, "a trial forward failed", PatchError),
    ],
)
def test_options(options, message, error):
    refused(message, error=error, **options)


def test_a_linear_that_is_not_plain():
    class Quantised(nn.Linear):
        pass

    small = student()
    small.blocks[1].mlp.fc2 = Quantised(128, 32).double()
    refused("the student's blocks.1.mlp.fc2 is a .*Quantised, not a plain", None, small)


def test_a_projection_that_is_never_called():
    class Bypassed(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.fc1, self.fc2 = mlp.fc1, mlp.fc2

        def forward(self, x):
            return nn.functional.linear(x @ self.fc1.weight.T, self.fc2.weight)

    small = student()
    small.blocks[0].mlp = Bypassed(small.blocks[0].mlp)
    refused("blocks.0.mlp.fc1 is never called by the student's forward", None, small)


def test_a_parametrized_teacher():
    big = teacher()
    qkv = big.blocks[3].attn.qkv
    torch.nn.utils.parametrize.register_parametrization(qkv, "lora_A_q", nn.Identity())
    refused("the teacher's blocks.3.attn.qkv is parametrized", big)


def test_a_student_as_teacher():
    big, small = teacher(), student()
    fused_lora.share_adapters(big, small)
    refused("itself a student's: share its owner's", small, student(embed_dim=16))


def test_another_device():
    refused(
        "the student's blocks.0.attn.qkv is on meta, the teacher's on cpu",
        None,
        student().to("meta"),
    )


def test_adapters_that_differ_where_the_student_has_one_linear():
    big = teacher(separate=True)
    k_proj = big.blocks[0].attn.k_proj
    k_proj.config = dataclasses.replace(k_proj.config, dropout=0.5)
    refused("blocks.0.attn.qkv: the teacher's adapters for it differ in dropout", big)


class TestWhileShared:
    def pair(self):
        big, small = teacher(), student()
        fused_lora.share_adapters(big, small)
        return big, small

    def test_loading_into_the_student(self, tmp_path):
        _, small = self.pair()
        fused_lora.save(small, tmp_path)
        with pytest.raises(AdapterFileError, match="blocks.0.attn.qkv shares its teacher's adapt"):
            fused_lora.load(small, tmp_path)

    def test_unpatching_the_teacher(self):
        big, small = self.pair()
        x = images()
        before = big(x), small(x)
        with pytest.raises(PatchError, match="blocks.0.attn.qkv: release: 1 modules of a student"):
            fused_lora.unpatch(big)
        assert torch.equal(big(x), before[0])
        assert torch.equal(small(x), before[1])
        fused_lora.unpatch(small)
        fused_lora.unpatch(big)

    def test_an_owner_that_is_gone(self):
        big, small = copy.deepcopy(nn.ModuleList(self.pair()))
        fused_lora.unpatch(big)  # a copy's students are not known to it
        with pytest.raises(RuntimeError, match="shares is gone: its owner was unpatched"):
            small(images())

    def test_resetting_the_student(self):
        _, small = self.pair()
        with pytest.raises(RuntimeError, match="parts of another module's; reset that one"):
            small.blocks[0].mlp.fc1.reset_parameters()

    def test_sharing_twice(self):
        refused("carries adapters already", *self.pair())

    def test_unsharing_what_shares_nothing(self):
        with pytest.raises(PatchError, match="VisionTransformer shares no adapters"):
            fused_lora.unshare_adapters(student())
