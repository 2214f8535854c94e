"""The trial forward: it leaves nothing behind, and nothing of the user's runs in it."""

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import PatchError
from tests.patching.models import build, images

peft = pytest.importorskip("peft")


def whole(model):
    """Every tensor, by key, the class of every module, and what is hooked."""
    tensors = {
        n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]
    }
    kinds = {name: type(m) for name, m in model.named_modules()}
    hooks = {
        n: list(m._forward_hooks) + list(m._forward_pre_hooks) for n, m in model.named_modules()
    }
    return tensors, kinds, hooks


def same(before, after):
    """Whether two of those are equal to the bit."""
    tensors, kinds, hooks = before
    assert after[0].keys() == tensors.keys() and after[1:] == (kinds, hooks)
    return all(torch.equal(after[0][key], value) for key, value in tensors.items())


def with_target_parameters():
    config = peft.LoraConfig(
        r=2, target_modules=["qkv"], target_parameters=["mlp.fc1.weight", "mlp.fc2.weight"]
    )
    return peft.get_peft_model(build(), config).eval()


def test_target_parameters_of_peft_survive_patch_and_unpatch():
    model = with_target_parameters()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    x, before = torch.randn(2, 3, 32, 32), whole(model)
    expected = model(x)
    report = fused_lora.patch(model)
    assert any("fc1" in name for name in report.left_alone)
    tensors, _, _ = whole(model)
    assert same((before[0], {}, {}), (tensors, {}, {}))
    torch.testing.assert_close(model(x), expected)
    fused_lora.unpatch(model)
    assert same(before, whole(model))
    assert torch.equal(model(x), expected)


class Breaks(nn.Module):
    """A stem that loses its own weight in each forward, as a wrapper that misbehaves would."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.inner(x * self.gain)
        del self.gain
        self.left, self.extra = nn.Parameter(torch.ones(2)), nn.Linear(1, 1)
        self.register_buffer("count", torch.zeros(1))
        return x


def test_a_forward_that_deletes_parameters_is_undone():
    model = Breaks(build())
    before = whole(model)
    fused_lora.patch(model, rank=2, example_input=torch.randn(1, 3, 32, 32))
    fused_lora.unpatch(model)
    assert same(before, whole(model))


class Writes(nn.Module):
    """A stem that writes a tensor it holds past its parameters' names."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.seen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.past = [self.seen]

    def forward(self, x):
        self.past[0].add_(1)
        return self.inner(x)


def test_a_forward_that_writes_its_own_weights_is_refused_by_name():
    model = Writes(build())
    with pytest.raises(PatchError, match=r"wrote seen in place"):
        fused_lora.patch(model, rank=2, example_input=torch.randn(1, 3, 32, 32))
    assert not any("lora" in name for name, _ in model.named_parameters())


class AsksForValues(nn.Module):
    """A model whose forward needs numbers, and writes into a buffer and a parameter by name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.steps = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        self.steps.data.add_(1)
        return self.inner(x) if self.steps.item() else x


def test_a_forward_that_asks_for_values_gets_copies():
    model = AsksForValues(build())
    fused_lora.patch(model, rank=2, example_input=torch.randn(1, 3, 32, 32))
    assert model.steps.item() == 0


@pytest.mark.parametrize("where", ["linear", "block", "everywhere", "live PEFT"])
def test_hooks_of_the_user_do_not_fire(where):
    model = build()
    if where == "live PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))
    seen = []

    def note(module, args, *rest):
        seen.append((type(module).__name__, [a.device.type for a in args]))

    inner = model.base_model.model if where == "live PEFT" else model
    at = {"linear": inner.blocks[0].mlp.fc1, "block": inner.blocks[1]}.get(where, inner)
    if where == "everywhere":
        handles = [nn.modules.module.register_module_forward_hook(note)]
    else:
        handles = [at.register_forward_hook(note), at.register_forward_pre_hook(note)]
    try:
        fused_lora.patch(model)
        assert seen == []
        model(torch.randn(1, 3, 32, 32))
        assert seen and all(devices in (["cpu"], []) for _, devices in seen)
    finally:
        for handle in handles:
            handle.remove()


class ByHooks(nn.Module):
    """A model that works by its own hooks, as timm's FeatureHookNet does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.found = inner, {}
        inner.blocks[0].register_forward_hook(self.keep)

    def keep(self, module, args, y):
        self.found["y"] = y

    def forward(self, x):
        self.inner(x)
        return self.found.pop("y")


def test_a_model_that_works_by_its_own_hooks_is_patched():
    model = ByHooks(build())
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    report = fused_lora.patch(model, rank=2, layers=[0], example_input=x[:1])
    assert len(report.rows) == 4 and model.found == {}
    torch.testing.assert_close(model(x), expected)


def test_hooks_that_make_a_weight_do_run():
    model = build()
    nn.utils.weight_norm(model.head)
    x = images(model)
    expected = model(x)
    fused_lora.patch(model, rank=2)
    torch.testing.assert_close(model(x), expected)
