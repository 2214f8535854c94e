"""Files of dora, mid, pissa and olora: what plain PEFT computes of them, and the way back."""

from __future__ import annotations

import pytest
import torch

import fused_lora
from tests.io.test_layouts import edit

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TARGETS = ["attn.qkv", "attn.proj", "fc1", "fc2"]


def theirs_of(vit, folder):
    return peft.PeftModel.from_pretrained(vit(), folder).eval()


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16,
    )  # fmt: skip
    return transformers.ViTModel(config).eval()


def shaken(model, noise=0.1):
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return model


class TestDora:
    @pytest.mark.parametrize(
        "options",
        [
            {"alpha": 8},
            {"alpha": 8, "rank_pattern": {"q": 3, "k": 5}, "rank_stabilized": True},
            {"alpha": 8, "qkv": "joint"},
            {"targets": ["q", "v"]},  # k's rows belong to no adapter
        ],
        ids=["apart", "odd ranks", "joint", "q and v"],
    )
    def test_peft_computes_it_and_it_comes_back(self, vit, patched, image, tmp_path, options):
        model = patched(dora=True, **options)
        fused_lora.save(model, tmp_path / "ours")
        theirs = theirs_of(vit, tmp_path / "ours")
        torch.testing.assert_close(theirs(image), model(image), **CLOSE)
        theirs.save_pretrained(tmp_path / "theirs")
        for name in ("ours", "theirs"):
            other = patched(dora=True, noise=0, **options)
            fused_lora.load(other, tmp_path / name)
            torch.testing.assert_close(other(image), model(image), **CLOSE)

    @pytest.mark.parametrize("qkv", ["joint", "separate"])
    def test_a_file_of_peft_loads(self, vit, patched, image, tmp_path, qkv):
        config = peft.LoraConfig(r=6, lora_alpha=3, target_modules=TARGETS, use_dora=True)
        theirs = peft.get_peft_model(vit(), config).eval()
        shaken(theirs)
        for name, b in theirs.named_parameters():
            if "qkv.lora_B" in name:  # three of rank 2 are one of rank 6 where b is in blocks
                parts = [part[:, 2 * i : 2 * i + 2] for i, part in enumerate(b.data.chunk(3))]
                b.data.copy_(torch.block_diag(*parts))
        theirs.save_pretrained(tmp_path)
        ranks = {r"attn\.qkv": 2 if qkv == "separate" else 6}
        model = patched(dora=True, qkv=qkv, rank=6, rank_pattern=ranks)
        fused_lora.load(model, tmp_path)
        torch.testing.assert_close(model(image), theirs(image), **CLOSE)

    def test_on_transformers(self, tmp_path):
        model, x = transformers_vit(), torch.randn(2, 3, 32, 32)
        fused_lora.patch(model, rank=3, dora=True)
        shaken(model)
        fused_lora.save(model, tmp_path)
        theirs = theirs_of(transformers_vit, tmp_path)
        ours = model(x).last_hidden_state
        torch.testing.assert_close(theirs(x).last_hidden_state, ours, **CLOSE)

    def test_state_dicts_hold_it(self, patched, image):
        model, other = patched(dora=True), patched(dora=True, noise=0)
        fused_lora.load_lora_state_dict(other, fused_lora.lora_state_dict(model))
        assert torch.equal(other(image), model(image))

    def test_merged_it_is_written_alike(self, vit, patched, image, tmp_path):
        model = patched(dora=True).eval()
        expected = model(image)
        fused_lora.merge(model)
        fused_lora.save(model, tmp_path)
        torch.testing.assert_close(theirs_of(vit, tmp_path)(image), expected, **CLOSE)


class TestMid:
    @pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "svd"}], ids=str)
    @pytest.mark.parametrize("mid", ["diagonal", "full"])
    def test_folded_peft_computes_it(self, vit, patched, image, tmp_path, mid, options):
        model = patched(mid=mid, alpha=8, **options)
        fused_lora.save(model, tmp_path, fold_mid=True)
        torch.testing.assert_close(theirs_of(vit, tmp_path)(image), model(image), **CLOSE)
        other = patched(noise=0, dora="dora" in options)
        fused_lora.load(other, tmp_path)
        torch.testing.assert_close(other(image), model(image), **CLOSE)


class TestChangedBase:
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("qkv", ["separate", "joint"])
    def test_written_against_the_original(self, vit, patched, image, tmp_path, init, qkv):
        model = patched(init=init, qkv=qkv, alpha=6, noise=0.02)
        fused_lora.save(model, tmp_path)
        assert (model(image) - vit()(image)).abs().max() > 0.01
        torch.testing.assert_close(theirs_of(vit, tmp_path)(image), model(image), **CLOSE)
        other = patched(rank=8, qkv=qkv, noise=0)
        fused_lora.load(other, tmp_path)
        torch.testing.assert_close(other(image), model(image), **CLOSE)

    def test_after_a_change_of_scale_and_merged(self, vit, patched, image, tmp_path):
        model = patched(init="pissa", noise=0.02).eval()
        for module in model.modules():
            if isinstance(module, fused_lora.nn.AdaptedLinear):
                module.set_scale(0.5)
        expected = model(image)
        fused_lora.merge(model)
        fused_lora.save(model, tmp_path)
        torch.testing.assert_close(theirs_of(vit, tmp_path)(image), expected, **CLOSE)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_what_peft_converted_loads(self, vit, patched, image, tmp_path, init):
        names = ["attn.proj", "fc1"]
        config = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=init)
        theirs = peft.get_peft_model(vit(), config).eval()
        theirs.save_pretrained(tmp_path / "start")
        shaken(theirs, 0.02)
        theirs.save_pretrained(
            tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
        model = patched(targets=["out", "fc1"], rank=6)
        fused_lora.load(model, tmp_path / "end")
        torch.testing.assert_close(model(image), theirs(image), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mid": "full"}, r"blocks.0.attn.qkv carries mid='full', .* save with fold_mid=True"),
        ({"dora": True, "layout": "blocks"}, "PEFT's BdLora has no dora"),
        ({"init": "pissa", "scale": 1.0, "set": 0.0}, "neither .* nor with a scale of 0"),
        ({"init": "pissa", "base": True}, "another base was loaded into it"),
    ],
    ids=["mid", "blocks", "no scale", "another base"],
)
def test_what_cannot_be_written(patched, tmp_path, options, message):
    given = {k: v for k, v in options.items() if k in ("mid", "dora", "init", "scale")}
    model, linear = patched(**given), None
    linear = model.blocks[1].mlp.fc1
    if "set" in options:
        linear.set_scale(options["set"])
    if "base" in options:
        linear.weight.data.mul_(1.1)
    with pytest.raises(fused_lora.AdapterFileError, match=message):
        fused_lora.save(model, tmp_path / "new", layout=options.get("layout", "dense"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dora": True}, "use_dora is False, and the model was patched with dora=True"),
        ({"mid": "full"}, "carries mid='full', which no file holds apart"),
        ({"init": "olora"}, r"on a base of its own: patch the plain model with rank \[8\]"),
    ],
    ids=str,
)
def test_models_that_a_plain_file_does_not_fit(patched, snapshot, same, tmp_path, options, message):
    fused_lora.save(patched(), tmp_path)
    model = patched(**options)
    before = snapshot(model)
    with pytest.raises(fused_lora.AdapterFileError, match=message):
        fused_lora.load(model, tmp_path)
    assert same(model, before)


def test_files_of_dora_that_do_not_fit(patched, tmp_path):
    fused_lora.save(patched(dora=True), tmp_path)
    with pytest.raises(fused_lora.AdapterFileError, match="use_dora is True, and the model"):
        fused_lora.load(patched(), tmp_path)
    with pytest.raises(fused_lora.AdapterFileError, match="scales rows that carry no adapter here"):
        model = patched(dora=True)
        fused_lora.save(patched(dora=True, targets=["q", "v"], noise=0), tmp_path / "qv")
        state = fused_lora.lora_state_dict(patched(dora=True, targets=["q", "v"], noise=0))
        key = next(key for key in state if key.endswith("lora_magnitude_vector"))
        state[key] = state[key] * 1.5
        model = patched(dora=True, targets=["q", "v"])
        fused_lora.load_lora_state_dict(model, state)
    edit(tmp_path, use_dora=False)
    with pytest.raises(fused_lora.AdapterFileError, match="unexpected .*lora_magnitude_vector"):
        fused_lora.load(patched(), tmp_path)


def test_state_dicts_refuse_what_a_file_alone_can_hold(patched):
    for options in ({"mid": "full"}, {"init": "pissa"}):
        with pytest.raises(fused_lora.AdapterFileError, match="blocks.0.attn.qkv"):
            fused_lora.lora_state_dict(patched(**options))
