"""Parameters whose content is swapped on conversion, and parts of parameters under torch.func."""

import pytest
import torch
from torch import nn

import fused_lora
from tests.distill.pairs import images as doubles
from tests.distill.test_share import pair
from tests.patching.models import build, wake
from tests.stacks.test_accelerate import beit, torchvision_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def swapping():
    """torch's future way to convert modules."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def trained(make, active=None, **options):
    """A patched model after a backward pass."""
    torch.manual_seed(0)
    model = make()
    fused_lora.patch(model, rank=4, **options)
    for module in wake(model).modules():
        if active and hasattr(module, "active_rank"):
            module.active_rank = active
    model(X).square().sum().backward()
    model.zero_grad()
    return model


@pytest.mark.parametrize("make", [build, beit, torchvision_vit])
@pytest.mark.parametrize("options", [{}, {"active": 2}, {"init": "pissa"}], ids=str)
def test_a_model_is_converted_and_trains_on(swapping, make, options):
    model = trained(make, **options)
    names = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        y = model(X)
    for _ in range(2):
        model.double()
        model(X.double()).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert grads and all(grad is not None and grad.any() for grad in grads)
        model.zero_grad()
    assert {name: id(p) for name, p in model.named_parameters()} == names
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()).float(), y, rtol=1e-4, atol=1e-4)
        fused_lora.merge(model.eval())
        torch.testing.assert_close(model.float()(X), y, rtol=1e-4, atol=1e-4)
        fused_lora.unmerge(model)
        torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-4)


def test_a_pair_that_shares_is_converted(swapping):
    both = nn.ModuleList(pair())
    x = doubles()
    sum(model(x).square().sum() for model in both).backward()
    both.zero_grad()
    both.to(torch.float32)
    sum(model(x.float()).square().sum() for model in both).backward()
    assert all(p.grad is not None for p in both.parameters() if p.requires_grad)


class TestTransforms:
    """``active_rank`` under torch.func, against autograd's own gradients."""

    def linear(self):
        module = fused_lora.FusedLoRALinear(
            8, 6, rank=4, dtype=torch.float64, adapter_dtype=torch.float64
        )
        nn.init.normal_(module.lora_B)
        module.active_rank = 2
        return module, torch.randn(3, 8, dtype=torch.float64)

    def test_grad(self):
        module, x = self.linear()
        values = {name: p.detach() for name, p in module.named_parameters()}

        def loss(p):
            return torch.func.functional_call(module, p, (x,)).square().sum()

        found = torch.func.grad(loss)(values)
        module(x).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)

    def test_vmap_and_per_sample_gradients(self):
        module, x = self.linear()
        torch.testing.assert_close(torch.func.vmap(module)(x), module(x))
        values = {name: p.detach() for name, p in module.named_parameters()}

        def loss(p, one):
            return torch.func.functional_call(module, p, (one,)).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
        for i in range(3):
            module.zero_grad()
            module(x[i]).square().sum().backward()
            torch.testing.assert_close(found["lora_B"][i], module.lora_B.grad)
            assert not found["lora_B"][i][:, 2:].any()
