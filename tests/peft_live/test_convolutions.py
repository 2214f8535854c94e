"""Convolutions that a LoraConfig or a file of PEFT's names: adapted in their kernel, alike."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import fused_lora
from fused_lora.io import AdapterFileError
from fused_lora.nn.child_adapters import FusedLoRAConvWeight, why_not_kernel
from tests.patching.models import build
from tests.peft_live.test_live import CLOSE, grads, hf, out, stir

peft = pytest.importorskip("peft")


def torchvision_vit():
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


MODELS = {  # how it is made, what PEFT is told to adapt, and the convolution's name
    "timm": (build, ["qkv", "proj", "fc1"], "patch_embed.proj"),
    "transformers": (hf, ["q_proj", "projection"], "embeddings.patch_embeddings.projection"),
    "torchvision": (torchvision_vit, ["conv_proj", "mlp.0", "mlp.3"], "conv_proj"),
}
every = pytest.mark.parametrize("name", MODELS)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def seeded(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


def config(name, **options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": MODELS[name][1]} | options)


def theirs(name, **options):
    """PEFT's own, with adapters that do something."""
    model = peft.get_peft_model(seeded(name), config(name, **options)).eval()
    stir(model)
    return model


def ours(name, folder, **options):
    """The same weights patched by the same config, with the adapters of a folder."""
    model = seeded(name)
    report = fused_lora.patch(model, config(name, **options))
    assert MODELS[name][2] in [row.module for row in report.rows]
    assert not any(type(m).__name__ == "Conv2d" for m in model.modules())
    fused_lora.load(model, folder)
    return model


@every
@pytest.mark.parametrize("patterns", [False, True])
def test_values_gradients_and_files_are_pefts(name, patterns, tmp_path):
    options = {}
    if patterns:
        conv = MODELS[name][2]
        options = {"rank_pattern": {conv: 2}, "alpha_pattern": {conv: 5}, "use_rslora": True}
    wanted = theirs(name, **options)
    wanted.save_pretrained(tmp_path)
    model = ours(name, tmp_path, **options)
    conv = model.get_submodule(MODELS[name][2])
    assert isinstance(conv, nn.Conv2d) and isinstance(conv.kernel, FusedLoRAConvWeight)
    assert conv.kernel.groups[""].rank == (2 if patterns else 4)
    found, right = grads(model, X), grads(wanted, X)
    torch.testing.assert_close(found[0], right[0], **CLOSE)
    torch.testing.assert_close(found[1].norm(), right[1].norm(), **CLOSE)
    wide, right = copy.deepcopy(model).double(), copy.deepcopy(wanted).double()
    for each in (wide, right):
        out(each, X.double()).square().sum().backward()
    kernel = wide.get_submodule(MODELS[name][2]).kernel
    layer = right.base_model.model.get_submodule(MODELS[name][2])
    for mine, half in ((kernel.lora_A, layer.lora_A), (kernel.lora_B, layer.lora_B)):
        grad = half["default"].weight.grad.flatten(1)
        assert grad.any()
        torch.testing.assert_close(mine.grad, grad, rtol=1e-7, atol=1e-10)
    fused_lora.save(model, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(seeded(name), tmp_path / "back").eval()
    torch.testing.assert_close(out(again, X), out(wanted, X), **CLOSE)
    once_more = ours(name, tmp_path / "back", **options)
    assert torch.equal(out(once_more, X), out(model, X))


@every
def test_disabled_merged_and_taken_off(name, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    model, base = ours(name, tmp_path), seeded(name)
    plain, y = out(base, X), out(model, X).detach()
    weight = model.get_submodule(MODELS[name][2])._parameters["weight"]
    with fused_lora.disable(model):
        torch.testing.assert_close(out(model, X), plain)
    fused_lora.merge(model)
    torch.testing.assert_close(out(model, X), y, **CLOSE)
    with fused_lora.disable(model):
        torch.testing.assert_close(out(model, X), plain)
    fused_lora.unmerge(model)
    assert model.get_submodule(MODELS[name][2])._parameters["weight"] is weight
    merged = copy.deepcopy(model)
    fused_lora.unpatch(merged, merge=True)
    torch.testing.assert_close(out(merged, X), y, **CLOSE)
    fused_lora.unpatch(model)
    torch.testing.assert_close(out(model, X), plain, rtol=0, atol=0)
    for left in (model, merged):
        assert [type(m) for m in left.modules()] == [type(m) for m in base.modules()]
        assert list(left.state_dict()) == list(base.state_dict())
        assert all(p.requires_grad for p in left.parameters())


@every
def test_copies_dtypes_compilers_and_checkpoints(name, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    model = ours(name, tmp_path)
    y = out(model, X).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin, X), y)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(out(wide, X.double()).float(), y, **CLOSE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(out(compiled, X), y, **CLOSE)
    torch._dynamo.reset()
    base = {k: 2 * v for k, v in seeded(name).state_dict().items()}
    model.load_state_dict(base)  # a vanilla checkpoint loads strictly
    weight = model.get_submodule(MODELS[name][2])._parameters["weight"]
    assert torch.equal(weight, base[MODELS[name][2] + ".weight"])


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_tracer_leaves_it_whole(name, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    model = ours(name, tmp_path)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(X), model(X), **CLOSE)
    traced(X).square().sum().backward()
    assert model.get_submodule(MODELS[name][2]).kernel.lora_B.grad.any()


def test_alone():
    """Where nothing else is named."""
    model, base = build(), build()
    base.load_state_dict(model.state_dict())
    report = fused_lora.patch(model, peft.LoraConfig(r=4, target_modules=["patch_embed.proj"]))
    assert [row.module for row in report.rows] == ["patch_embed.proj"]
    assert torch.equal(model(X), base(X))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "patch_embed.proj.kernel.lora_A",
        "patch_embed.proj.kernel.lora_B",
    }


def test_writes_to_the_kernel_reach_the_frozen_one(tmp_path):
    theirs("timm").save_pretrained(tmp_path)
    model = ours("timm", tmp_path)
    conv = model.patch_embed.proj
    nn.init.ones_(conv.weight)
    assert bool((conv._parameters["weight"] == 1).all())
    with fused_lora.disable(model):
        assert bool((conv.weight == 1).all())


class TestLeftAlone:
    """By a name and a reason in the report; PEFT adapts it, and ``load`` says what to do."""

    def test_dropout_would_drop_from_images(self):
        model = build()
        report = fused_lora.patch(model, config("timm", lora_dropout=0.1))
        assert (
            "lora_dropout=0.1 would drop from the images" in report.left_alone["patch_embed.proj"]
        )
        assert type(model.patch_embed.proj) is nn.Conv2d

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"groups": 3}, "of 3 groups"),
            ({"dilation": 2}, "dilation or padding"),
            ({"padding_mode": "reflect", "padding": 1}, "dilation or padding"),
        ],
    )
    def test_what_peft_would_compute_otherwise(self, options, reason):
        class Stem(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Conv2d(3, 3, 3, **{"padding": "same"} | options)
                self.vit = build()

            def forward(self, x):
                return self.vit(nn.functional.interpolate(self.stem(x), 32))

        model = Stem()
        report = fused_lora.patch(model, peft.LoraConfig(target_modules=r".*(stem|qkv)"))
        assert reason in report.left_alone["stem"]
        assert type(model.stem) is nn.Conv2d
        fused_lora.unpatch(model)
        with pytest.raises(fused_lora.PatchError, match=f"names 'stem': stem, .*{reason}"):
            fused_lora.patch(model, peft.LoraConfig(target_modules=["stem", "qkv"]))

    def test_another_class(self):
        class Own(nn.Conv2d):
            pass

        assert why_not_kernel(Own(3, 3, 3)) == "a Own, no plain convolution of torch's"
        with pytest.raises(TypeError, match="a Own, no plain convolution"):
            FusedLoRAConvWeight.attach(Own(3, 3, 3), 2)


def test_a_file_that_adapts_one_says_how_to_patch(tmp_path):
    theirs("timm").save_pretrained(tmp_path)
    model = build()
    fused_lora.patch(model, rank=4, qkv="joint", targets=["q", "k", "v", "out", "fc1"])
    with pytest.raises(AdapterFileError, match=r"patch_embed\.proj \(a Conv2d\).*from_pretrained"):
        fused_lora.load(model, tmp_path)
    fused_lora.load(model, tmp_path, leave_out=["patch_embed.proj"])


def test_a_kernel_of_another_shape_is_refused_and_nothing_changed(tmp_path):
    theirs("timm").save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = build(patch_size=4)
    fused_lora.patch(model, config("timm"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"patch_embed\.proj.*shape"):
        fused_lora.load(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
