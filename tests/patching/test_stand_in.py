"""May a forward be stood in for? Prune, parametrisations, replaced classes: one sentence each."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_lora
from fused_lora import PatchError
from fused_lora.nn.stand_in import replaced_forward
from tests.patching.models import build, wake

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MAKES = {  # the weight is made anew by somebody, in a way that torch offers
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight_mask by torch.nn.utils"),
    "by rows": (lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0), "weight_mask by torch.nn.u"),
    "twice": (lambda m: [prune.random_unstructured(m, "weight", 0.2) for _ in "12"], "prune.rem"),
    "weight norm": (parametrizations.weight_norm, "parametrized by _WeightNorm"),
    "orthogonal": (parametrizations.orthogonal, "parametrized by _Orthogonal"),
    "spectral norm": (parametrizations.spectral_norm, "parametrized by _SpectralNorm"),
    "old weight norm": (nn.utils.weight_norm, "no parameter but made by WeightNorm"),
    "old spectral norm": (nn.utils.spectral_norm, "no parameter but made by SpectralNorm"),
}
every_make = pytest.mark.parametrize("kind", MAKES)
ignore = pytest.mark.filterwarnings("ignore")


def refuse(model, message, **options):
    """``patch`` refuses, and the model computes and trains as before."""
    expected = model(X).detach()
    with pytest.raises(PatchError, match=message):
        fused_lora.patch(model, rank=4, **options)
    torch.testing.assert_close(model(X).detach(), expected)
    assert all(p.requires_grad for p in model.parameters())


@every_make
@ignore
def test_a_made_weight_is_refused_by_name(kind):
    make, message = MAKES[kind]
    model = build()
    make(model.blocks[1].mlp.fc1)
    refuse(model, rf"blocks\.1\.mlp\.fc1: its weight is .*{message}")
    refuse(model, rf"blocks\.1\.mlp\.fc1: its weight is .*{message}", keep_forward=True)


@every_make
@ignore
def test_a_bare_weight_that_is_made_is_refused_by_name(kind):
    make, message = MAKES[kind]
    if kind == "orthogonal":
        pytest.skip("takes weights named weight alone")
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).eval()
    attention = model.encoder.layers[0].self_attention
    tensor = "in_proj_weight"
    if "pruned" in kind:
        prune.l1_unstructured(attention, tensor, 0.5)
    elif kind == "weight norm":
        parametrizations.weight_norm(attention, tensor)
    elif kind == "spectral norm":
        parametrizations.spectral_norm(attention, tensor)
    else:
        pytest.skip("covered by the others")
    refuse(model, r"encoder_layer_0\.self_attention: its in_proj_weight is ")


def test_a_pruned_linear_is_patched_once_pruning_is_made_final():
    model = build()
    fc1 = model.blocks[1].mlp.fc1
    prune.l1_unstructured(fc1, "weight", 0.5)
    expected = model(X)
    prune.remove(fc1, "weight")
    fused_lora.patch(model, rank=4)
    torch.testing.assert_close(model(X), expected)
    zeros = int((fc1.weight == 0).sum())
    assert zeros == fc1.weight.numel() // 2


@every_make
@ignore
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("level", ["block", "linear"])
def test_made_after_patch_it_computes_with_what_is_made(kind, grad, level):
    """y = x w^T + s h b^T with w as it is made; merge is refused by name."""
    make, _ = MAKES[kind]
    torch.manual_seed(0)
    model = build()
    fused_lora.patch(model, rank=4, level=level)
    wake(model)
    plain, fc1 = copy.deepcopy(model), model.blocks[1].mlp.fc1
    torch.manual_seed(3)
    make(fc1)
    with torch.no_grad():
        model(X)  # torch's old hooks make the weight before a forward
        made = fc1.weight.clone()
    with torch.no_grad():
        plain.blocks[1].mlp.fc1.weight.copy_(made)
    model.train(), plain.train()
    if "spectral" in kind:
        model.eval(), plain.eval()  # its power iteration goes on in training
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)
    if grad:
        a, b = fc1.adapter()
        for run, mine in ((model, (a, b)), (plain, plain.blocks[1].mlp.fc1.adapter())):
            run.zero_grad()
            run(X).square().sum().backward()
            assert all(half.grad is not None for half in mine)
        torch.testing.assert_close(
            b.grad, plain.blocks[1].mlp.fc1.adapter()[1].grad, rtol=1e-3, atol=1e-4
        )
    model.eval()
    with pytest.raises(PatchError, match=r"blocks\.1\.mlp\.fc1: merge: its weight is"):
        fused_lora.merge(model)
    assert not any(getattr(m, "merged", False) for m in model.modules())


@ignore
def test_prune_after_patch_and_back():
    model = build()
    base = copy.deepcopy(model)
    fused_lora.patch(model, rank=4)
    fc1 = model.blocks[1].mlp.fc1
    for target in (fc1, base.blocks[1].mlp.fc1):
        prune.l1_unstructured(target, "weight", 0.5)
    pickle.loads(pickle.dumps(model))
    prune.remove(fc1, "weight")
    fused_lora.merge(model)
    fused_lora.unpatch(model)
    torch.testing.assert_close(model(X), base(X))
    fused_lora.patch(model, rank=4)
    prune.l1_unstructured(fc1, "weight", 0.1)
    fused_lora.unpatch(model)
    assert type(fc1) is nn.Linear and model(X).isfinite().all()


def test_a_parametrisation_must_be_taken_off_before_unpatch():
    model = build()
    fused_lora.patch(model, rank=4)
    wake(model)
    y = model(X).detach()
    fc1 = model.blocks[1].mlp.fc1
    parametrizations.weight_norm(fc1)
    with pytest.raises(PatchError, match=r"blocks\.1\.mlp\.fc1: release: .*are parametrized"):
        fused_lora.unpatch(model)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    parametrize.remove_parametrizations(fc1, "weight")
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    fused_lora.unpatch(model)


class TestReplacedForwards:
    @pytest.mark.parametrize("part", ["block", "attn", "mlp", "act", "norm1", "attn_drop"])
    def test_over_a_replaced_class_nothing_is_fused(self, monkeypatch, part):
        model = build()
        block = model.blocks[0]
        inner = {"block": block, "act": block.mlp.act, "attn_drop": block.attn.attn_drop}
        kind = type(inner[part] if part in inner else getattr(block, part))
        plain = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, *a, **k: 1.5 * plain(self, x, *a, **k))
        expected = model(X).detach()
        report = fused_lora.patch(model, rank=4)
        assert all(
            "was replaced by" in row.reason for row in report.blocks if row.name.count(".") == 1
        )
        for mode in (True, False):
            torch.testing.assert_close(model.train(mode)(X).detach(), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected)

    def test_a_linear_with_a_replaced_forward_is_refused(self, monkeypatch):
        plain = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
        refuse(build(), r"blocks\.0\.attn\.qkv: the forward of class Linear was replaced by")

    def test_classes_as_they_were_written_are_known(self):
        kinds = {
            type(m) for m in build(qk_norm=True, init_values=1e-5, drop_path_rate=0.1).modules()
        }
        kinds |= {nn.Linear, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.Identity}
        assert not [kind for kind in kinds if replaced_forward(kind)]

    def test_a_subclass_is_not_a_replacement(self):
        class Other(nn.Linear):
            pass

        assert replaced_forward(Other) is None
