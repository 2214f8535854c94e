"""Plain ``patch(model)``: the image that the trial forward is given when none is."""

import pytest
import timm
import torch
from torch import nn

import fused_lora
from fused_lora.patching.example import examples_for
from tests.patching.models import build

MODELS = {  # entry point and options, all on meta: (name, options, channels, side)
    "hybrid stem": ("vit_tiny_r_s16_p8_224", {}, 3, 224),
    "hybrid, 26 layers": ("vit_base_r26_s32_224", {}, 3, 224),
    "hybrid, ResNet": ("vit_base_resnet26d_224", {}, 3, 224),
    "hybrid, four channels": ("vit_base_r26_s32_224", {"in_chans": 4, "img_size": 128}, 4, 128),
    "VOLO": ("volo_d1_224", {}, 3, 224),
    "VOLO, one channel": ("volo_d1_224", {"in_chans": 1}, 1, 224),
    "features alone": ("vit_tiny_patch16_224", {"features_only": True, "img_size": 64}, 3, 64),
    "features of a Swin": ("swin_tiny_patch4_window7_224", {"features_only": True}, 3, 224),
    "another size": ("vit_tiny_patch16_224", {"img_size": (96, 64), "in_chans": 5}, 5, 96),
    "LeViT": ("levit_128s", {}, 3, 224),
    "LeViT, five channels": ("levit_128s", {"in_chans": 5}, None, None),
    "XCiT": ("xcit_nano_12_p8_224", {}, 3, 224),
    "Twins": ("twins_svt_small", {"in_chans": 2}, None, None),
    "MaxViT": ("maxvit_nano_rw_256", {}, 3, 256),
    "PVT": ("pvt_v2_b0", {"in_chans": 1}, 1, 224),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_no_size_need_be_named(name, training):
    entry, options, channels, side = MODELS[name]
    with torch.device("meta"):
        model = timm.create_model(entry, **options).train(training)
    before = [(type(m), m.training) for m in model.modules()]
    qkv = "joint" if "LeViT" in name or "MaxViT" in name else "separate"  # heads come first
    report = fused_lora.patch(model, rank=2, qkv=qkv)
    assert report.rows and min(report.rows_per_image.values()) >= 1
    fused_lora.unpatch(model)
    assert [(type(m), m.training) for m in model.modules()] == before
    if channels:
        assert examples_for(model)[0].shape[1:3] == (channels, side)


def test_statistics_of_a_norm_stay_as_they_are():
    model = nn.Sequential(nn.BatchNorm2d(3), build()).train()
    fused_lora.patch(model, rank=2)
    assert model[0].num_batches_tracked == 0 and model[0].training


def test_the_error_is_that_of_the_likeliest_image():
    class Wants(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def forward(self, x, y):
            return self.inner(x) + y

    with pytest.raises(fused_lora.PatchError, match=r"missing 1 required positional argument: 'y'"):
        fused_lora.patch(Wants(), rank=2)
