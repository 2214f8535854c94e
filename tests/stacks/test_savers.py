"""Who rebuilds a model from its state dict is refused by name while the model is merged."""

import accelerate
import pytest
import safetensors.torch
import timm
import torch
import transformers
from timm.utils import ModelEmaV3

import fused_lora
from tests.patching.models import build, wake
from tests.stacks.test_accelerate import beit, hf, out, torchvision_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def patched(make=hf):
    torch.manual_seed(0)
    model = make()
    base = out(model, X).detach()
    fused_lora.patch(model, rank=4)
    y = out(wake(model), X).detach()
    assert float((y - base).abs().max()) > 1e-3
    return model, y


SAVERS = {
    "state_dict": lambda model, folder: model.state_dict(),
    "keep_vars": lambda model, folder: model.state_dict(keep_vars=True),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "safetensors": lambda model, folder: safetensors.torch.save_model(model, folder / "m"),
    "accelerate": lambda model, folder: accelerate.Accelerator(cpu=True).save_model(model, folder),
    "EMA": lambda model, folder: ModelEmaV3(model, decay=0).update(model),
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_a_merged_model_is_not_saved_as_its_base(saver, tmp_path):
    model, y = patched()
    fused_lora.merge(model)
    with pytest.raises(RuntimeError, match=r"state_dict: .*(q_proj|fc1).* is merged.*merge=True"):
        SAVERS[saver](model, tmp_path)
    torch.testing.assert_close(out(model, X), y, rtol=1e-4, atol=1e-5)
    fused_lora.unmerge(model)
    torch.testing.assert_close(out(model, X), y)


@pytest.mark.parametrize("make", [build, hf, beit, torchvision_vit])
def test_every_kind_of_weight_refuses(make):
    model, _ = patched(make)
    fused_lora.merge(model)
    with pytest.raises(RuntimeError, match="is merged"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="is merged"):
        model.load_state_dict(make().state_dict(), strict=False)
    fused_lora.unpatch(model, merge=True)
    other = make()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(out(other, X), out(model, X))


def test_save_pretrained_after_unpatch_writes_what_the_model_computes(tmp_path):
    model, y = patched()
    fused_lora.unpatch(model, merge=True)
    model.save_pretrained(tmp_path)
    other = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(out(other, X), y, rtol=1e-4, atol=1e-5)


def test_merge_and_unmerge_under_offload_are_refused_by_name():
    model, y = patched()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(fused_lora.PatchError, match=r"q_proj: merge: accelerate's Align"):
        fused_lora.merge(model)
    with pytest.raises(fused_lora.PatchError, match=r"q_proj: merge: accelerate's Align"):
        fused_lora.unpatch(model, merge=True)
    with torch.no_grad():
        torch.testing.assert_close(out(model, X), y)


def test_the_adapters_of_a_merged_model_are_saved(tmp_path):
    model, y = patched(build)
    fused_lora.merge(model)
    fused_lora.save(model, tmp_path)
    torch.manual_seed(0)
    other = build()
    fused_lora.patch(other, rank=4)
    fused_lora.load(other, tmp_path)
    torch.testing.assert_close(other(X), y)


def test_timm_checkpoints(tmp_path):
    model, y = patched(build)
    fused_lora.unpatch(model, merge=True)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    other = build()
    timm.models.load_checkpoint(other, str(tmp_path / "vit.pth"))
    torch.testing.assert_close(other(X), y, rtol=1e-4, atol=1e-5)
