"""GELU of rows and its slope: the face of kernels/aten/gelu.py, and who serves it.

    erf   u Phi(u)       tanh  0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))

Source: Hendrycks and Gimpel 2016. ``out`` may be the left of a bordered buffer. Triton's kernels
serve where this device has found them right.
"""

from __future__ import annotations

from torch import Tensor

from fused_lora.kernels.aten import gelu as aten
from fused_lora.ops.partners import asks_triton, triton_serves, why_not
from fused_lora.types import Impl


def gelu_forward(
    u: Tensor,  # [M, N]
    kind: str = "erf",  # or tanh
    out: Tensor | None = None,  # [M, N]
    *,
    impl: Impl = Impl.AUTO,
) -> Tensor:
    """GELU(u) [M, N].

    Raises:
        RuntimeError: ``impl`` is "triton", which cannot serve, with the reason.
    """
    if not _gelu_by_triton(impl, u, out):
        return aten.gelu_forward(u, kind, out)
    from fused_lora.kernels.triton import gelu as triton

    return triton.gelu_forward(u, kind, out)


def gelu_input_grad(
    dy: Tensor,  # [M, N]
    u: Tensor,  # [M, N]
    kind: str = "erf",
    out: Tensor | None = None,  # [M, N]
    *,
    impl: Impl = Impl.AUTO,
) -> Tensor:
    """du = GELU'(u) dy [M, N]; raises as ``forward`` does."""
    if not _gelu_by_triton(impl, u, dy, out):
        return aten.gelu_input_grad(dy, u, kind, out)
    from fused_lora.kernels.triton import gelu as triton

    return triton.gelu_input_grad(dy, u, kind, out)


def gelu_places(u: Tensor, kind: str = "erf") -> bool:
    """Whether ``out`` costs nothing beside a new tensor."""
    return why_not("gelu", u) is None or aten.gelu_places(u, kind)


def _gelu_by_triton(impl: Impl, u: Tensor, *others: Tensor | None) -> bool:
    return asks_triton(impl) and triton_serves(impl, why_not("gelu", u, *others))
