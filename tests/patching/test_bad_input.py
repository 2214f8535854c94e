"""Every model or option that cannot be served is named, and the model is left as it was."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import fused_lora
from fused_lora import PatchError
from fused_lora.nn import AdaptedLinear
from fused_lora.patching import patch as patching
from fused_lora.testing.families import of_timm
from tests.patching.models import build


def refuse(model, message, kind=PatchError, **options):
    """``patch`` refuses with ``message`` and nothing of the model has changed."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: (type(m), id(m)) for name, m in model.named_modules()}
    trains = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(kind, match=message):
        fused_lora.patch(model, **{"rank": 4} | options)
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == modules
    assert [p.requires_grad for p in model.parameters()] == trains
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) or value.isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"blocks.0.attn.qkv: rank .* got 0"),
        ({"rank": 49}, r"blocks.0.attn.qkv: rank 49 is above .* min\(48, 48\)"),
        ({"rank": "16"}, "got '16'"),
        ({"rank_pattern": {"fc2": 49}}, r"blocks.0.mlp.fc2: rank 49 is above .*min\(192, 48\)"),
        ({"rank_pattern": {"mpl": 8}}, "rank_pattern: 'mpl' is no role and matches no"),
        ({"rank_pattern": {"(": 8}}, r"rank_pattern: '\(' is no regular expression"),
        (
            {"alpha_pattern": {"q": 1, "k": 2}, "init": "pissa"},
            r"blocks.0.attn.qkv: init='pissa' divides by one scale, and .* several alphas",
        ),
        ({"targets": ["q", "gate"]}, "targets: 'gate' is no role; the roles are"),
        ({"targets": []}, "targets is empty"),
        ({"qkv": "fused"}, r"qkv must be one of \('separate', 'joint'\), got 'fused'"),
        ({"trainable": ["^heads"]}, r"trainable: '\^heads' matches no parameter"),
        ({"trainable": ["["]}, r"trainable: '\[' is no regular expression"),
        (
            {"example_input": torch.randn(1, 3, 40, 32)},
            "trial forward failed .AssertionError: Input height",
        ),
    ],
)
def test_options(options, message):
    refuse(build(), message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout": 2.0}, "dropout"), ({"impl": "gpu"}, "impl"), ({"init": "ones"}, "init")],
)
def test_adapter_options(options, message):
    refuse(build(), f"{message} must", ValueError, **options)


@pytest.mark.parametrize("batch_size", [0, -3, "8", 1.5])
def test_batch_size(batch_size):
    refuse(build(), f"batch_size must .* got {batch_size!r}", ValueError, batch_size=batch_size)


def test_a_dtype_nothing_computes_in():
    model = build()
    weight = model.blocks[1].mlp.fc2.weight
    model.blocks[1].mlp.fc2.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    refuse(model, r"blocks.1.mlp.fc2.weight is torch.int8; .* are served")


def test_a_report_that_fails_is_undone(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(patching, "plan_words", fails)
    refuse(build(), "out of memory", RuntimeError)


def test_unknown_option():
    refuse(build(), "lora_rank", TypeError, lora_rank=3)


def test_no_module():
    with pytest.raises(PatchError, match=r"model: expected a torch.nn.Module, got \{\}"):
        fused_lora.patch({}, rank=4)


def test_nothing_to_patch():
    refuse(timm.create_model("resnet10t"), "no projection with a role in .* found in ResNet")
    refuse(nn.Sequential(nn.Linear(4, 4)), r"linears of type \['Linear'\]")


def test_an_attention_that_no_rule_knows():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.whole(x).chunk(3, dim=-1)
            return self.proj(torch.softmax(q @ k.mT, -1) @ v)

    model, x = nn.Sequential(Attention(), nn.Linear(16, 16)), torch.randn(1, 5, 16)
    refuse(model, "no block has an attention and an MLP of linears that a rule", example_input=x)


def test_a_projection_that_is_neither_called_nor_read():
    model = build()
    model.blocks[1].attn.forward = lambda x, *_, **__: x
    refuse(model, r"blocks.1.attn.qkv is neither called nor read by the model's forward")


@pytest.mark.parametrize("family", ["TinyViT", "LeViT", "EfficientFormer"])
def test_columns_that_every_head_has_its_own_of(family):
    image = of_timm.example(family)
    refuse(
        of_timm.build(family),
        r'seen to come apart into q\|k\|v .* qkv="joint"',
        example_input=image,
    )


def test_a_role_that_the_model_does_not_have():
    model = of_timm.build("FastViT")  # its MLPs are convolutions
    message = r"targets: FastVit has no projection with role fc1; it has \['k', 'out', 'q', 'v'\]"
    refuse(model, message, targets=["q", "fc1"])
    report = fused_lora.patch(model, rank=2, example_input=torch.randn(2, 3, 64, 64))
    assert "left alone: fc1: no projection has this role" in str(report)


def test_dropout_before_a_weight_that_is_read():
    model = timm.create_model("beit_base_patch16_224", depth=1)
    message = r"blocks.0.attn.qkv: dropout 0.1 cannot be served, since the model reads"
    refuse(model, message, dropout=0.1)
    fused_lora.patch(model, rank=4, dropout=0.1, targets=["out", "fc1", "fc2"])


def test_a_bare_weight_that_cannot_be_served():
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    attention = model.encoder.layers[0].self_attention
    with torch.no_grad():
        attention.in_proj_weight[0, 0] = torch.nan
    refuse(model, r"self_attention.in_proj_weight holds 1 non-finite values")
    attention.in_proj_weight = nn.Parameter(torch.zeros(48, 16).to(torch.int8), requires_grad=False)
    refuse(model, r"self_attention.in_proj_weight is torch.int8")


def test_a_child_of_the_name_that_the_adapters_need():
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    model.encoder.layers[0].self_attention.in_proj = nn.Identity()
    refuse(model, "has something else named 'in_proj'", TypeError)


def test_an_unknown_linear_subclass():
    class Int8Linear(nn.Linear):
        pass

    model = build()
    model.blocks[1].mlp.fc1 = Int8Linear(48, 192)
    refuse(model, r"blocks.1.mlp.fc1 is a .*Int8Linear, not a plain")


def test_a_parametrized_linear():
    model = build()
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    refuse(model, r"blocks.0.mlp.fc1: its weight is parametrized by _WeightNorm: call ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(value):
    model = build()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[3, 4] = value
    refuse(model, r"blocks.1.attn.proj.weight holds 1 non-finite values")


def test_already_patched():
    model = build()
    fused_lora.patch(model, rank=4)
    with pytest.raises(PatchError, match=r"already patched: blocks.0.attn.qkv carries adapters"):
        fused_lora.patch(model, rank=4)
    fused_lora.unpatch(model)
    fused_lora.patch(model, rank=4)


def test_not_patched():
    for call in (fused_lora.unpatch, fused_lora.merge, fused_lora.unmerge):
        with pytest.raises(PatchError, match="VisionTransformer carries no fused_lora adapters"):
            call(build())


def test_merge_twice_and_unmerge_twice():
    model = build()
    fused_lora.patch(model, rank=4)
    with pytest.raises(PatchError, match=r"blocks.0.attn.qkv is not merged"):
        fused_lora.unmerge(model)
    fused_lora.merge(model)
    with pytest.raises(PatchError, match=r"blocks.0.attn.qkv is already merged"):
        fused_lora.merge(model)


def test_a_merge_that_fails_leaves_nothing_merged(monkeypatch):
    model = build()
    fused_lora.patch(model, rank=4)
    finish, calls = AdaptedLinear._finished, []

    def third_fails(module, merged):
        calls.append(module)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return finish(module, merged)

    monkeypatch.setattr(AdaptedLinear, "_finished", third_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused_lora.merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, AdaptedLinear))


def test_an_unpatch_that_fails_leaves_every_adapter_on():
    model = build()
    fused_lora.patch(model, rank=4)
    last = model.blocks[1].mlp.fc2
    last.lora_B.data = torch.zeros(3, 4)
    with pytest.raises(RuntimeError):
        fused_lora.unpatch(model, merge=True)
    assert not any(m.merged for m in model.modules() if isinstance(m, AdaptedLinear))
    register_parametrization(last, "lora_A", nn.Identity())
    with pytest.raises(
        PatchError, match=r"blocks.1.mlp.fc2: release: \['lora_A'\] are parametrized"
    ):
        fused_lora.unpatch(model)
    assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == 8


def test_an_adoption_that_fails_midway_is_undone(monkeypatch):
    attach, calls = AdaptedLinear._attach, []

    def fifth_fails(module, *arguments):
        calls.append(module)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        attach(module, *arguments)

    monkeypatch.setattr(AdaptedLinear, "_attach", fifth_fails)
    refuse(build(), "out of memory", RuntimeError)


def test_calls_with_the_wrong_input():
    model = build()
    fused_lora.patch(model, rank=4)
    qkv = model.blocks[0].attn.qkv
    with pytest.raises(ValueError, match=r"x \(2, 47\) must end in K = 48"):
        qkv(torch.randn(2, 47))
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 and w is torch.float32"):
        qkv(torch.randn(2, 48, dtype=torch.bfloat16))
