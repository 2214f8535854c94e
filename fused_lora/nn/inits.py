"""How a and b start.

    kaiming, gaussian  a random, b = 0: s b a = 0
    orthogonal         a and b in orthogonal halves of R-space: b a = 0, neither zero
    pissa              s b a = the R largest singular components of w (Meng et al. 2024)
    olora              b = Q, s a = R of the first R columns of w = QR (Büyükakyüz 2024)
    svd                b a as in pissa and frozen, around a middle that starts at 0 (LoRA-XS)

pissa and olora leave w - s b a in w's place, so that y starts as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_lora.types import Span

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
