"""Low-rank adaptation of vision transformers at the cost of the frozen network."""

from typing import Any

from fused_lora.distill.share import share_adapters, unshare_adapters
from fused_lora.io import (
    AdapterFileError,
    from_loralib,
    load,
    load_lora_state_dict,
    lora_state_dict,
    save,
)
from fused_lora.nn import AdapterConfig, FusedLoRAGroupedLinear, FusedLoRALinear, adopt_additive
from fused_lora.ops.lora_expand import expand_add
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.ops.lora_shrink import shrink
from fused_lora.patching.example import enable_input_grads
from fused_lora.patching.explain import explain, explain_program
from fused_lora.patching.patch import disable, merge, patch, unmerge, unpatch
from fused_lora.patching.prepare import Prepared, prepare
from fused_lora.patching.report import PatchError, PatchReport
from fused_lora.version import __version__

__all__ = [
    "AdapterConfig",
    "AdapterFileError",
    "FusedLoRAGroupedLinear",
    "FusedLoRALinear",
    "PatchError",
    "PatchReport",
    "Prepared",
    "__version__",
    "adopt_additive",
    "disable",
    "enable_input_grads",
    "expand_add",
    "explain",
    "explain_program",
    "from_loralib",
    "load",
    "load_lora_state_dict",
    "lora_linear",
    "lora_state_dict",
    "merge",
    "patch",
    "prepare",
    "save",
    "share_adapters",
    "shrink",
    "unmerge",
    "unpatch",
    "unshare_adapters",
]


def __getattr__(name: str) -> Any:
    if name == "adopt_around":  # before 0.2; warns
        from fused_lora import nn

        return nn.adopt_around
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
