"""What happens to PEFT's inner modules after ``patch``: PEFT's own forward goes on seeing it."""

import copy

import accelerate
import pytest
import torch
from torch import nn

import fused_lora
from tests.peft_live.test_live import CLOSE, grads, live, out, twins

peft = pytest.importorskip("peft")


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))


def double(module, args, y):
    return 2 * y


class Halved(nn.Linear):
    """A base of another class, as a conversion to float8 swaps in."""

    def forward(self, x):
        return super().forward(x) / 2


class Doubled(nn.Dropout):
    """A dropout of the user's, which does something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def bias_of_a_half(layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features))


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
    "half of another class": lambda m: setattr(m.lora_A["default"], "__class__", Halved),
    "bias of a half": bias_of_a_half,
    "dropout of another class": lambda m: m.lora_dropout.update({"default": Doubled(0.0)}),
    "activation for dropout": lambda m: m.lora_dropout.update({"default": nn.Tanh()}),
    "scaling of each column": lambda m: m.scaling.update(default=torch.rand(m.out_features) + 3),
    "scaling tensor": lambda m: m.scaling.update(default=torch.tensor(9.0)),
    "scaling of one element": lambda m: m.scaling.update(default=torch.tensor([9.0])),
}
PLAINLY_SERVED = ("dropout of another class", "activation for dropout", "scaling tensor")


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("kind", HAPPENINGS)
def test_the_same_as_with_peft_alone(name, kind):
    plain, fused, x = twins(name)
    before = out(plain, x).detach()
    for model in (plain, fused):
        torch.manual_seed(2)
        HAPPENINGS[kind](layer_of(model))
    y = out(plain, x)
    if kind not in ("hook on lora_dropout", "weight norm"):
        assert float((y.detach() - before).abs().max()) > 1e-4
    torch.testing.assert_close(out(fused, x), y, **CLOSE)


@pytest.mark.parametrize("kind", HAPPENINGS)
def test_found_by_patch_it_is_left_to_peft_or_computed_alike(kind):
    model, x = live()
    torch.manual_seed(2)
    HAPPENINGS[kind](layer_of(model))
    expected = out(model, x).detach()
    report = fused_lora.patch(model)
    torch.testing.assert_close(out(model, x), expected, **CLOSE)
    if "hook" not in kind and kind not in (*PLAINLY_SERVED, "scaling of one element"):
        assert any("blocks.0.attn.qkv" in name for name in report.left_alone)
    fused_lora.unpatch(model)
    torch.testing.assert_close(out(model, x), expected, **CLOSE)


def test_base_weight_of_another_type():
    """As torchao's conversions leave it: an nn.Linear whose weight computes by itself."""
    from torch.testing._internal.two_tensor import TwoTensor

    plain, fused, x = twins()
    results = []
    for model in (plain, fused):
        base = layer_of(model).base_layer
        w = base.weight.detach()
        base.weight = nn.Parameter(TwoTensor(w, 2 * w), requires_grad=False)
        results.append(out(model, x).detach())
    assert all(type(y) is TwoTensor for y in results)
    assert float((results[1].a - results[1].b).abs().max()) > 1e-4
    for half in ("a", "b"):
        ours, theirs = (getattr(y, half) for y in results)
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_dropout_that_drops_in_evaluation(name):
    """Monte Carlo dropout: the model evaluates, its dropouts train; the same masks as PEFT's."""
    plain, fused, x = twins(name, lora_dropout=0.5)
    still, draws = out(plain, x).detach(), {}
    for word, model in (("plain", plain), ("fused", fused)):
        for module in model.eval().modules():
            if isinstance(module, nn.Dropout):
                module.train()
        torch.manual_seed(3)
        draws[word] = torch.stack([out(model, x).detach() for _ in range(4)])
    assert torch.equal(draws["fused"], draws["plain"])
    assert float(draws["fused"].std(0).mean()) > 1e-3
    assert float((draws["fused"] - still).abs().mean()) > 1e-3


def test_dropout_that_rests_in_training():
    """The other way round, the fused pass computes."""
    plain, fused, x = twins(lora_dropout=0.5)
    for model in (plain, fused):
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    for ours, theirs in zip(grads(fused, x), grads(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def double_args(module, args):
    return tuple(2 * each for each in args)


def double_grad(module, grads, *_):
    return tuple(None if each is None else 2 * each for each in grads)


KINDS = {
    "forward_pre": double_args,
    "forward": double,
    "full_backward_pre": double_grad,
    "full_backward": double_grad,
}
INNER = {
    "base_layer": lambda m: m.base_layer,
    "lora_A": lambda m: m.lora_A["default"],
    "lora_B": lambda m: m.lora_B["default"],
    "lora_dropout": lambda m: m.lora_dropout["default"],
    "layer": lambda m: m,
}


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_every_kind_on_every_inner_module(kind, inner, name):
    """Each hook doubles what it is given: outputs and gradients are PEFT's with the same hook."""
    plain, fused, x = twins(name)
    before = grads(plain, x)
    layers = list(zip(*(peft_layers(model) for model in (plain, fused)), strict=True))
    for layer in layers[-2]:  # gradients of what comes before it flow through it
        getattr(INNER[inner](layer), f"register_{kind}_hook")(KINDS[kind])
    wanted, found = grads(plain, x), grads(fused, x)
    moved = max(float((a - b).abs().max()) for a, b in zip(wanted, before, strict=True))
    assert moved > 1e-5
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def peft_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


@pytest.mark.parametrize("kind", KINDS)
def test_global_hooks_of_every_kind_see_every_inner_module(kind):
    plain, fused, x = twins()
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    counts = []
    for model in (plain, fused):
        named = {module: name for name, module in model.named_modules()}
        seen = []
        handle = register(lambda m, *_, s=seen, n=named: s.append(n.get(m)) and None)
        try:
            grads(model, x)
        finally:
            handle.remove()
        counts.append(sorted(filter(None, seen)))
    assert counts[0] == counts[1]
    assert any("lora_A.default" in name for name in counts[0])


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
