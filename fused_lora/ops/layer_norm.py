"""LayerNorm of rows and its gradients: the face of kernels/aten/layer_norm.py, and who serves it.

    x^ = (x - mean) rstd     y = x^ weight + bias        Source: arXiv 1607.06450

``out`` may be the left of a bordered buffer, where the next product reads its operand. Triton's
kernels serve where this device has found them right; statistics of either backend do for both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_lora.kernels.aten import layer_norm as aten
from fused_lora.kernels.aten.layer_norm import Normed
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.tiles import MOST_WIDTH
from fused_lora.ops.partners import asks_triton, triton_serves, why_not
from fused_lora.types import Impl


def layer_norm_forward(
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D], any float dtype
    bias: Tensor | None,  # likewise
    eps: float,
    out: Tensor | None = None,  # [M, D], any float dtype
    *,
    impl: Impl = Impl.AUTO,
) -> Normed:
    """LayerNorm of each row, in x's dtype or ``out``'s, and its statistics [M].

    Raises:
        RuntimeError: ``impl`` is "triton", which cannot serve, with the reason.
    """
    if not _layer_norm_by_triton(impl, x, weight, bias, out):
        return aten.layer_norm_forward(x, weight, bias, eps, out)
    from fused_lora.kernels.triton import layer_norm as triton

    return Normed(*triton.layer_norm_forward(x, weight, bias, eps, out))


def layer_norm_rebuild(
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D], any float dtype
    bias: Tensor | None,  # likewise
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    out: Tensor | None = None,  # [M, D], any float dtype
    *,
    impl: Impl = Impl.AUTO,
) -> Tensor:
    """What ``forward`` made of x, from its statistics; raises as it does."""
    if not _layer_norm_by_triton(impl, x, weight, bias, out):
        return aten.layer_norm_rebuild(x, weight, bias, mean, rstd, out)
    from fused_lora.kernels.triton import layer_norm as triton

    return triton.layer_norm_rebuild(x, weight, bias, mean, rstd, out)


def layer_norm_input_grad(
    dy: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D]
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    residual: Tensor | None = None,  # [M, D]; added
    out: Tensor | None = None,  # [M, D], any float dtype
    *,
    impl: Impl = Impl.AUTO,
) -> Tensor:
    """dx, in dy's dtype or ``out``'s; raises as ``forward`` does."""
    if not _layer_norm_by_triton(impl, x, weight, None, dy, residual, out):
        return aten.layer_norm_input_grad(dy, x, weight, mean, rstd, residual, out)
    from fused_lora.kernels.triton import layer_norm as triton

    return triton.layer_norm_input_grad(dy, x, weight, mean, rstd, residual, out)


def layer_norm_grads(
    dy: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    needs: Sequence[bool],  # of x, weight and bias
) -> list[Tensor | None]:
    """Gradients of all three, by the library: Triton has no kernel of the last two."""
    return aten.layer_norm_grads(dy, x, weight, bias, mean, rstd, needs)


def layer_norm_places(x: Tensor) -> bool:
    """Whether ``out`` costs nothing beside a new tensor."""
    return why_not_layer_norm(x) is None or aten.layer_norm_places(x)


def why_not_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *others: Tensor | None
) -> str | None:
    """One sentence why Triton cannot serve these operands; None when it can."""
    if x.shape[-1] > MOST_WIDTH:
        return f"it holds rows of up to {MOST_WIDTH} in registers, and x has {x.shape[-1]} columns"
    for name, half in (("weight", weight), ("bias", bias)):
        if half is not None and (half.dtype not in available.DTYPES or not half.is_contiguous()):
            return f"it takes no {name} of {half.dtype} with strides {half.stride()}"
    return why_not("layer_norm", x, *others)


def _layer_norm_by_triton(impl: Impl, *operands: Tensor | None) -> bool:
    return asks_triton(impl) and triton_serves(impl, why_not_layer_norm(*operands))  # type: ignore[arg-type]
