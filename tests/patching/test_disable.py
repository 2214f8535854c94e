"""``disable`` is the base: what trains beside the adapters is shown as it was, or asked for."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import PatchError
from tests.patching.models import build
from tests.stacks.test_accelerate import hf, out, torchvision_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(model, lr=0.1):
    """One step of everything that trains."""
    model.train()
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trains, lr=lr)
    (out(model, X).square().sum() + 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


MODELS = {
    "timm": (build, ["^head", "^norm"]),
    "transformers": (hf, ["classifier", "layernorm"]),
    "torchvision": (torchvision_vit, ["heads", r"encoder\.ln"]),
    "biases": (build, ["bias", "cls_token"]),
    "one weight too": (build, [r"^blocks\.0\.mlp\.fc1\.weight"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_base_comes_back_to_the_bit(name, grad):
    make, trainable = MODELS[name]
    torch.manual_seed(0)
    model = make()
    before = out(model, X).detach()
    fused_lora.patch(model, rank=4, trainable=trainable)
    step(step(model))
    after = out(model, X).detach()
    assert float((after - before).abs().max()) > 1e-2
    parameters = dict(model.named_parameters())
    with fused_lora.disable(model), torch.set_grad_enabled(grad):
        y = out(model, X)
        torch.testing.assert_close(y.detach(), before, rtol=1e-4, atol=1e-5)
        assert not y.requires_grad
    assert all(parameters[key] is p for key, p in model.named_parameters())
    torch.testing.assert_close(out(model, X).detach(), after)
    with fused_lora.disable(model, trained="current"):
        other = out(model, X).detach()
    assert float((other - before).abs().max()) > 1e-3 < float((other - after).abs().max())


def test_as_peft_does_with_modules_to_save():
    torch.manual_seed(0)
    base = build()
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    theirs, mine = peft.get_peft_model(copy.deepcopy(base), config).eval(), copy.deepcopy(base)
    fused_lora.patch(mine, config)
    for model in (theirs, mine):
        step(model)
    with theirs.disable_adapter(), fused_lora.disable(mine):
        torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine(X), base(X), rtol=1e-4, atol=1e-5)


class WithNorm(nn.Module):
    """A head with running statistics and a weight tied to it."""

    def __init__(self):
        super().__init__()
        self.inner = build()
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 10)
        self.tied = nn.Linear(10, 10)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.tied(self.head(self.norm(self.inner(x))))


def test_buffers_and_tied_weights():
    model = WithNorm().eval()
    before = model(X).detach()
    fused_lora.patch(model, rank=4, trainable=["^head", "^norm", "^tied"], example_input=X[:2])
    step(model)
    assert model.norm.num_batches_tracked == 1
    with fused_lora.disable(model):
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    assert model.tied.weight is model.head.weight and model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_moves_have_theirs(way):
    model = build()
    before = model(X).detach()
    fused_lora.patch(model, rank=4, trainable="^head")
    twin = way(step(model))
    with fused_lora.disable(twin):
        torch.testing.assert_close(twin(X), before, rtol=1e-4, atol=1e-5)
    twin.double()
    with fused_lora.disable(twin):
        torch.testing.assert_close(twin(X.double()).float(), before, rtol=1e-4, atol=1e-5)
    assert not any("original" in key for key in twin.state_dict())
    fused_lora.unpatch(twin)
    assert not any("_fused_lora_original" in module.__dict__ for module in twin.modules())


class TestRefusals:
    def refuse(self, model, message):
        y = model(X).detach()
        with pytest.raises(PatchError, match=message), fused_lora.disable(model):
            pass
        assert torch.equal(model(X), y)
        with fused_lora.disable(model, trained="current"):
            model(X)

    def test_thawed_since(self):
        model = build()
        fused_lora.patch(model, rank=4)
        model.norm.weight.requires_grad_(True)
        self.refuse(model, r"norm\.weight trains beside the adapters.*trained=\"current\"")

    def test_another_base_loaded_since(self):
        model = build()
        fused_lora.patch(model, rank=4, trainable="^head")
        model.load_state_dict(build().state_dict())
        self.refuse(model, "another base was loaded since patch")

    def test_no_values_at_patch(self):
        with torch.device("meta"):
            model = build()
        fused_lora.patch(model, rank=4, trainable="^head")
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        message = r"head\.weight was on meta at patch"
        with pytest.raises(PatchError, match=message), fused_lora.disable(model):
            pass

    def test_a_word_that_means_nothing(self):
        model = build()
        fused_lora.patch(model, rank=4)
        message = "trained must be one of"
        with pytest.raises(PatchError, match=message), fused_lora.disable(model, trained="base"):
            pass
