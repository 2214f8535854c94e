"""Adapters on disk and as tensors: PEFT's keys, PEFT's folder."""

from fused_lora.io.folder import load, save
from fused_lora.io.keys import AdapterFileError, from_loralib
from fused_lora.io.state_dict import load_lora_state_dict, lora_state_dict

__all__ = [
    "AdapterFileError",
    "from_loralib",
    "load",
    "load_lora_state_dict",
    "lora_state_dict",
    "save",
]
