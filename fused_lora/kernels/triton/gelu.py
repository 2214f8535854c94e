"""GELU on fp32 registers, as an epilogue.

erf   u Phi(u), erf by Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7, and no spilled registers
tanh  u sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3)), which is 0.5 u (1 + tanh(...))
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half_erfc(z):
    """erfc(z) / 2 for z >= 0."""
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = t * (
        0.127414796
        + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    )
    return p * tl.exp(-z * z)


@triton.jit
def gelu(u, KIND: tl.constexpr):
    """GELU of an fp32 tile; ``none`` hands it back."""
    if KIND == "erf":
        tail = _half_erfc(tl.abs(u) * 0.7071067811865476)
        return u * tl.where(u >= 0, 1.0 - tail, tail)
    elif KIND == "tanh":
        return u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    else:
        return u
