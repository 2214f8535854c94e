"""What lies beside a product in a block, and who serves it: GELU, LayerNorm, h of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.aten import elementwise as aten
from fused_lora.kernels.aten.elementwise import Normed
from fused_lora.kernels.interface import Adapters, LowRank
from fused_lora.kernels.triton import available
from fused_lora.kernels.triton.tiles import MOST_ROW_RANKS, MOST_WIDTH, ThinTile
from fused_lora.ops.backends import why_not_launch
from fused_lora.types import Impl

# What lies beside a product in a block, by the library or by Triton where it is trusted.
#
# Partners are steps of other operations' autograd nodes and record no gradient of their own. Under
# ``torch.compile`` chains compose torch's operations instead, which the compiler fuses.


def asks_triton(impl: Impl) -> bool:
    """Whether ``impl`` leaves room for Triton at all."""
    return impl in (Impl.AUTO, Impl.TRITON)


def triton_serves(impl: Impl, reason: str | None) -> bool:
    """Whether Triton does, given why not.

    Raises:
        RuntimeError: ``impl`` is "triton", which cannot serve, with the reason.
    """
    if impl is Impl.TRITON and reason:
        raise RuntimeError(f"impl='triton' cannot serve: {reason}")
    return reason is None


def why_not(kernel: str, x: Tensor, *others: Tensor | None) -> str | None:
    """One sentence why Triton cannot run ``kernel`` on rows of x [M, K]; None when it can.

    The other operands that are matrices are laid out as x is, each in a dtype of its own.
    """
    for t in (x, *others):
        if t is not None and (t.stride(1) != 1 or t.dtype not in available.DTYPES):
            return f"it reads contiguous rows of 16 or 32 bits, got {t.dtype} {t.stride()}"
    rows, columns = x.shape
    return why_not_launch(kernel, rows, columns, 0, x)


# GELU of rows and its derivative: the face of kernels/aten/elementwise.py, and who serves it.
#
#     erf   u Phi(u)       tanh  0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))
#
# Source: Hendrycks and Gimpel 2016. ``out`` may be the left of a bordered buffer. Triton's kernels
# serve where this device has found them right.


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
    from fused_lora.kernels.triton import elementwise as triton

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
    from fused_lora.kernels.triton import elementwise as triton

    return triton.gelu_input_grad(dy, u, kind, out)


def gelu_places(u: Tensor, kind: str = "erf") -> bool:
    """Whether ``out`` costs nothing beside a new tensor."""
    return why_not("gelu", u) is None or aten.gelu_places(u, kind)


def _gelu_by_triton(impl: Impl, u: Tensor, *others: Tensor | None) -> bool:
    return asks_triton(impl) and triton_serves(impl, why_not("gelu", u, *others))


# LayerNorm of rows and its gradients: the face of kernels/aten/elementwise.py, and who serves it.
#
#     x^ = (x - mean) rstd     y = x^ weight + bias        Source: arXiv 1607.06450
#
# ``out`` may be the left of a bordered buffer, where the next product reads its operand. Triton's
# kernels serve where this device has found them right; statistics of either backend do for both.


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
    from fused_lora.kernels.triton import elementwise as triton

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
    from fused_lora.kernels.triton import elementwise as triton

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
    from fused_lora.kernels.triton import elementwise as triton

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


# What makes x, and h of it, in one pass: by Triton's kernel where this device has found it right.
#
# x = LayerNorm(z) or GELU(z)      h = x aT, [M, sum R]
#
# There is no other server: where it cannot, x is made first and h by whoever reads x.


class Made(NamedTuple):
    """x, h of it, and the statistics of a LayerNorm."""

    x: Tensor  # [M, C]
    h: Tensor  # [M, sum R]
    statistics: tuple[Tensor, ...] = ()  # mean and rstd [M], fp32


def why_not_shrink(
    kernel: str,  # shrink_norm or shrink_gelu
    z: Tensor,  # [M, C]
    dtype: torch.dtype,  # of x
    rank: int,  # sum R
    *vectors: Tensor | None,  # of a LayerNorm
) -> str | None:
    """One sentence why x and h of it are not made together; None when they are."""
    if dtype.itemsize != 2:
        return f"it forms h of 16-bit rows, not of {dtype}"
    if not 0 < rank <= MOST_ROW_RANKS:
        return f"it holds h of {MOST_ROW_RANKS} ranks in all, and they sum to {rank}"
    if z.stride(1) != 1 or z.dtype not in available.DTYPES:
        return f"it reads contiguous rows of 16 or 32 bits, got {z.dtype} {z.stride()}"
    for vector in vectors:
        if vector is not None and not (vector.dtype in available.DTYPES and vector.is_contiguous()):
            return f"it takes no vector of {vector.dtype} with strides {vector.stride()}"
    return why_not_launch(kernel, z.shape[0], rank, z.shape[1], z, dtype)


def layer_norm_shrink(
    z: Tensor,  # [M, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    adapters: Adapters,
    out: Tensor,  # [M, C], of 16 bits
    h: Tensor | None,  # [M, sum R], the right end of [x | h]
) -> Made:
    """LayerNorm of each row."""
    from fused_lora.kernels.triton import lora_shrink

    given = (z, weight, bias, eps, _uniform(adapters), out, h)
    tile = _shrink_tile("shrink_norm", out, adapters.rank)
    x, mean, rstd, h = lora_shrink.layer_norm_shrink(*given, tile)
    return Made(x, h, (mean, rstd))


def gelu_shrink(z: Tensor, kind: str, adapters: Adapters, out: Tensor, h: Tensor | None) -> Made:
    """GELU of each element."""
    from fused_lora.kernels.triton import lora_shrink

    tile = _shrink_tile("shrink_gelu", out, adapters.rank)
    return Made(*lora_shrink.gelu_shrink(z, kind, _uniform(adapters), out, h, tile))


def _shrink_tile(kernel: str, x: Tensor, rank: int) -> ThinTile:
    """The one that was checked: of x [M, C], and h of so many ranks."""
    from fused_lora.kernels.triton.launches import tile_of

    rows, columns = x.shape
    return tile_of(kernel, rows, rank, columns, x.dtype, x.device)  # type: ignore[no-any-return]


# What reads a product next, and adds the low-rank term that the product left out: by Triton's
# kernels where this device has found them right.
#
#     dx of LayerNorm, whose output's gradient is dy + dh a      y = residual + factor (z + s h bT)
#
# There is no other server: where they cannot, whoever forms the product adds the term.


def why_not_expand(
    kernel: str,  # expand_norm or expand_residual
    z: Tensor,  # [M, C], the product
    dtype: torch.dtype,  # of the term's operands
    rank: int,  # sum R
    *others: Tensor | None,  # whatever else it reads, matrices and vectors
) -> str | None:
    """One sentence why the term of a product is not left to ``kernel``; None when it may be."""
    if dtype.itemsize != 2:
        return f"it forms a term of 16-bit operands, not of {dtype}"
    if not 0 < rank <= MOST_ROW_RANKS:
        return f"it holds {MOST_ROW_RANKS} ranks in all, and they sum to {rank}"
    for t in (z, *others):
        if t is not None and (t.dtype not in available.DTYPES or t.stride(-1) != 1):
            return f"it reads contiguous rows of 16 or 32 bits, got {t.dtype} {t.stride()}"
    rows, columns = z.shape
    sizes = (rank, columns) if kernel == "expand_norm" else (columns, rank)
    return why_not_launch(kernel, rows, *sizes, z, dtype)


def layer_norm_expand(
    dy: Tensor,  # [M, D], without the term
    x: Tensor,  # [M, D]
    weight: Tensor | None,  # [D]
    mean: Tensor,  # [M], fp32
    rstd: Tensor,  # [M], fp32
    low_rank: LowRank,  # dh
    residual: Tensor | None = None,  # [M, D]; added
    out: Tensor | None = None,  # [M, D], any float dtype
) -> Tensor:
    """dx, in dy's dtype or ``out``'s."""
    from fused_lora.kernels.triton import lora_expand
    from fused_lora.kernels.triton.launches import tile_of

    hidden, adapters = low_rank
    (rows, ranks), columns = hidden.shape, dy.shape[1]
    tile = tile_of("expand_norm", rows, ranks, columns, hidden.dtype, hidden.device)
    norm = (dy, x, weight, mean, rstd)
    return lora_expand.layer_norm_expand(*norm, hidden, _uniform(adapters), residual, out, tile)


def residual_expand(
    z: Tensor,  # [M, N], without the term
    low_rank: LowRank,  # h
    residual: Tensor,  # [M, N]
    factor: Tensor | None = None,  # [N], LayerScale
) -> Tensor:
    """y [M, N] in the wider dtype of z and the residual; z itself where that is its dtype."""
    from fused_lora.kernels.triton import lora_expand
    from fused_lora.kernels.triton.launches import tile_of

    hidden, adapters = low_rank
    (rows, ranks), columns = hidden.shape, z.shape[1]
    tile = tile_of("expand_residual", rows, columns, ranks, hidden.dtype, hidden.device)
    out = z if z.dtype is torch.promote_types(z.dtype, residual.dtype) else None
    given = (z, hidden, _uniform(adapters), residual, factor, out, tile)
    return lora_expand.residual_expand(*given)


def _uniform(adapters: Adapters) -> Adapters:
    from fused_lora.kernels.triton.lora_linear import uniform

    return uniform(adapters)
