"""Scalings that are tensors, as PEFT's hotswapping makes them: compiled once, trained, swapped."""

import copy

import pytest
import torch
from torch import nn

import fused_lora
from tests.peft_live.test_live import CLOSE, away, live, out, stir, twins

peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

every = pytest.mark.parametrize("name", ["timm", "transformers"])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


@every
@pytest.mark.parametrize("patched", ["before", "after"])
def test_one_graph_before_and_after_a_hotswap(name, patched, tmp_path):
    """The donor's rank, alpha and numbers differ; nothing is compiled for them."""
    model, x = live(name)
    donor, _ = live(name, noise=0.3, r=6, lora_alpha=24)
    donor.save_pretrained(tmp_path)
    if patched == "before":
        fused_lora.patch(model)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    if patched == "after":
        fused_lora.patch(model)
    assert all(isinstance(m.scaling["default"], torch.Tensor) for m in layers(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(out(compiled, x), out(live(name)[0], x), **CLOSE)
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap.hotswap_adapter(model, tmp_path, "default")
            torch.testing.assert_close(out(compiled, x), out(donor, x), **CLOSE)
            for module in layers(model):
                module.scaling["default"].fill_(1.0)
            after = out(compiled, x)
        for module in layers(donor):
            module.scaling["default"] = 1.0
        torch.testing.assert_close(after, out(donor, x), **CLOSE)


def trained_scalings(model, shape=()):
    """Each layer's scaling as a parameter that trains."""
    found = []
    for module in layers(model):
        module.scaling["default"] = nn.Parameter(torch.full(shape, 1.5))
        found.append(module.scaling["default"])
    return found


@every
@pytest.mark.parametrize("how", ["eager", "compiled", "two adapters", "each column"])
def test_a_scaling_that_trains_has_pefts_gradient(name, how):
    plain, fused, x = twins(name)
    results = []
    for model in (plain, fused):
        if how == "two adapters":
            torch.manual_seed(3)
            targets = model.peft_config["default"].target_modules
            model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
            stir(model)
            model.base_model.set_adapter(["default", "other"])
        if how == "each column":
            scalings = [nn.Parameter(torch.full((m.out_features,), 1.5)) for m in layers(model)]
            for module, scaling in zip(layers(model), scalings, strict=True):
                module.scaling["default"] = scaling
        else:
            scalings = trained_scalings(model)
        compile_it = how == "compiled" and model is fused
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        y = out(run, x)
        weights = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad((y * away(y)).mean(), [*scalings, *weights])
        results.append((y.detach(), *found))
    assert all(float(grad.abs().max()) > 0 for grad in results[0][1:4])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_weight_that_is_read_trains_its_scaling_too():
    _, fused, x = twins("bypassed")
    scalings = trained_scalings(fused)
    truth = copy.deepcopy(fused)
    out(fused, x).square().sum().backward()
    for scaling, module in zip(scalings, layers(truth), strict=True):
        before = module.scaling["default"]
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                before.add_(step)
                losses.append(out(truth.double(), x.double()).square().sum().item())
                before.sub_(step)
        slope = (losses[0] - losses[1]) / 2e-3
        torch.testing.assert_close(scaling.grad.item(), slope, rtol=2e-2, atol=1e-3)
