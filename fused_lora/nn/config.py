"""The options of an adapter, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fused_lora.types import Impl

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "svd")
CHANGES_BASE = ("pissa", "olora")  # w becomes w - s b a, the original is kept aside
MIDS = ("diagonal", "full")
BASE_DTYPES = ("fp8",)


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter is built and computed.

    Attributes:
        alpha: numerator of the scale; None for a scale of 1 (WeCoLoRA, section 3).
        scale: the scale itself; stands in place of ``alpha``.
        rank_stabilized: divide alpha by sqrt(rank) instead of rank (rsLoRA, Kalajdzievski 2023).
        dropout: probability with which elements of x are dropped before a, in training.
        init: "kaiming" draws a kaiming-uniform with gradient factor sqrt(5), "gaussian" draws it
            with standard deviation 1/rank; b starts at zero either way (Hu et al. 2021).
            "orthogonal", "pissa", "olora" and "svd" are told apart in ``docs/variants.md``.
        dora: train a magnitude per output beside the adapter's direction (Liu et al. 2024).
        mid: a trained "diagonal" [R] or "full" [R, R] matrix between a and b; None for none.
        adapter_dtype: dtype of the trained parameters, whatever the base is in.
        base_dtype: None, or "fp8" to compute the base product from e4m3 codes of the frozen weight
            and of x, one scale a row (``docs/variants.md``); the weight itself stays as it is.
        impl: who computes: "auto", "aten", "triton", "cuda" or "reference".
    """

    alpha: float | None = None
    scale: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    dora: bool = False
    mid: str | None = None
    adapter_dtype: torch.dtype = torch.float32
    base_dtype: str | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.alpha is not None and self.scale is not None:
            raise ValueError(f"give alpha or scale, not both: got {self.alpha} and {self.scale}")
        for name in ("alpha", "scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.rank_stabilized and self.alpha is None:
            raise ValueError("rank_stabilized divides alpha by sqrt(rank): give alpha")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if self.mid is not None and self.mid not in MIDS:
            raise ValueError(f"mid must be None or one of {MIDS}, got {self.mid!r}")
        if not isinstance(self.dora, bool):
            raise ValueError(f"dora must be True or False, got {self.dora!r}")
        if self.base_dtype is not None and self.base_dtype not in BASE_DTYPES:
            raise ValueError(
                f"base_dtype must be None or one of {BASE_DTYPES}, got {self.base_dtype!r}"
            )
        if self.base_dtype and (self.dora or self.dropout):
            clash = "dora=True" if self.dora else f"dropout={self.dropout}"
            raise ValueError(f"base_dtype={self.base_dtype!r} is not served with {clash}")
        if self.init in CHANGES_BASE and (self.dora or self.mid):
            raise ValueError(
                f"init={self.init!r} changes the base weight; dora and mid want it as is"
            )
        if self.init == "svd" and self.mid is None:
            raise ValueError("init='svd' freezes a and b around a trained middle: give mid")
        if not (
            isinstance(self.adapter_dtype, torch.dtype) and self.adapter_dtype.is_floating_point
        ):
            raise ValueError(f"adapter_dtype must be a floating dtype, got {self.adapter_dtype!r}")
        if self.impl not in [impl.value for impl in Impl]:
            raise ValueError(f"impl must be one of {[i.value for i in Impl]}, got {self.impl!r}")

    def scale_for(self, rank: int) -> float:
        """The factor s on the low-rank product at ``rank``."""
        if self.alpha is None:
            return 1.0 if self.scale is None else float(self.scale)
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
