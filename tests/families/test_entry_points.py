"""Plain ``patch(model)`` of every entry point of timm's that is a vision transformer or its kin.

On the meta device, in the size each has by default, with as few blocks as it can be built with:
what an image must look like is found, or nothing there is an attention and an MLP of linears.
One entry of each module, or with FUSED_LORA_EVERY_ENTRY_POINT=1 all of them.
"""

import functools

import pytest
import timm
import torch

import fused_lora
from fused_lora import env

EVERY = env.flag("FUSED_LORA_EVERY_ENTRY_POINT", default=False)
# timm's modules, by how their models are made shallow: by depth, by depths of four stages, or not
DEPTH = [
    "beit", "cait", "convit", "deepseek_vit", "deit", "eva", "gemma4_vit", "naflexvit",
    "qwen3_vit", "tnt", "vision_transformer", "vision_transformer_hybrid",
    "vision_transformer_relpos", "vision_transformer_sam", "xcit",
]  # fmt: skip
DEPTHS = [
    "davit", "pvt_v2", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "tiny_vit",
]  # fmt: skip
WHOLE = [
    "coat", "crossvit", "csatv2", "edgenext", "efficientformer", "efficientformer_v2", "fastvit",
    "gcvit", "hiera", "hieradet_sam2", "levit", "maxxvit", "metaformer", "mobilevit", "mvitv2",
    "nest", "nextvit", "pit", "swiftformer", "twins", "visformer", "vitamin", "volo",
]  # fmt: skip
MODULES = sorted([*DEPTH, *DEPTHS, *WHOLE])
UNSERVED = {  # none of their models has an attention and an MLP of linears that a rule names
    *("efficientformer_v2", "swiftformer", "visformer"),
}
MIXED = {  # some have, some are of convolutions alone
    *("maxxvit", "metaformer", "fastvit", "levit", "mobilevit", "efficientformer"),
}


@functools.cache
def entries(module: str) -> list[str]:
    return timm.list_models(module=module)


def shallow(module: str, name: str) -> torch.nn.Module:
    """On meta, with as few blocks as its function lets it have."""
    options = {"depth": 2} if module in DEPTH else {}
    options = {"depths": (1, 1, 1, 1)} if module in DEPTHS else options
    with torch.device("meta"):
        try:
            return timm.create_model(name, **options)
        except Exception:  # its function fixes the depth
            return timm.create_model(name)


def test_most_of_timm_is_here():
    assert sum(len(entries(module)) for module in MODULES) > 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES)
def test_no_entry_point_needs_its_size_named(module):
    assert entries(module), f"timm has no {module} any more"
    served, unserved, wrong = [], [], {}
    for name in entries(module) if EVERY else entries(module)[:1]:
        model = shallow(module, name)
        before = [(type(m), m.training) for m in model.modules()]
        try:
            report = fused_lora.patch(model, rank=1)
        except fused_lora.PatchError as error:
            if "joint" in str(error):  # heads come first in its fused projection
                report = fused_lora.patch(model, rank=1, qkv="joint")
            elif "no block has an attention and an MLP of linears" in str(error):
                unserved.append(name)
                continue
            else:
                wrong[name] = str(error)
                continue
        served.append(name)
        if not report.rows or min(report.rows_per_image.values()) < 1:
            wrong[name] = str(report)
        fused_lora.unpatch(model)
        if [(type(m), m.training) for m in model.modules()] != before:
            wrong[name] = "unpatch left something"
    assert not wrong, wrong
    if EVERY or module not in MIXED:
        assert bool(served) is (module not in UNSERVED), unserved
    assert not unserved or module in UNSERVED | MIXED, unserved
