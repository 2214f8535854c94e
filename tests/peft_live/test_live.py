"""A live PEFT model, patched: PEFT's own behaviours, its numbers, its parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import PatchError
from fused_lora.testing.yardstick import in_every_order, judge_all
from tests.patching.models import build

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TIMM = ["qkv", "fc1", "fc2", "attn.proj"]


def hf():
    """A two-block ViT of transformers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    return transformers.ViTModel(config).eval()


def beit():
    """A model that reads its qkv weight without calling the module."""
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("beit_base_patch16_224", depth=2, num_classes=5, **sizes).eval()


BASES = {
    "timm": (build, TIMM),
    "transformers": (hf, ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]),
    "bypassed": (beit, ["qkv", "fc1"]),
}
every_base = pytest.mark.parametrize("name", BASES)


def live(name="timm", noise=0.1, **options):
    """(PEFT's model with trained-looking adapters, an input)."""
    torch.manual_seed(0)
    make, targets = BASES[name]
    base = make()
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets} | options
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    stir(model, noise)
    return model, torch.randn(2, 3, 32, 32)


def stir(model, noise=0.1):
    """Every b off zero."""
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=noise)


def out(model, x):
    """The output as a tensor."""
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def twins(name="timm", **options):
    """(PEFT's own, the same patched, an input)."""
    plain, x = live(name, **options)
    fused = copy.deepcopy(plain)
    fused_lora.patch(fused)
    return plain, fused, x


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("mode", ["fp32", "autocast", "bf16 model"])
def test_output_and_gradients_by_the_yardstick(name, mode):
    plain, fused, x = twins(name)
    truth, dtype = copy.deepcopy(plain).double(), torch.float32
    if mode == "bf16 model":
        dtype = torch.bfloat16
        for model in (plain, fused):
            for module in model.modules():
                halves = [n for n in module._parameters if "lora" not in n]
                for key in halves:
                    if module._parameters[key] is not None:
                        module._parameters[key].data = module._parameters[key].data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        ours = grads(fused, x.to(dtype))
        theirs = in_every_order(lambda: grads(plain, x.to(dtype)))
    right = grads(truth, x.to(dtype).double())
    dtype = torch.bfloat16 if mode != "fp32" else dtype
    verdict = judge_all(ours, theirs, right, dtype)
    assert verdict.passed, str(verdict)


def away(y):
    """A target of y's shape, always the same."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)


def grads(model, x):
    """(y, every adapter gradient in one row)."""
    y = out(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * away(y)).float().mean(), trained)
    return y.detach(), torch.cat([g.flatten() for g in found])


def test_fused_calls_are_at_work_and_peft_casts_nothing_wide(monkeypatch):
    from fused_lora.nn import peft_linear

    seen, real = [], peft_linear.lora_linear
    monkeypatch.setattr(peft_linear, "lora_linear", lambda *a, **k: seen.append(1) or real(*a, **k))
    _, fused, x = twins()
    fused(x)
    assert len(seen) == 8


def test_a_weight_that_is_read_trains_where_peft_trains_nothing():
    plain, fused, x = twins("bypassed")
    name = "base_model.model.blocks.0.attn.qkv.lora_B.default.weight"
    for model, reached in ((plain, False), (fused, True)):
        out(model, x).sum().backward()
        grad = dict(model.named_parameters())[name].grad
        assert (grad is not None and bool(grad.any())) is reached
    merged = copy.deepcopy(fused).merge_and_unload()
    torch.testing.assert_close(out(fused, x), out(merged, x), **CLOSE)
    with fused.disable_adapter():
        torch.testing.assert_close(out(fused, x), out(plain.unload(), x), **CLOSE)


@every_base
def test_the_optimizer_goes_on_with_the_same_parameters(name):
    model, x = live(name)
    before = {key: id(p) for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    report = fused_lora.patch(model)
    assert {key: id(p) for key, p in model.named_parameters()} == before
    assert report.rows and not report.left_alone.keys() & {row.module for row in report.rows}
    model.train()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        y = out(model, x)
        loss = (y - away(y)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_base
def test_unpatch_gives_peft_its_layers_back(name):
    model, x = live(name)
    kinds = {key: type(m) for key, m in model.named_modules()}
    keys, y = list(model.state_dict()), out(model, x)
    fused_lora.patch(model)
    assert {key: type(m) for key, m in model.named_modules()} != kinds
    assert list(model.state_dict()) == keys
    fused_lora.unpatch(model)
    assert {key: type(m) for key, m in model.named_modules()} == kinds
    assert torch.equal(out(model, x), y)
    with pytest.raises(PatchError, match="carries PEFT's adapters"):
        fused_lora.unpatch(model)


class TestPeftsOwnBehaviours:
    def test_disable(self):
        plain, fused, x = twins()
        with fused.disable_adapter(), plain.disable_adapter():
            assert torch.equal(fused(x), plain(x))
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)

    def test_add_and_switch(self):
        plain, fused, x = twins()
        for model in (plain, fused):
            torch.manual_seed(3)
            model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=TIMM))
            stir(model)
            model.set_adapter("other")
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)
        for model in (plain, fused):
            model.delete_adapter("other")
            model.set_adapter("default")
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)

    def test_two_adapters_at_once(self):
        plain, fused, x = twins()
        for model in (plain, fused):
            torch.manual_seed(3)
            model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=TIMM))
            stir(model)
            model.base_model.set_adapter(["default", "other"])
        for ours, theirs in zip(grads(fused, x), grads(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)

    def test_merge_unmerge_and_unload(self):
        plain, fused, x = twins()
        y = fused(x)
        fused.merge_adapter()
        torch.testing.assert_close(fused(x), y, **CLOSE)
        fused.unmerge_adapter()
        torch.testing.assert_close(fused(x), y, **CLOSE)
        merged = copy.deepcopy(fused).merge_and_unload()
        assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in merged.modules())
        torch.testing.assert_close(merged(x), y, **CLOSE)
        torch.testing.assert_close(fused.unload()(x), plain.unload()(x), **CLOSE)

    def test_scaling_is_read_at_the_call(self):
        plain, fused, x = twins()
        for model in (plain, fused):
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.scale_layer(3.0)
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)

    def test_save_and_load(self, tmp_path):
        plain, fused, x = twins("transformers")
        fused.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = peft.PeftModel.from_pretrained(hf(), tmp_path).eval()
        torch.testing.assert_close(out(again, x), out(fused, x), **CLOSE)
        fused_lora.patch(again)
        torch.testing.assert_close(out(again, x), out(plain, x), **CLOSE)

    def test_load_adapter_into_a_patched_model(self, tmp_path):
        donor, x = live(noise=0.3)
        donor.save_pretrained(tmp_path)
        _, fused, _ = twins()
        fused.load_adapter(tmp_path, "donor")
        fused.set_adapter("donor")
        torch.testing.assert_close(fused(x), donor(x), **CLOSE)

    def test_one_adapter_per_sample(self):
        plain, fused, x = twins()
        names = ["default", "__base__"]
        ours, theirs = (m(x, adapter_names=names) for m in (fused, plain))
        assert torch.equal(ours, theirs)

    def test_dropout_in_training_is_pefts(self):
        plain, fused, x = twins(lora_dropout=0.5)
        results = []
        for model in (fused.train(), plain.train()):
            torch.manual_seed(5)
            results.append(model(x))
        assert torch.equal(*results)
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x), **CLOSE)

    def test_hooks_on_the_inner_modules_run(self):
        _, fused, x = twins()
        seen = []
        layer = fused.base_model.model.blocks[0].attn.qkv
        layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        fused(x)
        assert seen == [1]

    def test_deepcopy_and_pickle(self):
        _, fused, x = twins()
        y = fused(x)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(twin(x), y)
            fused_lora.unpatch(twin)


class TestLeftAlone:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"use_dora": True}, "DoraLinearVariant"),
            ({"lora_bias": True}, "has a bias"),
            ({"target_modules": ["patch_embed.proj"]}, "Conv2d, not PEFT's plain lora.Linear"),
        ],
    )
    def test_nothing_can_be_fused(self, options, reason):
        model, x = live(**options)
        y = model(x)
        kinds = {key: type(m) for key, m in model.named_modules()}
        with pytest.raises(PatchError, match=f"no layer of PEFT's can be fused: .*{reason}"):
            fused_lora.patch(model)
        assert {key: type(m) for key, m in model.named_modules()} == kinds
        assert torch.equal(model(x), y)

    def test_some_are_named_in_the_report(self):
        model, x = live(target_modules=["qkv", "proj"])  # proj is also the patch embedding's
        y = model(x)
        report = fused_lora.patch(model)
        (name,) = report.left_alone
        assert name == "base_model.model.patch_embed.proj"
        assert f"left alone: {name}: a peft.tuners.lora.layer.Conv2d" in str(report)
        assert {row.role for row in report.rows} == {"q|k|v", "out"}
        torch.testing.assert_close(model(x), y, **CLOSE)

    def test_torchs_attention(self):
        import torchvision

        base = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32).eval()
        config = peft.LoraConfig(r=2, target_modules=["self_attention", "mlp.0"])
        report = fused_lora.patch(peft.get_peft_model(base, config))
        assert [row.module[-5:] for row in report.rows] == ["mlp.0"]
        assert any("MultiheadAttention" in reason for reason in report.left_alone.values())

    def test_a_variant_added_later_is_pefts(self):
        plain, fused, x = twins()
        for model in (plain, fused):
            torch.manual_seed(3)
            config = peft.LoraConfig(r=2, target_modules=TIMM, use_dora=True)
            model.add_adapter("dora", config)
            stir(model)
            model.set_adapter("dora")
        assert torch.equal(fused(x), plain(x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 8}, "rank=8: the model carries PEFT's adapters already"),
            ({"targets": "q"}, "targets='q': the model carries"),
            ({"alpha": 2}, "alpha=2: the model carries"),
            ({"batch_size": 0}, "batch_size must be a whole number"),
            ({"example_input": torch.randn(1, 3, 40, 40)}, "a trial forward failed"),
        ],
    )
    def test_options(self, options, message):
        model, _ = live()
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=message):
            fused_lora.patch(model, **options)
        assert [type(m) for m in model.modules()] == kinds

    def test_twice(self):
        model, _ = live()
        fused_lora.patch(model)
        with pytest.raises(PatchError, match="already patched: .*qkv computes fused passes"):
            fused_lora.patch(model)

    @pytest.mark.parametrize("name", ["merge", "unmerge", "explain"])
    def test_what_is_pefts_to_do(self, name):
        model, _ = live()
        fused_lora.patch(model)
        with pytest.raises(PatchError, match="call PEFT's own methods"):
            getattr(fused_lora, name)(model)
        with pytest.raises(PatchError, match=r"call its merge_and_unload"):
            fused_lora.unpatch(model, merge=True)

    def test_save_and_load(self, tmp_path):
        model, _ = live()
        fused_lora.patch(model)
        with pytest.raises(fused_lora.AdapterFileError, match="PEFT's adapters: call its save_pre"):
            fused_lora.save(model, tmp_path / "a")
        with pytest.raises(fused_lora.AdapterFileError, match="PEFT's adapters"):
            fused_lora.load(model, tmp_path / "a")
