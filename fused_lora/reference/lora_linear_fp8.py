"""LoRA linear on a frozen base in FP8: the equations, spelled out.

s_w[n] = max |w[n, :]| / 448                     w8 = e4m3(w / s_w)    w^ = s_w w8     [N, K]
s_x[m] = max |x[m, :]| / 448                     x8 = e4m3(x / s_x)    x^ = s_x x8     [M, K]
y   = x^ w^T + bias; y[:, g] += s_g h_g b_gT     h_g = x a_gT, of x itself             [M, N]
dx  = dy w^ + sum_g dh_g a_g                     straight through the rounding of x    [M, K]
db, da, dbias as in ``lora_linear``: of x and dy, in which nothing is FP8

448 is the largest number of e4m3 (4 bits of exponent, 3 of fraction, no infinities): a row's
largest element lands on it. An element of at least 2^-6 of its row's scale moves by at most 2^-4
of itself, a smaller one by at most 2^-10 of the scale (``RELATIVE``, ``ABSOLUTE``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.reference import lora_linear
from fused_lora.reference.lora_linear import Grads
from fused_lora.types import Needs, Span

CODES = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST_SCALE = 1e-30  # of a row of zeros too: 1 / s is finite
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10  # what rounding moves: of an element, of its row's scale


class Quantised(NamedTuple):
    """A matrix whose rows are codes times a scale."""

    codes: Tensor  # [M, K], e4m3
    scales: Tensor  # [M], fp32

    def widened(self, dtype: torch.dtype) -> Tensor:
        """scales codes [M, K]: every dtype from 16 bits on holds e4m3; the product rounds once."""
        return self.codes.to(dtype).mul_(self.scales[:, None])


def quantise(t: Tensor) -> Quantised:
    """The codes and scales of t [M, K], in fp32 whatever t is in; NaN and infinity give NaN."""
    wide = t.detach().to(torch.float32)
    if wide.shape[1] == 0:
        return Quantised(wide.to(CODES), wide.new_full(wide.shape[:1], LEAST_SCALE))
    scales = (wide.abs().amax(1) / LARGEST).clamp_min(LEAST_SCALE)
    return Quantised((wide / scales[:, None]).to(CODES), scales)


def forward(
    x: Tensor,  # [M, K]
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
) -> Tensor:
    """y [M, N], in the dtype of the operands."""
    y = quantise(x).widened(x.dtype) @ w.widened(x.dtype).T
    return lora_linear.with_adapters(y, x, bias, a, b, scales, spans)


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    w: Quantised,  # [N, K]
    a: Sequence[Tensor],  # G of [R_g, K]
    b: Sequence[Tensor],  # G of [N_g, R_g]
    scales: Sequence[float],  # G
    spans: Sequence[Span],  # G
    needs: Needs,
) -> Grads:
    """The gradients named by ``needs``; w has none."""
    return lora_linear.backward(dy, x, w.widened(x.dtype), a, b, scales, spans, needs)
