"""Modules that are an ``nn.Linear`` with adapters on it."""

import warnings
from typing import Any

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.additive import AdditiveLoRALinear, adopt_additive
from fused_lora.nn.block import FusedLoRABlock, FusedLoRAMlp
from fused_lora.nn.child_adapters import FusedLoRAParameter
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.grouped_projections import FusedLoRAGroupedProjections
from fused_lora.nn.linear import FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.nn.weight_adapter import FusedLoRAWeight

__all__ = [
    "AdaptedLinear",
    "AdapterConfig",
    "AdditiveLoRALinear",
    "FusedLoRABlock",
    "FusedLoRAGroupedLinear",
    "FusedLoRAGroupedProjections",
    "FusedLoRALinear",
    "FusedLoRAMlp",
    "FusedLoRAParameter",
    "FusedLoRAWeight",
    "adopt_additive",
]
RENAMED = {  # in 0.2
    "AroundLinear": "AdditiveLoRALinear",
    "FusedLoRAChild": "FusedLoRAParameter",
    "FusedLoRARead": "FusedLoRAWeight",
    "FusedLoRASiblings": "FusedLoRAGroupedProjections",
    "adopt_around": "adopt_additive",
}


def __getattr__(name: str) -> Any:
    if name in RENAMED:
        new = RENAMED[name]
        warnings.warn(f"{name} is called {new} now", DeprecationWarning, stacklevel=2)
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
