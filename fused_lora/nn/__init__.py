"""Modules that are an ``nn.Linear`` with adapters on it."""

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.additive import AroundLinear, adopt_around
from fused_lora.nn.block import FusedLoRABlock, FusedLoRAMlp
from fused_lora.nn.child_adapters import FusedLoRAChild
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.grouped_projections import FusedLoRASiblings
from fused_lora.nn.linear import FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.nn.weight_adapter import FusedLoRARead

__all__ = [
    "AdaptedLinear",
    "AdapterConfig",
    "AroundLinear",
    "FusedLoRABlock",
    "FusedLoRAChild",
    "FusedLoRAGroupedLinear",
    "FusedLoRALinear",
    "FusedLoRAMlp",
    "FusedLoRARead",
    "FusedLoRASiblings",
    "adopt_around",
]
