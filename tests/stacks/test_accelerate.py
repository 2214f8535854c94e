"""accelerate's dispatch and offload, before and after ``patch``: served, or refused by name."""

import copy

import pytest
import torch
import transformers

import fused_lora
from fused_lora import PatchError
from tests.patching.models import build, wake

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import (  # noqa: E402
    attach_align_device_hook_on_blocks,
    remove_hook_from_submodules,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


def timm_vit():
    return build()


def hf():
    """A two-block ViT of transformers."""
    config = transformers.ViTConfig(**SIZES, intermediate_size=64, patch_size=8)
    return transformers.ViTForImageClassification(config).eval()


def beit():
    """A model that reads a weight without calling its module."""
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("beit_base_patch16_224", depth=2, num_classes=5, **sizes)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def torchvision_vit():
    """Bare weights of torch's own attention."""
    import torchvision

    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    torch.nn.init.normal_(model.heads.head.weight)
    return model.eval()


MODELS = {"timm": timm_vit, "transformers": hf, "read": beit, "bare": torchvision_vit}
every = pytest.mark.parametrize("name", MODELS)


def dispatched(model, **options):
    """Each module of its own runs where accelerate says, here on the CPU all the same."""
    devices = {name: torch.device("cpu") for name, _ in model.named_children()} | {
        "": torch.device("cpu")
    }
    attach_align_device_hook_on_blocks(model, execution_device=devices, **options)
    return model


def out(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def gradients(model, x):
    """The output, and the gradient of every adapter."""
    for parameter in model.parameters():
        parameter.grad = None
    y = out(model.train(), x)
    y.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert named and all(g is not None for g in named.values())
    return y.detach(), named


@every
def test_a_dispatched_model_is_patched_as_another(name):
    torch.manual_seed(0)
    base, x = MODELS[name](), torch.randn(2, 3, 32, 32)
    plain, hooked = copy.deepcopy(base), dispatched(copy.deepcopy(base))
    expected = out(plain, x)
    for model in (plain, hooked):
        fused_lora.patch(model, rank=4, seed=0)
        torch.manual_seed(1)
        wake(model)
    y, named = gradients(plain, x)
    mine, found = gradients(hooked, x)
    assert float((y - expected).detach().abs().max()) > 1e-3
    torch.testing.assert_close(mine, y)
    for key, gradient in named.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(out(hooked.eval(), x), out(plain.eval(), x))
    fused_lora.unpatch(hooked)
    torch.testing.assert_close(out(hooked, x), expected)
    remove_hook_from_submodules(hooked)
    torch.testing.assert_close(out(hooked, x), expected)


def test_the_report_says_that_hooks_keep_blocks_from_being_fused():
    report = fused_lora.patch(dispatched(build()), rank=4)
    assert len(report.blocks) == 2
    assert all("accelerate's AlignDevicesHook" in row.reason for row in report.blocks)
    report = fused_lora.patch(dispatched(hf()), rank=4)
    assert all(not row.members for row in report.shares)


@every
def test_dispatch_after_patch_then_unpatch(name):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, 3, 32, 32)
    expected = out(model, x)
    fused_lora.patch(model, rank=4)
    patched = out(wake(model), x)
    dispatched(model)
    torch.testing.assert_close(out(model, x), patched)
    fused_lora.merge(model)
    torch.testing.assert_close(out(model, x), patched, rtol=1e-4, atol=1e-5)
    fused_lora.unpatch(model)
    torch.testing.assert_close(out(model, x), expected)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(out(model, x), expected)


# where a weight is read without a call of its module, accelerate's own offload cannot bring it
called = pytest.mark.parametrize("name", ["timm", "transformers"])


@called
def test_patch_after_offload_is_refused_by_name(name):
    model, x = MODELS[name](), torch.randn(2, 3, 32, 32)
    expected = out(model, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(PatchError, match="AlignDevicesHook keeps its weights elsewhere.*patch fir"):
        fused_lora.patch(model, rank=4)
    torch.testing.assert_close(out(model, x), expected)


@called
def test_offload_after_patch_computes_as_before(name):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, 3, 32, 32)
    fused_lora.patch(model, rank=4)
    expected = out(wake(model), x).detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(out(model, x), expected)


@pytest.mark.parametrize("where", ["linear", "block", "mlp", "attn"])
def test_a_forward_bound_by_hand(where):
    """On a linear it is refused; around one, it goes on running and the report says so."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, 32, 32)
    block = model.blocks[0]
    module = {"linear": block.mlp.fc1, "block": block, "mlp": block.mlp, "attn": block.attn}[where]
    inner = module.forward
    module.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)
    expected = model(x)
    if where == "linear":
        with pytest.raises(PatchError, match=r"blocks\.0\.mlp\.fc1: a forward is bound to the ins"):
            fused_lora.patch(model, rank=4)
        torch.testing.assert_close(model(x), expected)
        return
    report = fused_lora.patch(model, rank=4)
    reasons = {row.name: row.reason for row in report.blocks}
    said = {
        "block": "a forward is bound to the instance",
        "mlp": "MLP: a Mlp has a forward of its own",
        "attn": "attention: ",
    }
    assert said[where] in reasons["blocks.0"] and not reasons["blocks.1"]
    torch.testing.assert_close(model(x), expected)
    model.train()
    torch.testing.assert_close(model(x), expected)


def test_unpatch_refuses_a_forward_bound_since():
    model = build()
    fused_lora.patch(model, rank=4)
    fc1, x = model.blocks[0].mlp.fc1, torch.randn(2, 3, 32, 32)
    inner = fc1.forward
    fc1.forward = lambda x: inner(x)
    with pytest.raises(PatchError, match=r"blocks\.0\.mlp\.fc1: release: a forward was bound"):
        fused_lora.unpatch(model)
    assert model(x).isfinite().all()
    del fc1.forward
    fused_lora.unpatch(model)
    assert model(x).isfinite().all()
