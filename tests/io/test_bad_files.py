"""Every bad file is one named error, and the model stays what it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.blocks.0.attn.proj.lora_B.weight"


@pytest.fixture
def folder(patched, tmp_path):
    """A good folder."""
    fused_lora.save(patched(trainable=("^head",)), tmp_path / "good")
    return tmp_path / "good"


def _config(**changes):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return spoil


def _tensors(change):
    def spoil(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)  # without our header, as a foreign file

    return spoil


def _blob(change):
    return lambda folder: (folder / TENSORS).write_bytes(change((folder / TENSORS).read_bytes()))


def _flip(blob):
    return blob[:-1] + bytes([blob[-1] ^ 1])


def _pickle_only(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def _value(number):
    return lambda tensors: tensors[KEY].view(-1)[5:7].fill_(number)


BAD = {
    "no folder": (lambda f: f.rename(f.parent / "moved"), "good' does not exist"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} is missing; the folder holds"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"{TENSORS} is missing"),
    "pickle": (_pickle_only, "is a pickle, which is never read"),
    "json": (lambda f: (f / CONFIG).write_text('{"r": 4,'), f"{CONFIG}: no JSON: Expecting"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), f"{CONFIG}: no JSON"),
    "json list": (lambda f: (f / CONFIG).write_text("[]"), "expected an object, got list"),
    "foreign json": (lambda f: (f / CONFIG).write_text('{"model_type": "vit"}'), "no peft_type"),
    "loha": (_config(peft_type="LOHA"), "peft_type is 'LOHA'; only 'LORA'"),
    "dora": (_config(use_dora=True), "use_dora is True, and the model was patched with dora=False"),
    "bias": (_config(bias="lora_only"), "bias is 'lora_only'; only 'none'"),
    "unknown option": (_config(use_new=3), "use_new is 3, an option unknown here"),
    "rank text": (_config(r="4"), "r should be a whole number from 1, got '4'"),
    "rank zero": (_config(r=0), "r should be a whole number from 1, got 0"),
    "alpha nan": (_config(lora_alpha=float("nan")), "lora_alpha should be a finite number"),
    "alpha none": (_config(lora_alpha=None), "lora_alpha should be a finite number, got None"),
    "pattern": (_config(rank_pattern={"(": 3}), r"rank_pattern\['\('\] is no pattern"),
    "pattern value": (_config(alpha_pattern={"fc1": []}), r"alpha_pattern\['fc1'\] should be"),
    "pattern list": (_config(rank_pattern=[1]), r"rank_pattern should be an object, got \[1\]"),
    "names": (_config(modules_to_save=[3]), "modules_to_save should be a list of module names"),
    "config changed": (_config(lora_alpha=9), "config_sha256 is .* not written together"),
    "bit flipped": (_blob(_flip), "tensors_sha256 is .* or were changed since"),
    "truncated": (_blob(lambda blob: blob[:-100]), "no whole safetensors file"),
    "half a header": (_blob(lambda blob: blob[:20]), "no whole safetensors file"),
    "empty": (_blob(lambda blob: b""), "no whole safetensors file"),
    "pickle inside": (_blob(lambda blob: b"\x80\x04\x95" * 99), "no whole safetensors file"),
    "header": (_blob(lambda b: b.replace(b'"{\\"layout', b'"[\\"layout')), "cannot be read"),
    "newer": (_blob(lambda b: b.replace(b'layout\\": 1', b'layout\\": 2')), "layout 2, written by"),
    "missing": (_tensors(lambda t: t.pop(KEY)), f"missing {KEY} "),
    "unexpected": (
        _tensors(lambda t: t.update({KEY.replace(".0.", ".9."): torch.ones(1)})),
        "unexpected base_model.model.blocks.9.attn.proj.lora_B.weight",
    ),
    "head missing": (
        _tensors(lambda t: t.pop("base_model.model.head.bias")),
        "beside the adapters: missing base_model.model.head.bias",
    ),
    "base weight": (
        _tensors(lambda t: t.update({"base_model.model.norm.weight": torch.ones(48)})),
        "unexpected base_model.model.norm.weight",
    ),
    "head shape": (
        _tensors(lambda t: t.update({"base_model.model.head.bias": torch.ones(7)})),
        r"head.bias has shape \(7,\), the model's has \(5,\)",
    ),
    "shape": (
        _tensors(lambda t: t.update({KEY: torch.ones(48, 5)})),
        rf"{KEY} has shape \(48, 5\), the model's has \(48, 4\)",
    ),
    "rank differs": (
        _tensors(lambda t: t.update({KEY.replace("_B", "_A"): torch.ones(5, 48)})),
        r"lora_A.weight has shape \(5, 48\), but the config gives rank 4",
    ),
    "nan": (_tensors(_value(torch.nan)), f"{KEY} holds 2 non-finite values of 192"),
    "inf": (_tensors(_value(torch.inf)), f"{KEY} holds 2 non-finite values of 192"),
    "off block": (
        _tensors(lambda t: t[KEY.replace("proj", "qkv")][0, -1].fill_(1)),
        r'1 values of \(144, 12\) are not zero outside the blocks .* qkv="joint" and rank 12',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder(patched, snapshot, same, folder, name):
    spoil, message = BAD[name]
    spoil(folder)
    model = patched(noise=0.3, alpha=2)
    before = snapshot(model)
    with pytest.raises(fused_lora.AdapterFileError, match=message) as error:
        fused_lora.load(model, folder)
    assert str(folder) in str(error.value)
    assert same(model, before)


def test_mixed_pair_is_refused(patched, snapshot, same, folder, tmp_path):
    fused_lora.save(patched(scale=2.0, trainable=("^head",)), tmp_path / "other")
    (tmp_path / "other" / CONFIG).replace(folder / CONFIG)
    model = patched()
    before = snapshot(model)
    with pytest.raises(fused_lora.AdapterFileError, match="not written together"):
        fused_lora.load(model, folder)
    assert same(model, before)


def test_cosmetic_edits_of_the_config_are_no_damage(patched, folder):
    _config(base_model_name_or_path="timm/some_vit", inference_mode=False)(folder)
    fused_lora.load(patched(), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6}, r"lora_A.weight has shape \(12, 48\), the model's has \(18, 48\)"),
        ({"targets": ("q", "k", "v")}, "the file adapts .* patch the model as it was"),
        ({"adapter_dtype": torch.float16}, "torch.float16, which would round"),
    ],
)
def test_model_patched_otherwise(patched, snapshot, same, folder, options, message):
    model = patched(**options)
    before = snapshot(model)
    with pytest.raises(fused_lora.AdapterFileError, match=message):
        fused_lora.load(model, folder)
    assert same(model, before)


def test_model_not_ready(vit, patched, folder, tmp_path):
    with pytest.raises(fused_lora.AdapterFileError, match="call fused_lora.patch on it first"):
        fused_lora.load(vit(), folder)
    with pytest.raises(fused_lora.AdapterFileError, match="call fused_lora.patch on it first"):
        fused_lora.save(vit(), tmp_path / "none")
    model = patched()
    model.blocks[1].attn.proj.merge()
    with pytest.raises(fused_lora.AdapterFileError, match="blocks.1.attn.proj is merged"):
        fused_lora.load(model, folder)
    with pytest.raises(fused_lora.AdapterFileError, match="it is on meta"):
        fused_lora.load(patched().to("meta"), folder)


def test_save_refuses_what_load_would(patched, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(fused_lora.AdapterFileError, match="a file is in the way"):
            fused_lora.save(patched(), path)
    assert (tmp_path / "file").read_text() == "mine"
    model = patched()
    model.blocks[0].mlp.fc1.lora_B.data[3, 1] = torch.nan
    with pytest.raises(fused_lora.AdapterFileError, match="fc1.lora_B.weight holds 1 non-finite"):
        fused_lora.save(model, tmp_path / "nan")
    with pytest.raises(fused_lora.AdapterFileError, match="lora_A.weight holds no values"):
        fused_lora.save(patched().to("meta"), tmp_path / "meta")
    with pytest.raises(fused_lora.AdapterFileError, match="is a file, not a folder"):
        fused_lora.load(patched(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
