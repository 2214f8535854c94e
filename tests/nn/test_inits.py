"""Each init against its formula; whatever it does to the base is undone to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.nn import FusedLoRAGroupedLinear, FusedLoRALinear
from tests.patching.models import build

SPANS = {"q": (0, 8), "v": (12, 20)}
OF_BASE = ("pissa", "olora")


def pair(kind, dtype=torch.float64, grouped=False, **options):
    """A plain linear, and one adopted from its copy."""
    torch.manual_seed(0)
    plain = nn.Linear(12, 20, dtype=dtype)
    options |= {"init": kind, "adapter_dtype": torch.promote_types(dtype, torch.float32)}
    if kind == "svd":
        options |= {"mid": "full"}
    copied = copy.deepcopy(plain)
    if grouped:
        return plain, FusedLoRAGroupedLinear.adopt(copied, SPANS, 4, **options)
    return plain, FusedLoRALinear.adopt(copied, 4, **options)


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["orthogonal", "pissa", "olora", "svd"])
def test_it_starts_as_the_base_and_every_half_moves(kind, grouped, scale):
    plain, module = pair(kind, grouped=grouped, scale=scale)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x))
    module(x).square().sum().backward()
    assert any(p.requires_grad for p in module.lora_parameters())
    for parameter in module.lora_parameters():
        assert (parameter.grad is not None and parameter.grad.norm() > 0) or not (
            parameter.requires_grad
        )


def test_pissa_takes_the_largest_components():
    plain, module = pair("pissa", scale=2.0)
    u, sigma, vt = torch.linalg.svd(plain.weight.detach(), full_matrices=False)
    a, b = module.adapter()
    torch.testing.assert_close(2.0 * b @ a, u[:, :4] * sigma[:4] @ vt[:4])
    torch.testing.assert_close(module.weight, u[:, 4:] * sigma[4:] @ vt[4:])
    torch.testing.assert_close(torch.linalg.svdvals(2.0 * b), 2.0**0.5 * sigma[:4].sqrt())


def test_olora_takes_the_first_columns_of_q():
    plain, module = pair("olora", scale=2.0)
    q, r = torch.linalg.qr(plain.weight.detach())
    a, b = module.adapter()
    torch.testing.assert_close(b, q[:, :4])
    torch.testing.assert_close(2.0 * a, r[:4])
    torch.testing.assert_close(module.weight, plain.weight - q[:, :4] @ r[:4])


def test_orthogonal_halves_annul_each_other():
    _, module = pair("orthogonal")
    a, b = module.adapter()
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 2
    assert (b @ a).norm() < 1e-14 * b.norm() * a.norm()


def test_svd_freezes_a_and_b_around_a_middle_of_zeros():
    plain, module = pair("svd")
    u, sigma, vt = torch.linalg.svd(plain.weight.detach(), full_matrices=False)
    a, b = module.adapter()
    torch.testing.assert_close(b @ a, u[:, :4] * sigma[:4] @ vt[:4])
    assert not (a.requires_grad or b.requires_grad or module.lora_mid.any())
    assert module.lora_mid.requires_grad


@pytest.mark.parametrize("kind", OF_BASE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("merged", [False, True])
def test_unpatch_restores_every_bit_and_the_object(kind, dtype, merged):
    model = build().to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    fused_lora.patch(model, rank=4, init=kind)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
    if merged:
        fused_lora.merge(model)
    fused_lora.unpatch(model)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad, name


@pytest.mark.parametrize("kind", OF_BASE)
def test_merge_disable_and_unpatch_with_what_was_learned(kind):
    plain, module = pair(kind, scale=0.5)
    holder, x = nn.Sequential(module), torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.lora_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y, rest = module(x), module.weight
    assert not torch.allclose(y, plain(x))
    with fused_lora.disable(holder):
        assert torch.equal(module(x), plain(x))
    holder.eval()
    fused_lora.merge(holder)
    torch.testing.assert_close(module(x), y)
    with fused_lora.disable(holder):
        assert torch.equal(module(x), plain(x))
    fused_lora.unmerge(holder)
    assert module.weight is rest
    fused_lora.unpatch(holder, merge=True)
    assert type(module) is nn.Linear
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize("kind", OF_BASE)
def test_copies_casts_and_state_dicts(kind):
    plain, module = pair(kind, torch.float32)
    x = torch.randn(5, 12)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        twin.double()
        torch.testing.assert_close(twin(x.double()), plain(x).double())
        assert twin.release().weight.dtype is torch.float64
        assert torch.equal(twin.weight, plain.weight.double())
    _, other = pair(kind, torch.float32)
    with torch.no_grad():
        other.lora_B.add_(1.0)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), other(x))
    with pytest.raises(RuntimeError, match=f"started by init='{kind}', whose base is not the"):
        module.load_state_dict(plain.state_dict())


def test_resetting_starts_from_the_original_weight():
    plain, module = pair("pissa")
    first = module.weight.clone()
    with torch.no_grad():
        module.lora_A.zero_()
    module.reset_adapters()
    torch.testing.assert_close(module.weight, first)
    assert torch.equal(module.release().weight, plain.weight)


@pytest.mark.parametrize(
    "options, rank, message",
    [
        ({"init": "pissa", "scale": 0.0}, 4, r"init='pissa' divides by the scale, got \[0.0\]"),
        ({"init": "pissa"}, 13, "init='pissa' finds 12 components, got rank 13"),
        ({"init": "olora"}, 21, "init='olora' finds 12 components, got rank 21"),
        ({"init": "orthogonal"}, 1, "init='orthogonal' halves the rank: .* got 1"),
        ({"init": "svd"}, 4, "init='svd' freezes a and b around a trained middle: give mid"),
        ({"init": "pissa", "dora": True}, 4, "init='pissa' changes the base"),
        ({"init": "olora", "mid": "full"}, 4, "init='olora' changes the base"),
        ({"mid": "triangle"}, 4, r"mid must be None or one of \('diagonal', 'full'\), got 'tri"),
        ({"dora": 1}, 4, "dora must be True or False, got 1"),
    ],
)
def test_bad_input_changes_nothing(options, rank, message):
    linear = nn.Linear(12, 20)
    weight, state = linear.weight, set(linear.__dict__)
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.adopt(linear, rank, **options)
    assert type(linear) is nn.Linear and linear.weight is weight
    assert set(linear.__dict__) == state and set(linear._parameters) == {"weight", "bias"}


def test_on_meta():
    linear = nn.Linear(12, 20, device="meta")
    with pytest.raises(ValueError, match="reads the weight, which holds no values on meta"):
        FusedLoRALinear.adopt(linear, 4, init="pissa")


def test_slora_starts_from_the_largest_components_of_a_difference():
    layer = FusedLoRALinear(24, 20, rank=5, alpha=10.0, adapter_dtype=torch.float64).double()
    left, right = torch.randn(20, 5).double(), torch.randn(5, 24).double()
    u, sigma, vt = torch.linalg.svd(left @ right / layer.scales[0])
    layer.lora_A.data.copy_(vt[:5])
    layer.lora_B.data.copy_(u[:, :5] * sigma[:5])
    x = torch.randn(7, 24, dtype=torch.float64)
    whole = layer.weight + left @ right  # of rank 5, so nothing of it is lost
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, whole, layer.bias))
