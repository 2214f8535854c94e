"""timm: one small model per family, and one per way a family is built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
EVA = VIT | {"swiglu_mlp": False}
FOUR = {"img_size": 64, "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1)}  # four stages
SWIN = FOUR | {"embed_dim": 16, "window_size": 2, "depths": (2, 1, 1, 1)}
WIDE = (16, 16, 32, 32)

# name: (timm's model, options, side of the image)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit_tiny_patch16_224", VIT, 32),
    "ViT, q, k and v normalised": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}, 32),
    "ViT, parallel scaling block": (
        "vit_tiny_patch16_224",
        VIT | {"block_fn": "ParallelScalingBlock"},
        32,
    ),
    "ViT, parallel things block": (
        "vit_tiny_patch16_224",
        VIT | {"block_fn": "ParallelThingsBlock"},
        32,
    ),
    "ViT, differential attention": ("vit_dpwee_patch16_reg1_gap_256", VIT | {"num_heads": 2}, 32),
    "DeiT": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "DeiT III": ("deit3_small_patch16_224", VIT, 32),
    "DINOv2": ("vit_small_patch14_dinov2", VIT, 32),
    "DINOv2 giant, packed SwiGLU": ("vit_giant_patch14_dinov2", VIT, 32),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", VIT, 32),
    "DINOv3": ("vit_small_patch16_dinov3", EVA, 32),
    "CLIP": ("vit_base_patch32_clip_224", VIT, 32),
    "SigLIP": ("vit_base_patch16_siglip_224", VIT, 32),
    "AIMv2": ("aimv2_large_patch14_224", VIT, 32),
    "ViT hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 48, "depth": 1}, 64),
    "ViT, relative positions": ("vit_relpos_small_patch16_224", VIT | {"num_heads": 2}, 32),
    "ViT-SAM": (
        "samvit_base_patch16_224",
        VIT | {"neck_chans": 16, "global_attn_indexes": (1,)},
        32,
    ),
    "BEiT": ("beit_base_patch16_224", VIT, 32),
    "BEiTv2, BEiT-3 kin": ("beitv2_base_patch16_224", VIT, 32),
    "BEiT without qkv bias": ("beit_base_patch16_224", VIT | {"qkv_bias": False}, 32),
    "EVA": ("eva_giant_patch14_224", EVA, 32),
    "EVA-02": ("eva02_tiny_patch14_224", VIT, 32),
    "EVA-02, q, k and v apart": ("eva02_base_patch14_448", VIT, 32),
    "EVA, rotary attention": ("eva02_tiny_patch14_224", VIT | {"attn_type": "rope"}, 32),
    "EVA, grouped queries": (
        "eva02_tiny_patch14_224",
        VIT | {"attn_type": "rope", "num_heads": 4, "num_kv_heads": 2, "qkv_fused": False},
        32,
    ),
    "PE": ("vit_pe_core_tiny_patch16_384", VIT, 32),
    "ViT-RoPE": ("vit_small_patch16_rope_224", VIT, 32),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 64),
    "DeepSeek ViT": ("deepseek_vit_412m", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 56),
    "Gemma 4 ViT": ("gemma4_vit_167m", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 96),
    "Qwen3 ViT": ("qwen3_vit_88m", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 64),
    "CaiT": ("cait_xxs24_224", VIT, 32),
    "CoaT": (
        "coat_tiny",
        {
            "embed_dims": (16, 16, 16, 16),
            "serial_depths": (1, 1, 1, 1),
            "parallel_depth": 1,
            "num_heads": 8,
            "img_size": 64,
        },
        64,
    ),
    "ConViT": (
        "convit_tiny",
        {"embed_dim": 48, "depth": 2, "num_heads": 4, "local_up_to_layer": 1, "img_size": 32},
        32,
    ),
    "CrossViT": (
        "crossvit_tiny_240",
        {
            "img_size": 48,
            "img_scale": (1.0, 1.0),
            "patch_size": (12, 16),
            "embed_dim": (24, 32),
            "num_heads": (2, 2),
            "depth": ((1, 1, 0),),
        },
        48,
    ),
    "CSATv2": (
        "csatv2",
        {"dims": (16, 16, 16, 24), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        64,
    ),
    "DaViT": (
        "davit_tiny",
        {"embed_dims": WIDE, "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1), "window_size": 2},
        64,
    ),
    "EdgeNeXt": (
        "edgenext_xx_small",
        {"dims": (16, 16, 16, 16), "depths": (2, 2, 2, 2), "heads": (2, 2, 2, 2)},
        64,
    ),
    "EfficientFormer": (
        "efficientformer_l1",
        {"embed_dims": WIDE, "depths": (1, 1, 1, 2), "img_size": 224},
        224,
    ),
    "EfficientFormerV2": ("efficientformerv2_s0", {}, 224),
    "FastViT": ("fastvit_sa12", {"embed_dims": (32, 32, 32, 32), "layers": (1, 1, 1, 1)}, 64),
    "GCViT": (
        "gcvit.GlobalContextVit",
        {"img_size": 64, "embed_dim": 16, "depths": (1, 2, 1, 2), "num_heads": (2, 2, 2, 2)},
        64,
    ),
    "Hiera": (
        "hiera_tiny_224",
        {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1)},
        64,
    ),
    "HieraDet (SAM 2)": (
        "hieradet_small",
        {
            "embed_dim": 16,
            "stages": (1, 1, 2, 1),
            "window_spec": (8, 4, 4, 2),
            "global_att_blocks": (3,),
        },
        64,
    ),
    "LeViT": (
        "levit.Levit",
        {
            "img_size": 64,
            "embed_dim": (16, 24, 32),
            "depth": (1, 1, 1),
            "num_heads": (2, 2, 2),
            "key_dim": 8,
        },
        64,
    ),
    "MaxViT": (
        "maxvit_rmlp_pico_rw_256",
        {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "img_size": 64},
        64,
    ),
    "CoAtNet": (
        "coatnet_nano_cc_224",
        {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "img_size": 64},
        64,
    ),
    "CAFormer": (
        "metaformer.MetaFormer",
        {
            "dims": (16, 16, 32, 32),
            "depths": (1, 1, 1, 1),
            "token_mixers": ["SepConv", "SepConv", "Attention", "Attention"],
            "norm_layers": ["LayerNorm2dNoBias"] * 2 + ["LayerNormNoBias"] * 2,
        },
        64,
    ),
    "PoolFormer": ("metaformer.MetaFormer", {"dims": WIDE, "depths": (1, 1, 1, 1)}, 64),
    "MobileViT": ("mobilevit_xxs", {}, 64),
    "MobileViTv2": ("mobilevitv2_050", {}, 64),
    "MViTv2": (
        "mvitv2.MultiScaleVit",
        {"img_size": 64, "cfg": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": 2}},
        64,
    ),
    "Nested transformer": (
        "nest.Nest",
        {"img_size": 64, "embed_dims": (16, 24, 32), "num_heads": (2, 2, 2), "depths": (1, 1, 1)},
        64,
    ),
    "NextViT": ("nextvit_small", {"depths": (1, 1, 5, 1)}, 64),
    "PiT": (
        "pit_ti_224",
        {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 4)},
        64,
    ),
    "PVTv2": (
        "pvt_v2_b0",
        {"embed_dims": WIDE, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        64,
    ),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 64),
    "Swin v2": ("swinv2_tiny_window8_256", SWIN, 64),
    "Swin v2 (Ross)": (
        "swinv2_cr_tiny_224",
        {k: v for k, v in SWIN.items() if k != "window_size"} | {"window_ratio": 32},
        64,
    ),
    "SwiftFormer": ("swiftformer_xs", {"embed_dims": [16, 16, 24, 24], "layers": [1, 1, 1, 1]}, 64),
    "TinyViT": (
        "tiny_vit_5m_224",
        {
            "embed_dims": WIDE,
            "depths": (1, 1, 2, 1),
            "num_heads": (2, 2, 2, 2),
            "window_sizes": (2, 2, 2, 2),
        },
        64,
    ),
    "TNT": (
        "tnt_s_patch16_224",
        {
            "img_size": 32,
            "embed_dim": 48,
            "inner_dim": 16,
            "depth": 1,
            "num_heads_inner": 2,
            "num_heads_outer": 3,
        },
        32,
    ),
    "Twins-SVT": (
        "twins_svt_small",
        {
            "img_size": 64,
            "embed_dims": WIDE,
            "depths": (1, 2, 1, 2),
            "num_heads": (1, 2, 2, 2),
            "wss": (2, 2, 2, 2),
        },
        64,
    ),
    "Twins-PCPVT": (
        "twins_pcpvt_small",
        {"img_size": 64, "embed_dims": WIDE, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        64,
    ),
    "Visformer": (
        "visformer_tiny",
        {
            "img_size": 64,
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 2,
            "init_channels": 8,
            "attn_stage": "011",
            "spatial_conv": "100",
        },
        64,
    ),
    "ViTamin": ("vitamin_small_224", {"img_size": 64, "depth": 1}, 64),
    "VOLO": (
        "volo.VOLO",
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 32, 32, 32),
            "num_heads": (2, 2, 2, 2),
        },
        64,
    ),
    "XCiT": ("xcit_nano_12_p16_224", VIT | {"patch_size": 16}, 32),
    "MLP-Mixer": (
        "mlp_mixer.MlpMixer",
        {"img_size": 32, "patch_size": 16, "num_blocks": 1, "embed_dim": 32},
        32,
    ),
    "iFormer": ("iformer_t", {}, 64),
    "MobileNetV4 hybrid": ("mobilenetv4_hybrid_medium", {}, 64),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": WIDE}, 64),
}


def build(name: str) -> nn.Module:
    """The small model of ``MODELS[name]``, its weights drawn from torch's global generator."""
    import timm
    from timm.models import vision_transformer

    model, options, _ = MODELS[name]
    if block := options.get("block_fn"):
        options = options | {"block_fn": getattr(vision_transformer, block)}
    if "." in model:
        return _constructed(model, options)
    return timm.create_model(model, pretrained=False, num_classes=5, **options).eval()


def _constructed(model: str, options: dict[str, Any]) -> nn.Module:
    """``module.Class``, where timm's own function fixes its sizes; classes are named in lists."""
    module, name = model.split(".")
    home = import_module(f"timm.models.{module}")
    options = {
        key: [getattr(home, each) for each in value] if _names_classes(value) else value
        for key, value in options.items()
    }
    if "cfg" in options:
        options["cfg"] = home.MultiScaleVitCfg(**options["cfg"])
    return getattr(home, name)(num_classes=5, **options).eval()


def _names_classes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def example(name: str) -> dict[str, Any]:
    """Two images for it, as keyword arguments."""
    side = MODELS[name][2]
    return {"x": torch.randn(2, 3, side, side)}
