"""What timm's own tests ask of every model, asked of small patched ones, against naive LoRA.

The truth is written without the library's layers: w + s b a in the place of each weight, in
float64, on a copy that has seen no patch. Inference, backward, features, intermediates,
checkpointing, EMA, layer decay, tracers, pruning of layers, another head.
"""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._pytree import tree_leaves

import fused_lora
from fused_lora.testing.families import of_timm
from fused_lora.testing.families.sweep import _adapters
from fused_lora.testing.families.truth import install
from tests.families.test_sweep import REFUSED
from tests.patching.models import wake

CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # some models compute positions in fp32
VIT = of_timm.VIT
MORE = {  # entry points whose defaults differ from those of the families' small models
    name: (name, VIT | options, 32)
    for name, options in {
        "test_vit": {},
        "test_vit2": {},
        "test_vit3": {},
        "test_vit4": {},
        "flexivit_small": {},
        "vit_base_patch8_224": {},
        "vit_base_patch16_siglip_gap_224": {},
        "vit_so400m_patch14_siglip_gap_224": {},
        "vit_medium_patch16_gap_240": {},
        "vit_medium_patch16_reg4_gap_256": {},
        "vit_little_patch16_reg4_gap_256": {},
        "vit_pwee_patch16_reg1_gap_256": {},
        "vit_wee_patch16_reg1_gap_256": {},
        "vit_base_patch16_rpn_224": {},
        "vit_base_patch16_xp_224": {},
        "vit_small_patch16_18x2_224": {},
        "vit_base_patch32_plus_256": {},
        "vit_giantopt_patch16_siglip_256": {},
        "vit_intern300m_patch14_448": {},
        "vit_xsmall_patch16_clip_224": {},
        "deit3_base_patch16_224": {},
        "vit_relpos_base_patch32_plus_rpn_256": {},
        "vit_srelpos_small_patch16_224": {},
        "vit_base_patch16_rope_reg1_gap_256": {},
        "vit_small_patch16_rope_mixed_ape_224": {},
        "beit3_base_patch16_224": {},
        "eva02_small_patch14_224": {},
        "cait_xs24_384": {},
        "xcit_tiny_12_p16_224": {"patch_size": 16},
    }.items()
}
MODELS = {k: v for k, v in of_timm.MODELS.items() if k not in REFUSED} | MORE
SAMPLE = (  # of the quick suite: a block of each kind
    *("ViT", "DINOv2 giant, packed SwiGLU", "BEiT", "EVA-02, q, k and v apart", "Swin", "LeViT"),
    *("CaiT", "Hiera", "ViT, parallel scaling block", "vit_medium_patch16_reg4_gap_256"),
)
every = pytest.mark.parametrize(
    "name",
    [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
pytestmark = pytest.mark.filterwarnings("ignore")


def wide(model: nn.Module) -> nn.Module:
    """In float64; complex buffers stay as they are."""
    return model._apply(lambda t: t.double() if t.is_floating_point() else t)


def off_its_zeros(model: nn.Module) -> nn.Module:
    """What starts at zero would keep gradients there, or at the kink of an activation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def small(name: str) -> nn.Module:
    """The model of ``MODELS``."""
    torch.manual_seed(0)
    if name not in MORE:
        return off_its_zeros(of_timm.build(name))
    entry, sizes, _ = MORE[name]
    return off_its_zeros(timm.create_model(entry, num_classes=5, **sizes).eval())


@functools.cache
def _made(name: str):
    plain = small(name)
    x = torch.randn(2, 3, *[MODELS[name][2]] * 2, generator=torch.Generator().manual_seed(1))
    mine = copy.deepcopy(plain)
    try:
        fused_lora.patch(mine, rank=2, seed=0, scale=0.5, example_input={"x": x})
    except fused_lora.PatchError as error:
        assert "joint" in str(error)  # heads come first in its fused projection
        fused_lora.patch(mine, rank=2, seed=0, scale=0.5, example_input={"x": x}, qkv="joint")
    torch.manual_seed(2)
    wake(mine, std=0.1)
    return wide(plain), wide(mine), x.double()


def twins(name: str):
    """(naive LoRA, its leaves in order, the patched model, an input), all to be used up."""
    plain, mine, x = _made(name)
    mine = copy.deepcopy(mine)
    truth, leaves = install(plain, _adapters(mine), torch.float64, by_weight=True)
    for part in (truth, mine):
        part.eval()
    return truth, leaves, mine, x


def halves(model: nn.Module) -> list[torch.Tensor]:
    """Every a and b, in the order of the truth's."""
    return [half for each in _adapters(model) for half in (each.a, each.b)]


def flat(output) -> torch.Tensor:
    """Every result of a model in one row."""
    return torch.cat([t.flatten() for t in tree_leaves(output) if isinstance(t, torch.Tensor)])


def compare(truth, leaves, model, call) -> None:
    """Results and gradients of ``call`` on either."""
    results = []
    for each, trained in ((truth, leaves), (model, halves(model))):
        torch.manual_seed(3)  # some draw masks
        y = flat(call(each))
        away = torch.randn(len(y), generator=torch.Generator().manual_seed(4), dtype=y.dtype)
        found = torch.autograd.grad((y * away).sum(), trained, allow_unused=True)
        results.append((y.detach(), found))
    (right, wanted), (y, found) = results
    assert y.isfinite().all()
    torch.testing.assert_close(y, right, **CLOSE)
    size = max(float(g.abs().max()) for g in wanted if g is not None)
    for own, other in zip(found, wanted, strict=True):
        if other is None or not other.any():
            assert own is None or float(own.abs().max()) <= 1e-9 * size
        else:
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8 * size)


def test_there_are_sixty_entry_points():
    assert len(MODELS) >= 60 and set(SAMPLE) <= set(MODELS)


@every
def test_inference(name):
    truth, _, model, x = twins(name)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(flat(model(x)), flat(truth(x)), **CLOSE)
    with torch.no_grad():
        before = flat(copy.deepcopy(_made(name)[0])(x))
        assert float((flat(model(x)) - before).abs().max()) > 1e-6  # the adapters do something


@every
def test_backward(name):
    """In training mode; what is frozen stays without a gradient."""
    truth, leaves, model, x = twins(name)
    compare(truth.train(), leaves, model.train(), lambda each: each(x))
    flat(model(x)).sum().backward()
    trained = {id(half) for half in halves(model)}
    assert all((p.grad is None) or id(p) in trained for p in model.parameters())


@every
def test_features_and_head(name):
    truth, leaves, model, x = twins(name)
    if not hasattr(truth, "forward_head"):
        pytest.skip("timm's model has no forward_head")
    compare(truth, leaves, model, lambda each: each.forward_features(x))
    y = model.forward_head(model.forward_features(x))
    torch.testing.assert_close(flat(y), flat(truth(x)), **CLOSE)


def supports(truth: nn.Module, method: str, *args) -> bool:
    """Whether timm's plain model has it."""
    if not hasattr(truth, method):
        return False
    try:
        getattr(truth, method)(*args)
    except Exception:
        return False
    return True


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_intermediates(name, checkpointing):
    truth, leaves, model, x = twins(name)
    if not supports(truth, "forward_intermediates", x):
        pytest.skip("timm's model gives no intermediates")
    if checkpointing:
        if not supports(truth, "set_grad_checkpointing", True):
            pytest.skip("timm's model is not checkpointed")
        model.set_grad_checkpointing(True)
        truth.train(), model.train()
    compare(truth, leaves, model, lambda each: each.forward_intermediates(x))


@every
def test_gradient_checkpointing(name):
    truth, leaves, model, x = twins(name)
    if not supports(truth, "set_grad_checkpointing", True):
        pytest.skip("timm's model is not checkpointed")
    truth.set_grad_checkpointing(False)
    model.set_grad_checkpointing(True)
    compare(truth.train(), leaves, model.train(), lambda each: each(x))


@every
def test_features_only(name):
    """timm's wrapper patched, and a patched model's own features in the wrapper's order."""
    entry, sizes, side = MODELS[name]
    if "." in entry or "block_fn" in sizes:
        pytest.skip("no entry point of timm's")
    # two images: of one, torch's BatchNorm2d in evaluation gives wrong gradients on a CPU where
    # the gradient that comes in lies channels last (2.14.1)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    try:
        plain = off_its_zeros(timm.create_model(entry, features_only=True, **sizes)).eval()
        copy.deepcopy(plain)(x)
    except Exception as error:
        pytest.skip(f"timm: {type(error).__name__}")
    model = copy.deepcopy(plain)
    options = {"rank": 2, "scale": 0.5, "example_input": x}
    try:
        fused_lora.patch(model, **options)
    except fused_lora.PatchError as error:
        assert "joint" in str(error)
        fused_lora.patch(model, qkv="joint", **options)
    wide(wake(model, std=0.1))
    truth, leaves = install(plain, _adapters(model), torch.float64, by_weight=True)
    compare(truth, leaves, model, lambda each: each(x.double()))


@every
def test_exponential_averages(name):
    _, _, model, x = twins(name)
    if not all(b.isfinite().all() for b in model.buffers() if b.is_floating_point()):
        pytest.skip("timm averages infinite buffers into NaN")
    ema = ModelEmaV3(model, decay=0.5, use_warmup=False)
    start = [half.detach().clone() for half in halves(model)]
    with torch.no_grad():
        for half in halves(model):
            half.add_(0.1)
    ema.update(model)
    often = collections.Counter(  # a parameter of several names is averaged once for each
        id(p) for _, p in model.named_parameters(remove_duplicate=False)
    )
    for half, old, averaged in zip(halves(model), start, halves(ema.module), strict=True):
        torch.testing.assert_close(averaged, half.lerp(old, 0.5 ** often[id(half)]), **CLOSE)
    truth, _ = install(_made(name)[0], _adapters(ema.module), torch.float64, by_weight=True)
    with torch.no_grad():
        torch.testing.assert_close(flat(ema.module.eval()(x)), flat(truth.eval()(x)), **CLOSE)
        assert float((flat(ema.module(x)) - flat(model(x))).abs().max()) > 1e-6


@every
def test_layer_decay(name):
    """An adapter's rate is that of the weight which it adapts."""
    plain, _, _ = _made(name)
    _, _, model, _ = twins(name)
    if not hasattr(plain, "group_matcher"):
        pytest.skip("timm's model has no group_matcher")
    layers = group_parameters(plain, plain.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(rates) == {id(p) for p in named.values() if p.requires_grad}
    for each in _adapters(model):
        layer = layers[f"{each.holder}.{each.tensor}"]
        assert rates[id(each.a)] == rates[id(each.b)] == 0.5 ** (last - layer)


@every
def test_a_tracer(name):
    """torch.fx follows what it follows of the plain model, or a sentence says what to do."""
    truth, leaves, model, x = twins(name)
    try:
        torch.fx.symbolic_trace(copy.deepcopy(_made(name)[0]))
    except Exception:
        pytest.skip("torch.fx does not follow timm's model")
    try:
        traced = torch.fx.symbolic_trace(model)
    except RuntimeError as error:
        assert "adapted weight" in str(error) and "unpatch first" in str(error)
        assert any(each.read for each in _adapters(model))
        return
    compare(truth, leaves, model, lambda each: traced(x) if each is model else each(x))


@every
def test_fewer_layers_and_another_head(name):
    truth, leaves, model, x = twins(name)
    if hasattr(truth, "prune_intermediate_layers"):
        for each in (truth, model):
            each.prune_intermediate_layers(1, prune_head=True)
        with torch.no_grad():
            y, right = (flat(each.forward_features(x)) for each in (model, truth))
        torch.testing.assert_close(y, right, **CLOSE)
    _, _, model, x = twins(name)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)
        _, _, truth, _ = twins(name)
        fused_lora.unpatch(truth, merge=True)
        truth.reset_classifier(0)
        with torch.no_grad():
            torch.testing.assert_close(flat(model(x)), flat(truth(x)), **CLOSE)
