"""What a launch must know of a device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """Architecture and size; tests name their own."""

    arch: int  # 90 for compute capability 9.0
    processors: int

    @staticmethod
    @lru_cache
    def of(device: torch.device) -> Chip:
        """The chip of a CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)
