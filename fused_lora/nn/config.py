"""The options of an adapter, checked once, and how a and b start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.arguments import brief, check_known, flag, number, one_of
from fused_lora.types import Impl, Span

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "svd")
CHANGES_BASE = ("pissa", "olora")  # w becomes w - s b a, the original is kept
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
            if value is not None:
                number(name, value)
        flag("rank_stabilized", self.rank_stabilized)
        if self.rank_stabilized and self.alpha is None:
            raise ValueError("rank_stabilized divides alpha by sqrt(rank): give alpha")
        if not 0.0 <= number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        one_of("init", self.init, INITS)
        one_of("mid", self.mid, MIDS, none=True)
        flag("dora", self.dora)
        one_of("base_dtype", self.base_dtype, BASE_DTYPES, none=True)
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
            raise ValueError(
                f"adapter_dtype must be a floating dtype, got {brief(self.adapter_dtype)}"
            )
        one_of("impl", self.impl, [impl.value for impl in Impl])

    @classmethod
    def of(cls, caller: str, options: Mapping[str, Any]) -> AdapterConfig:
        """Of the options that ``caller`` was given; raises TypeError for an unknown one."""
        check_known(caller, options, ["rank", *(field.name for field in fields(cls))])
        return cls(**options)

    def scale_for(self, rank: int) -> float:
        """The factor s on the low-rank product at ``rank``."""
        if self.alpha is None:
            return 1.0 if self.scale is None else float(self.scale)
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


# How a and b start.
#
#     kaiming, gaussian  a random, b = 0: s b a = 0
#     orthogonal         a and b in orthogonal halves of R-space: b a = 0, neither zero
#     pissa              s b a = the R largest singular components of w (Meng et al. 2024)
#     olora              b = Q, s a = R of the first R columns of w = QR (Büyükakyüz 2024)
#     svd                b a as in pissa and frozen, around a middle that starts at 0 (LoRA-XS)
#
# pissa and olora leave w - s b a in w's place, so that y starts as it was.


OF_WEIGHT = ("pissa", "olora", "svd")  # start from the weight's own values


def draw(
    init: str,
    w: Tensor,  # [N_g, K], the group's rows of the frozen weight
    a: Tensor,  # [R, K], written
    b: Tensor,  # [N_g, R], written
    scale: float,
    generator: torch.Generator | None,
) -> None:
    """Fill a and b."""
    with torch.no_grad():
        if init in OF_WEIGHT:
            new_a, new_b = _of_weight(init, w, a.shape[0], scale)
            a.copy_(new_a)
            b.copy_(new_b)
        elif init == "orthogonal":
            _orthogonal(a, b, generator)
        else:
            _random(init, a, generator)
            b.zero_()


def _random(init: str, a: Tensor, generator: torch.Generator | None) -> None:
    if init == "gaussian":
        a.normal_(std=1 / a.shape[0], generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def _orthogonal(a: Tensor, b: Tensor, generator: torch.Generator | None) -> None:
    """a = Q1 G / 10, b = H Q2T / 10 with Q = [Q1 | Q2] orthogonal [R, R]: b a = 0."""
    (r, k), half = a.shape, a.shape[0] // 2

    def normal(*shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.float64, device=a.device)
        return drawn.normal_(generator=generator)

    q = torch.linalg.qr(normal(r, r))[0]
    g, h = normal(half, k), normal(b.shape[0], r - half)
    a.copy_(q[:, :half] @ g / 10)
    b.copy_(h @ q[:, half:].t() / 10)


def _of_weight(init: str, w: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    w = w.detach().to(torch.float64 if w.dtype is torch.float64 else torch.float32)
    if init == "olora":
        q, r = torch.linalg.qr(w)
        return r[:rank] / scale, q[:, :rank]
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    if init == "svd":
        return vt[:rank], u[:, :rank] * sigma[:rank]
    root = (sigma[:rank] / abs(scale)).sqrt()
    return root[:, None] * vt[:rank] * math.copysign(1.0, scale), u[:, :rank] * root


def check_start(init: str, w: Tensor, spans: Sequence[Span], scales: Sequence[float]) -> None:
    """Raises ValueError where ``init`` cannot be had of ``w``, before anything is changed."""
    least = min(span.rank for span in spans)
    if init == "orthogonal" and least < 2:
        raise ValueError(f"init='orthogonal' halves the rank: it must be 2 or more, got {least}")
    if init not in OF_WEIGHT:
        return
    if w.is_meta:
        raise ValueError(f"init={init!r} reads the weight, which holds no values on meta")
    if init != "svd" and not all(scales):
        raise ValueError(f"init={init!r} divides by the scale, got {scales}")
    for span in spans:
        full = min(span.width, w.shape[1])
        if span.rank > full:
            raise ValueError(f"init={init!r} finds {full} components, got rank {span.rank}")
