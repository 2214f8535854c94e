"""What lies beside a product in a block, by the library or by Triton where it is trusted.

Partners are steps of other operations' autograd nodes and record no gradient of their own. Under
``torch.compile`` chains compose torch's operations instead, which the compiler fuses.
"""

from __future__ import annotations

from torch import Tensor

from fused_lora.kernels.triton import available
from fused_lora.ops.backends import why_not_launch
from fused_lora.types import Impl


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
