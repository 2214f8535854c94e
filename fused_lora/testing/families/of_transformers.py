"""transformers: one small model per family, under the names that this release gives them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {
    "embed_dim": 16,
    "hidden_size": None,
    "num_attention_heads": None,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 2,
    "patch_size": 4,
}
STAGES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "image_size": 32,
}
PVT = {"patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]}
PAIR = {"image_size": [32, 32]}
SEQUENCE: dict[str, tuple[int, ...]] = {"pixel_values": (1, 16, 192)}  # patches already unfolded

# name: (the config's class without "Config", the model's class, options, shapes of other inputs)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "ViT": ("ViT", "ViTModel", {}, {}),
    "DeiT": ("DeiT", "DeiTModel", {}, {}),
    "BEiT": ("Beit", "BeitModel", {"use_relative_position_bias": True}, {}),
    "Data2Vec vision": ("Data2VecVision", "Data2VecVisionModel", {}, {}),
    "ViTMAE": ("ViTMAE", "ViTMAEModel", {}, {}),
    "ViT-MSN": ("ViTMSN", "ViTMSNModel", {}, {}),
    "DINOv2": ("Dinov2", "Dinov2Model", {"mlp_ratio": 2}, {}),
    "DINOv2, SwiGLU": ("Dinov2", "Dinov2Model", {"mlp_ratio": 2, "use_swiglu_ffn": True}, {}),
    "DINOv2 with registers": ("Dinov2WithRegisters", "Dinov2WithRegistersModel", {}, {}),
    "DINOv3": ("DINOv3ViT", "DINOv3ViTModel", {}, {}),
    "DINOv3, gated MLP": ("DINOv3ViT", "DINOv3ViTModel", {"use_gated_mlp": True}, {}),
    "CLIP vision": ("CLIPVision", "CLIPVisionModel", {}, {}),
    "SigLIP vision": ("SiglipVision", "SiglipVisionModel", {}, {}),
    "SigLIP 2 vision": ("Siglip2Vision", "Siglip2VisionModel", {}, SEQUENCE),
    "Swin": ("Swin", "SwinModel", SWIN, {}),
    "Swin v2": ("Swinv2", "Swinv2Model", SWIN, {}),
    "Swin2SR": ("Swin2SR", "Swin2SRModel", SWIN | {"patch_size": 1, "image_size": 8}, {}),
    "Donut Swin": ("DonutSwin", "DonutSwinModel", SWIN, {}),
    "YOLOS": ("Yolos", "YolosModel", PAIR, {}),
    "ViTDet": ("VitDet", "VitDetModel", {}, {}),
    "ViViT": ("Vivit", "VivitModel", {"num_frames": 4, "tubelet_size": [2, 8, 8]}, {}),
    "TimeSformer": ("Timesformer", "TimesformerModel", {"num_frames": 2}, {}),
    "AIMv2 vision": ("Aimv2Vision", "Aimv2VisionModel", {}, {}),
    "I-JEPA": ("IJepa", "IJepaModel", {}, {}),
    "V-JEPA 2": (
        "VJEPA2",
        "VJEPA2Model",
        {
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
        },
        {"pixel_values_videos": (1, 4, 3, 32, 32)},
    ),
    "Hiera": (
        "Hiera",
        "HieraModel",
        {
            "embed_dim": 16,
            "hidden_size": None,
            "image_size": [64, 64],
            "patch_size": [7, 7],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "num_attention_heads": None,
        },
        {},
    ),
    "PVT": ("Pvt", "PvtModel", STAGES | PVT, {}),
    "PVTv2": ("PvtV2", "PvtV2Model", STAGES | {"num_encoder_blocks": 2}, {}),
    "SegFormer": ("Segformer", "SegformerModel", STAGES, {}),
    "GLPN": ("GLPN", "GLPNModel", STAGES, {}),
    "BLIP vision": ("BlipVision", "BlipVisionModel", {}, {}),
    "BLIP-2 vision": ("Blip2Vision", "Blip2VisionModel", {}, {}),
    "InstructBLIP vision": ("InstructBlipVision", "InstructBlipVisionModel", {}, {}),
    "CvT": (
        "Cvt",
        "CvtModel",
        {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "LeViT": (
        "Levit",
        "LevitModel",
        {
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "patch_size": 16,
            "image_size": 64,
        },
        {},
    ),
    "MobileViT": ("MobileViT", "MobileViTModel", {"image_size": 64, "patch_size": 2}, {}),
    "SAM vision": (
        "SamVision",
        "SamVisionModel",
        {"global_attn_indexes": [1], "window_size": 2, "output_channels": 8},
        {},
    ),
    "DPT": ("DPT", "DPTModel", {"backbone_out_indices": [0, 1, 1, 1]}, {}),
    "ViTPose": ("VitPoseBackbone", "VitPoseBackbone", PAIR | {"patch_size": [8, 8]}, {}),
    "FLAVA image": ("FlavaImage", "FlavaImageModel", {}, {}),
    "OWL-ViT vision": ("OwlViTVision", "OwlViTVisionModel", {}, {}),
    "OWLv2 vision": ("Owlv2Vision", "Owlv2VisionModel", {}, {}),
    "Chinese CLIP vision": ("ChineseCLIPVision", "ChineseCLIPVisionModel", {}, {}),
    "AltCLIP vision": ("AltCLIPVision", "AltCLIPVisionModel", {}, {}),
    "X-CLIP vision": (
        "XCLIPVision",
        "XCLIPVisionModel",
        {"num_frames": 2},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "CLIPSeg vision": ("CLIPSegVision", "CLIPSegVisionModel", {}, {}),
    "MetaCLIP 2 vision": ("MetaClip2Vision", "MetaClip2VisionModel", {}, {}),
    "MLCD vision": ("MLCDVision", "MLCDVisionModel", {}, {}),
    "GIT vision": ("GitVision", "GitVisionModel", {}, {}),
    "GroupViT vision": (
        "GroupViTVision",
        "GroupViTVisionModel",
        {"depths": [1, 1, 0], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
        {},
    ),
    "InternVL vision": ("InternVLVision", "InternVLVisionModel", PAIR | {"patch_size": [8, 8]}, {}),
    "Pixtral vision": ("PixtralVision", "PixtralVisionModel", {"head_dim": 16}, {}),
    "Idefics 2 vision": ("Idefics2Vision", "Idefics2VisionTransformer", {}, {}),
    "Kosmos-2 vision": ("Kosmos2Vision", "Kosmos2VisionModel", {}, {}),
    "Llama 4 vision": (
        "Llama4Vision",
        "Llama4VisionModel",
        {
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        {},
    ),
    "Pixio": ("Pixio", "PixioModel", {}, {}),
    "RADIO": ("Radio", "RadioModel", {}, {}),
    "Sapiens 2": ("Sapiens2", "Sapiens2Model", {}, {}),
    "SegGPT": (
        "SegGpt",
        "SegGptModel",
        PAIR
        | {"merge_index": 0, "intermediate_hidden_state_indices": [1], "pretrain_image_size": 32},
        {
            "pixel_values": (1, 3, 16, 32),
            "prompt_pixel_values": (1, 3, 16, 32),
            "prompt_masks": (1, 3, 16, 32),
        },
    ),
    "AST (audio)": (
        "AST",
        "ASTModel",
        {"num_mel_bins": 32, "max_length": 32, "frequency_stride": 8, "time_stride": 8},
        {"input_values": (1, 32, 32)},
    ),
    "SwiftFormer": ("SwiftFormer", "SwiftFormerModel", {"image_size": 64}, {}),
    "ConvNeXt": (
        "ConvNext",
        "ConvNextModel",
        {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "VideoMAE": ("VideoMAE", "VideoMAEModel", {"num_frames": 4}, {}),
}


def build(name: str) -> nn.Module:
    """The small model of ``MODELS[name]``, its weights drawn from torch's global generator."""
    import transformers

    config, model, options, _ = MODELS[name]
    kind = getattr(transformers, f"{config}Config")
    sizes = {key: value for key, value in (TINY | options).items() if value is not None}
    plain = kind()
    known = {key: value for key, value in sizes.items() if hasattr(plain, key)}
    home = import_module(kind.__module__.replace("configuration_", "modeling_"))
    return getattr(home, model)(kind(**known)).eval()


def example(name: str) -> dict[str, Any] | None:
    """What it is called with; None where ``patch`` finds out by itself."""
    shapes = MODELS[name][3]
    inputs: dict[str, Any] = {key: torch.randn(shape) for key, shape in shapes.items()}
    if shapes == SEQUENCE:
        inputs["pixel_attention_mask"] = torch.ones(1, 16, dtype=torch.long)
        inputs["spatial_shapes"] = torch.tensor([[4, 4]])
    return inputs or None
