"""Modules that are an ``nn.Linear`` with adapters on it."""

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.around import AroundLinear, adopt_around
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.linear import FusedLoRAGroupedLinear, FusedLoRALinear

__all__ = [
    "AdaptedLinear",
    "AdapterConfig",
    "AroundLinear",
    "FusedLoRAGroupedLinear",
    "FusedLoRALinear",
    "adopt_around",
]
