"""What happens to PEFT's inner modules after ``patch``: PEFT's own forward goes on seeing it."""

import copy

import accelerate
import pytest
import torch
from torch import nn

import fused_lora
from tests.peft_live.test_live import CLOSE, live, out, twins

peft = pytest.importorskip("peft")


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))


def double(module, args, y):
    return 2 * y


class Halved(nn.Linear):
    """A base of another class, as a conversion to float8 swaps in."""

    def forward(self, x):
        return super().forward(x) / 2


HAPPENINGS = {
    "hook on base_layer": lambda m: m.base_layer.register_forward_hook(double),
    "hook on lora_A": lambda m: m.lora_A["default"].register_forward_hook(double),
    "hook on lora_dropout": lambda m: m.lora_dropout["default"].register_forward_hook(double),
    "bound forward": lambda m: setattr(
        m.base_layer, "forward", lambda x: 2 * nn.functional.linear(x, m.base_layer.weight)
    ),
    "another class": lambda m: setattr(m.base_layer, "__class__", Halved),
    "pruned base": lambda m: nn.utils.prune.l1_unstructured(m.base_layer, "weight", 0.5),
    "pruned half": lambda m: nn.utils.prune.l1_unstructured(m.lora_B["default"], "weight", 0.5),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.lora_A["default"]),
}


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("kind", HAPPENINGS)
def test_the_same_as_with_peft_alone(name, kind):
    plain, fused, x = twins(name)
    before = out(plain, x).detach()
    for model in (plain, fused):
        HAPPENINGS[kind](layer_of(model))
    y = out(plain, x)
    if kind not in ("hook on lora_dropout", "weight norm"):
        assert float((y.detach() - before).abs().max()) > 1e-4
    torch.testing.assert_close(out(fused, x), y, **CLOSE)


@pytest.mark.parametrize("kind", HAPPENINGS)
def test_found_by_patch_it_is_left_to_peft_or_computed_alike(kind):
    model, x = live()
    HAPPENINGS[kind](layer_of(model))
    expected = out(model, x).detach()
    report = fused_lora.patch(model)
    torch.testing.assert_close(out(model, x), expected, **CLOSE)
    if "hook" not in kind:
        assert any("blocks.0.attn.qkv" in name for name in report.left_alone)
    fused_lora.unpatch(model)
    torch.testing.assert_close(out(model, x), expected, **CLOSE)


def test_backward_hooks_fire():
    plain, fused, x = twins()
    seen = {}
    for word, model in (("plain", plain), ("fused", fused)):
        seen[word] = []
        layer_of(model).lora_A["default"].register_full_backward_pre_hook(
            lambda m, g, word=word: seen[word].append(g[0].shape)
        )
        out(model, x).sum().backward()
    assert seen["plain"] == seen["fused"] and seen["plain"]


def test_global_hooks_fire_as_often():
    plain, fused, x = twins()
    counts = []
    for model in (plain, fused):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, s=seen: s.append(m))
        try:
            out(model, x)
        finally:
            handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_offload_after_patch(name):
    plain, fused, x = twins(name)
    expected = out(plain, x).detach()
    accelerate.cpu_offload(fused, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(out(fused, x), expected, **CLOSE)
    fused_lora.unpatch(fused)
    with torch.no_grad():
        torch.testing.assert_close(out(fused, x), expected, **CLOSE)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_dispatch_before_and_after_patch(name):
    plain, fused, x = twins(name)
    expected = out(plain, x).detach()
    early = copy.deepcopy(plain)
    devices = {"": torch.device("cpu"), "base_model": torch.device("cpu")}
    accelerate.hooks.attach_align_device_hook_on_blocks(early, execution_device=devices)
    fused_lora.patch(early)
    accelerate.hooks.attach_align_device_hook_on_blocks(fused, execution_device=devices)
    for model in (early, fused):
        torch.testing.assert_close(out(model, x), expected, **CLOSE)
        fused_lora.unpatch(model)
        torch.testing.assert_close(out(model, x), expected, **CLOSE)


def test_layers_print_as_peft_prints_them():
    plain, fused, _ = twins()
    assert repr(layer_of(fused)) == repr(layer_of(plain))
    both = [[each.module_type for each in m.get_layer_status()] for m in (fused, plain)]
    assert both[0] == both[1] and set(both[0]) == {"lora.Linear"}
