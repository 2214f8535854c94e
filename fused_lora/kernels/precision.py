"""How products of fp32 are formed on a GPU: as torch may form its own."""

from __future__ import annotations

import torch


def is_tf32(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` may be of TF32: fp32 where torch allows it."""
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
