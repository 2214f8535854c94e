"""DoRA and the middle matrix against their formulas, merged and not, and DoRA against PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_lora
from fused_lora.nn import FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.nn.variants import row_norms
from fused_lora.testing.yardstick import in_every_order, judge
from tests.patching.models import build, images, wake

SPANS = {"v": (12, 20), "q": (0, 8)}  # not in order, and with a gap
VARIANTS = [{"dora": True}, {"mid": "full"}, {"mid": "diagonal"}, {"dora": True, "mid": "full"}]


def module_of(grouped=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options |= {"scale": 0.5, "adapter_dtype": torch.promote_types(dtype, torch.float32)}
    if grouped:
        module = FusedLoRAGroupedLinear(12, 20, dtype=dtype, spans=SPANS, rank=3, **options)
    else:
        module = FusedLoRALinear(12, 20, dtype=dtype, rank=3, **options)
    module.weight.requires_grad_(False)
    for parameter in module.lora_parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def weight_of(module):
    """w' by the formula, the norm without a gradient."""
    w = module.weight.clone()
    for (name, span), s in zip(module.groups.items(), module.scales, strict=True):
        a, b = module.adapter(name)
        suffix = f"_{name}" if name else ""
        mid = getattr(module, f"lora_mid{suffix}", torch.ones(3, dtype=b.dtype))
        rows = w[span.start : span.stop] + s * b @ (torch.diag(mid) if mid.dim() == 1 else mid) @ a
        if module.config.dora:
            norm = rows.detach().norm(dim=1, keepdim=True)
            rows = getattr(module, f"lora_magnitude{suffix}")[:, None] * rows / norm
        w = torch.cat([w[: span.start], rows, w[span.stop :]])
    return w


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_forward_and_gradients_are_the_formula(options, grouped, dropout):
    module = module_of(grouped, dropout=dropout, **options)
    module.train(not dropout)  # in evaluation dropout is nothing
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    y, expected = module(x), F.linear(x, weight_of(module), module.bias)
    torch.testing.assert_close(y, expected)
    dy, leaves = torch.randn_like(y), (x, *module.lora_parameters())
    ours = torch.autograd.grad(y, leaves, dy)
    for found, wanted in zip(ours, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradcheck_of_what_is_not_detached(options):
    module = module_of(**options)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    own = [p for name, p in module.named_parameters() if "mid" in name or "magnitude" in name]
    if options.get("dora"):  # a and b, and mid, move a norm that takes no gradient
        own = [module.lora_magnitude]
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *own))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_is_within_the_yardstick_and_unmerge_restores(options, dtype):
    module = module_of(True, dtype, **options).eval()
    base, truth = module.weight, weight_of(copy.deepcopy(module).double()).detach()
    plain = in_every_order(lambda: weight_of(module).detach().to(dtype))
    module.merge()
    verdict = judge("w'", module.weight.detach(), plain, truth, dtype)
    assert verdict.passed, verdict
    module.unmerge()
    assert module.weight is base


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_patched_model_starts_as_its_base_trains_only_adapters_and_goes_back(options):
    model = build()
    x, y = images(model), None
    y = model(x)
    fused_lora.patch(model, rank=4, trainable=["^head"], **options)
    torch.testing.assert_close(model(x), y)
    wake(model)
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        trains = "lora_" in name or name.startswith("head")
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
    fused_lora.unpatch(model)
    assert torch.equal(model(x), y)
    assert not any("lora" in name for name in model.state_dict())


def test_a_vanilla_checkpoint_loads_strictly_and_a_whole_one_comes_back():
    plain = nn.Linear(12, 20, dtype=torch.float64)
    module, other = module_of(dora=True, mid="full"), module_of(dora=True, mid="full")
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module.weight, plain.weight)
    with torch.no_grad():
        other.lora_mid.add_(1)
    module.load_state_dict(other.state_dict())
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(module(x), other(x))


def test_dora_is_pefts():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, dtype=torch.float64))
    ours = FusedLoRALinear.adopt(
        copy.deepcopy(model[0]), 3, alpha=6, dora=True, adapter_dtype=torch.float64
    )
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(model, config).double().base_model.model[0]
    torch.testing.assert_close(theirs.lora_magnitude_vector["default"].weight, ours.lora_magnitude)
    with torch.no_grad():
        ours.lora_B.normal_()
        ours.lora_magnitude.mul_(torch.rand(20) + 0.5)
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
        theirs.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad)
    m = theirs.lora_magnitude_vector["default"].weight.grad
    torch.testing.assert_close(ours.lora_magnitude.grad, m)


def test_row_norms_without_a_second_weight():
    w, a, b = torch.randn(9, 7), torch.randn(3, 7), torch.randn(9, 3)
    expected = (w + 0.5 * b @ a).double().norm(dim=1)
    torch.testing.assert_close(row_norms(w, a, b, 0.5).double(), expected, rtol=1e-6, atol=0)


def test_a_frozen_pair_around_a_middle_keeps_h_and_not_x():
    module = FusedLoRALinear(64, 48, rank=2, mid="full")
    for p in (module.weight, module.bias, module.lora_A, module.lora_B):
        p.requires_grad_(False)
    x, kept = torch.randn(300, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}


def test_stochastic_rounding_of_magnitudes_is_refused():
    module = module_of(dtype=torch.bfloat16, dora=True)
    with pytest.raises(ValueError, match="rounding='stochastic' does not go with dora"):
        module.merge("stochastic")
    assert not module.merged
