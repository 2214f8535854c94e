"""Both checkpoint modes over a frozen stem: the gradients of a model without checkpoints."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import fused_lora
from tests.patching.models import build, wake
from tests.stacks.test_accelerate import hf, out, torchvision_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model):
    model.train().zero_grad()
    out(model, X).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def check(model, expected):
    found = gradients(model)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def patched(make, before=lambda model: None):
    torch.manual_seed(0)
    model = make()
    before(model)
    fused_lora.patch(model, rank=4, seed=0)
    torch.manual_seed(1)
    return wake(model)


@pytest.fixture
def timm_reentrant():
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(False)


def by_transformers(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})


def by_timm(model):
    model.set_grad_checkpointing(True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "enable"), [(hf, by_transformers), (build, by_timm)], ids=["transformers", "timm"]
)
class TestReentrant:
    def test_on_before_patch_it_is_cured(self, make, enable, timm_reentrant):
        expected = gradients(patched(make))
        model = patched(make, enable)
        check(model, expected)
        check(copy.deepcopy(model), expected)
        check(pickle.loads(pickle.dumps(model)), expected)
        fused_lora.unpatch(model)
        assert not any(m._forward_hooks for m in model.modules())

    def test_on_after_patch_it_is_cured_when_asked(self, make, enable, timm_reentrant):
        expected = gradients(patched(make))
        model = patched(make)
        enable(model)
        with pytest.raises(RuntimeError, match="does not require grad"):
            gradients(model)  # torch's words: nothing would train
        handle = fused_lora.enable_input_grads(model)
        check(model, expected)
        with torch.no_grad():
            assert not out(model, X).requires_grad
        handle.remove()


@pytest.mark.parametrize("make", [hf, build, torchvision_vit])
def test_without_checkpoints_nothing_changes(make):
    model = patched(make)
    assert not any(m._forward_hooks for m in model.modules())
    expected = gradients(model)
    fused_lora.enable_input_grads(model)
    check(model, expected)


def test_the_other_way_needs_nothing():
    expected = gradients(patched(build))
    model = patched(build)
    model.set_grad_checkpointing(True)
    check(model, expected)


def test_a_model_without_a_stem_is_named():
    with pytest.raises(fused_lora.PatchError, match="Sequential has no patch embedding and n"):
        fused_lora.enable_input_grads(nn.Sequential(nn.Linear(2, 2)))
