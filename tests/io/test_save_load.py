"""Round trips keep every bit; a save that stops in the middle mixes nothing."""

import json
import os
import subprocess
import sys

import pytest
import safetensors
import torch

import fused_lora
from fused_lora.io import files
from fused_lora.io.files import read_pair, unpack
from fused_lora.io.fuse import fuse, groups_of, split
from fused_lora.io.peft import alpha_for, lookup, pattern_for, targets_for
from fused_lora.io.state_dict import written

ODD = {"q": 3, "k": 5, "blocks.1.mlp.fc1": 7}  # scales 16/3, 16/5, 16/4: no ratio is a power of 2

STRUCTURE = ("rank_pattern", "qkv", "targets")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},  # separate q, k, v; scale 1
        {"alpha": 16, "rank_pattern": ODD},  # scales that differ within one linear
        {"alpha": 3, "rank_stabilized": True, "rank_pattern": {"q": 8, "v": 7}},
        {"qkv": "joint", "alpha": 7},
        {"targets": ("q", "v"), "scale": 0.3},  # columns of k uncovered
    ],
    ids=["default", "odd scales", "rslora", "joint", "subset"],
)
def test_round_trip_keeps_every_bit(patched, snapshot, same, tmp_path, options, dtype):
    model = patched(adapter_dtype=dtype, **options)
    fused_lora.save(model, tmp_path / "new" / "folder")
    structure = {key: value for key, value in options.items() if key in STRUCTURE}
    other = patched(noise=0.7, adapter_dtype=dtype, **structure)  # its scales are all 1
    assert fused_lora.load(other, tmp_path / "new" / "folder") == []
    assert same(other, snapshot(model))


def test_scale_set_by_hand_and_zero_survive(patched, snapshot, same, tmp_path):
    model = patched()
    model.blocks[0].attn.qkv.set_scale(-0.1, "q")
    model.blocks[0].attn.qkv.set_scale(0.0, "k")  # folds b_k into nothing
    model.blocks[1].attn.proj.set_scale(1 / 3)
    fused_lora.save(model, tmp_path)
    other = patched(noise=0)
    fused_lora.load(other, tmp_path)
    assert same(other, snapshot(model))


def test_data_parallel_wrapper_leaves_no_trace(patched, snapshot, same, tmp_path):
    model, other = patched(), patched(0)
    fused_lora.save(torch.nn.DataParallel(model), tmp_path)
    assert not any(".module." in key for key in unpack_keys(tmp_path))
    fused_lora.load(torch.nn.DataParallel(other), tmp_path)
    assert same(other, snapshot(model))
    assert fused_lora.lora_state_dict(torch.nn.DataParallel(model)).keys() == (
        fused_lora.lora_state_dict(model).keys()
    )


def unpack_keys(folder):
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_state_dict_round_trip(patched, snapshot, same):
    model, other = patched(alpha=16, rank_pattern=ODD), patched(0, alpha=16, rank_pattern=ODD)
    state = fused_lora.lora_state_dict(model)
    assert state["base_model.model.blocks.0.attn.qkv.lora_A.weight"].shape == (3 + 5 + 4, 48)
    assert state["base_model.model.blocks.0.attn.qkv.lora_B.weight"].shape == (144, 3 + 5 + 4)
    fused_lora.load_lora_state_dict(other, state)
    assert same(other, snapshot(model))


def test_trained_head_is_kept_or_refused_never_lost(patched, snapshot, same, tmp_path):
    model = patched(trainable=("^head", "^norm"))
    fused_lora.save(model, tmp_path / "all")
    other = patched(noise=0, trainable=("^head",))  # what trains there does not matter
    loaded = fused_lora.load(other, tmp_path / "all")
    assert loaded == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert same(other, snapshot(model))
    fused_lora.save(model, tmp_path / "bare", trainable=False)
    assert fused_lora.load(other, tmp_path / "bare") == []


@pytest.mark.parametrize(
    "name", ["cls_token", "blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.weight"]
)
def test_trained_parameter_without_a_place_is_refused(patched, tmp_path, name):
    model = patched(trainable=(f"^{name}$",))
    with pytest.raises(fused_lora.AdapterFileError, match=f"{name} trains, but PEFT"):
        fused_lora.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    fused_lora.save(model, tmp_path / "a", trainable=False)


def test_merged_and_compiled_models_save_the_same(patched, tmp_path):
    model = patched()
    fused_lora.save(model, tmp_path / "plain")
    fused_lora.merge(model)
    fused_lora.save(model, tmp_path / "merged")
    fused_lora.unmerge(model)
    fused_lora.save(torch.compile(model), tmp_path / "compiled")
    contents = [read_pair(tmp_path / name) for name in ("plain", "merged", "compiled")]
    assert len({config for config, _ in contents}) == 1
    # the order of a header's metadata is not fixed, so what it says is compared
    said = [unpack(blob, json.loads(config), "file") for config, blob in contents]
    assert said[0].groups == said[1].groups == said[2].groups
    for key, tensor in said[0].tensors.items():
        assert all(torch.equal(tensor, other.tensors[key]) for other in said[1:])


def test_narrower_file_widens_and_wider_is_refused(patched, tmp_path):
    fused_lora.save(patched(adapter_dtype=torch.bfloat16), tmp_path / "bf16")
    wide = patched(noise=0)
    fused_lora.load(wide, tmp_path / "bf16")
    fused_lora.save(patched(), tmp_path / "fp32")
    narrow = patched(noise=0, adapter_dtype=torch.bfloat16)
    with pytest.raises(fused_lora.AdapterFileError, match="adapter_dtype=torch.float32"):
        fused_lora.load(narrow, tmp_path / "fp32")


def test_overwriting_leaves_two_files_and_what_else_was_there(patched, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    fused_lora.save(patched(), tmp_path)
    fused_lora.save(patched(rank=6), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", files.CONFIG, files.TENSORS]
    assert json.loads((tmp_path / files.CONFIG).read_text())["r"] == 6


def _failing_from(call, monkeypatch, once):
    calls, real = [0], os.replace

    def replace(source, destination):
        calls[0] += 1
        if calls[0] == call or (not once and calls[0] > call):
            raise OSError(f"stopped at replace {call}")
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("call", [1, 2, 3, 4])  # config out, tensors out, tensors in, config in
def test_error_in_the_middle_puts_the_old_pair_back(
    patched, snapshot, same, tmp_path, monkeypatch, call
):
    model, bigger = patched(), patched(rank=6)
    fused_lora.save(model, tmp_path)
    with monkeypatch.context() as patch:
        _failing_from(call, patch, once=True)
        with pytest.raises(OSError, match=f"replace {call}"):
            fused_lora.save(bigger, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [files.CONFIG, files.TENSORS]
    other = patched(noise=0)
    fused_lora.load(other, tmp_path)
    assert same(other, snapshot(model))


@pytest.mark.parametrize("call", [2, 3, 4])
def test_crash_in_the_middle_leaves_no_pair_rather_than_a_mixed_one(
    patched, tmp_path, monkeypatch, call
):
    fused_lora.save(patched(), tmp_path)
    with monkeypatch.context() as patch:
        _failing_from(call, patch, once=False)  # nothing can be put back either
        with pytest.raises(OSError, match="stopped"):
            fused_lora.save(patched(rank=6), tmp_path)
    assert not (tmp_path / files.CONFIG).exists()
    (staging,) = tmp_path.glob(files.STAGING + "*")
    assert (staging / f"old-{files.CONFIG}").exists()
    with pytest.raises(fused_lora.AdapterFileError, match="an interrupted save left"):
        fused_lora.load(patched(), tmp_path)
    fused_lora.save(patched(), tmp_path)
    fused_lora.load(patched(), tmp_path)


def test_same_config_is_one_replace(patched, tmp_path, monkeypatch):
    fused_lora.save(patched(), tmp_path)
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), real(a, b)))
    fused_lora.save(patched(noise=0.2), tmp_path)
    assert moved == [files.TENSORS]


def test_equal_scales_fold_nothing(patched):
    module = patched(scale=0.3).blocks[0].attn.qkv
    a, b, aside = fuse(groups_of(module), written(module, "it").pairs, module.out_features)
    assert not aside and torch.equal(b[48:96, 4:8], module.lora_B_k)
    assert torch.equal(split(a, b, groups_of(module), "b")["v"][0], module.lora_A_v)


def test_patterns_name_each_module_and_no_other():
    values = {"attn.qkv": 4, "x.attn.qkv": 8, "y.attn.qkv": 8}  # the first ends the others
    patterns = pattern_for(values, 8)
    assert all(lookup(patterns, name, 8) == value for name, value in values.items())
    assert targets_for(["a.qkv"], ["a", "a.qkv", "aa.qkv"]) == ["a.qkv"]
    assert targets_for(["a.qkv"], ["a.qkv", "b.a.qkv"]) == "a\\.qkv"


def test_alpha_gives_the_scale_back():
    for rank in (1, 3, 4, 7, 49, 128):
        for alpha in (1, 8, 16, 0.1, 1 / 3):
            scale = alpha / rank
            assert alpha_for(scale, rank) / rank == pytest.approx(scale, rel=4e-16)
    assert isinstance(alpha_for(16 / 7, 7), int)


def test_load_tells_what_else_it_set_in_order(patched, tmp_path):
    fused_lora.save(patched(trainable=("^head", "^norm")), tmp_path)
    told = [fused_lora.load(patched(noise=0), tmp_path) for _ in range(5)]
    assert told == [["head.bias", "head.weight", "norm.bias", "norm.weight"]] * 5


def test_import_needs_torch_alone():
    code = "import sys, fused_lora; print({'safetensors', 'peft', 'timm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
