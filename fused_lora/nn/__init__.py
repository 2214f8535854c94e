"""Modules that are an ``nn.Linear`` with adapters on it."""

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.around import AroundLinear, adopt_around
from fused_lora.nn.bare import FusedLoRAChild
from fused_lora.nn.block import FusedLoRABlock
from fused_lora.nn.block_mlp import FusedLoRAMlp
from fused_lora.nn.config import AdapterConfig
from fused_lora.nn.linear import FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.nn.read import FusedLoRARead
from fused_lora.nn.siblings import FusedLoRASiblings

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
