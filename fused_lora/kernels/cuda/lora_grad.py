"""RANK gradients of all groups from one read of x and dy; see csrc/lora_grad/.

    h = x aT   dh_g = s_g dy[:, span_g] b_g     formed on chip and rounded as x is, or given
    db_g = s_g dy[:, span_g]T h_g   da_g = dh_gT x   dbias = sum over rows of dy

Products are of bf16, of fp16, or of fp32 rounded to TF32 where torch allows that. Sums are fp32,
dbias that of dy as it is; each gradient is rounded once, to its tensor's dtype. No atomics. What is
formed on chip must fit the registers of a block, or of a cluster (``fits``); with h and dh given,
any width does. Of 16 bits x may be GELU(u), formed on chip from the u that is given in its place
and rounded once, as whoever made it in forward did.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad_shape import ADAPTERS, GradCall, GradShape
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.programs.record import opaque
from fused_lora.types import Needs

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in ADAPTERS}
Into = tuple[Sequence[Tensor], Sequence[Tensor]]  # G of [R_g, K], G of [N_g, R_g]; any strides


def fits(k: int, n: int, ranks: int, arch: int, given: bool = False, tf32: bool = False) -> bool:
    """Whether a block of architecture ``arch`` (80, 90, ...) holds all gradients of this size."""
    shape = GradShape(k, n, ranks, h_given=given, dh_given=given, tf32=tf32)
    return shape.form(Chip(arch, 1)) is not None


def why_not(
    x: Tensor | None,
    dy: Tensor | None,
    adapters: Adapters,
    needs: Needs,
    h: Tensor | None = None,
    dh: Tensor | None = None,
) -> str | None:
    """One sentence why ``lora_grads`` cannot serve these operands; None when it can."""
    call = GradCall(x, dy, adapters, needs, h, dh)
    device = call.first.device
    if not call.first.is_cuda:
        return native.why_not() or f"the operands lie on {device}"
    return native.why_not(device) or call.why_not(Chip.of(device))


def lora_grads(
    x: Tensor | None,  # [M, K], rows contiguous, 16-byte aligned; None where nothing reads it
    dy: Tensor | None,  # [M, N], likewise
    adapters: Adapters,
    needs: Needs,
    h: Tensor | None = None,  # [M, sum R], rows contiguous; formed where needed and not given
    dh: Tensor | None = None,  # [M, sum R], likewise
    into: Into | None = None,  # da and db go here
    chip: Chip | None = None,
    beta: int = 1,  # times what ``into`` holds; 0 never reads it
    dh_out: Tensor | None = None,  # [M, sum R], dy's dtype, rows contiguous: dh goes here too
    activation: str = "none",  # erf or tanh: ``x`` is the u of x = GELU(u)
) -> Grads:
    """da, db and dbias as ``needs`` names them, in their operands' dtypes or ``into`` others.

    ``dh_out`` is for a dh that is formed here: where ``needs.a``, and ``dh`` is not given.
    """
    call = GradCall(x, dy, adapters, needs, h, dh)
    chip = chip or Chip.of(call.first.device)
    reason = call.why_not_operands() or call.why_not_written(dh_out)
    reason = reason or call.why_not_activated(activation)
    assert reason is None, reason
    plan = call.plan(chip)
    assert plan is not None, call.too_large(chip)
    grads = _outputs(call, into)
    if any(grad is not None for grad in (grads.bias, *grads.a, *grads.b)):
        assert beta in (0, 1), beta
        add = into is not None and beta == 1
        launch = GradLaunch(call, plan, grads, add, dh_out, activation)
        written = [t for t in (*grads.a, *grads.b, grads.bias, dh_out) if t is not None]
        opaque(launch, lambda *_: None, *launch.tensors(call, grads, dh_out), writes=written)
    return grads


class GradLaunch:
    """One launch but for its tensors, whose layouts are packed once: done now, and by programs."""

    __name__ = "lora_grad"
    launches = 2  # the pass, and the sum of its slices
    by_address = True  # strides are bound

    def __init__(
        self,
        call: GradCall,
        plan: Any,
        grads: Grads,
        add: bool,
        dh_out: Tensor | None,
        activation: str,
    ) -> None:
        module, first = native.load(), call.first
        assert first.is_cuda or module.archs == "none", first.device
        written = [grad for grad in (*grads.a, *grads.b) if grad is not None]
        assert len({grad.dtype for grad in written}) <= 1, [grad.dtype for grad in written]
        self.device, self.partial_floats = first.device, int(plan.partial_floats)
        self._bound = module.BoundGrad(
            plan=plan,
            **{f"{name}_row": _row(getattr(call, name)) for name in ("x", "dy", "h", "dh")},
            groups=_groups(call.adapters, grads),
            dh_out_row=_row(dh_out),
            rows=first.shape[0],
            type=_dtype(first),
            adapter=_dtype(call.adapters.a[0]),
            grad=_dtype(written[0] if written else first),
            dbias_type=_dtype(grads.bias if grads.bias is not None else first),
            add=add,
            activation=getattr(module.Activation, activation),
        )

    @staticmethod
    def tensors(call: GradCall, grads: Grads, dh_out: Tensor | None) -> list[Tensor | None]:
        """What a call takes, in order."""
        own = (call.x, call.dy, call.h, call.dh, grads.bias, dh_out)
        return [*own, *call.adapters.a, *call.adapters.b, *grads.a, *grads.b]

    @property
    def scratch_bytes(self) -> int:
        """The slices' sums, written and read."""
        return 2 * 4 * self.partial_floats

    def __call__(self, *tensors: Tensor | None) -> None:
        """On the current stream."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        partial = torch.empty(self.partial_floats, dtype=torch.float32, device=self.device)
        self._bound(addresses, partial.data_ptr(), *native.queue(self.device))


def a_grads(
    dh: Tensor,  # [M, sum R], rows contiguous
    x: Tensor,  # [M, K], rows contiguous, 16-byte aligned
    adapters: Adapters,
    into: Sequence[Tensor] | None = None,  # G of [R_g, K], any strides: add to these
    chip: Chip | None = None,
) -> list[Tensor | None]:
    """da_g = dh_gT x, in a's dtype or added ``into`` given tensors."""
    both = None if into is None else (into, ())
    return lora_grads(x, None, adapters, Needs(b=False), dh=dh, into=both, chip=chip).a


def b_grads(
    h: Tensor,  # [M, sum R], rows contiguous
    dy: Tensor,  # [M, N], rows contiguous, 16-byte aligned
    adapters: Adapters,
    into: Sequence[Tensor] | None = None,  # G of [N_g, R_g], any strides: add to these
    chip: Chip | None = None,
) -> list[Tensor | None]:
    """db_g = s_g dy[:, span_g]T h_g, in b's dtype or added ``into`` given tensors."""
    both = None if into is None else ((), into)
    return lora_grads(None, dy, adapters, Needs(a=False), h=h, into=both, chip=chip).b


def _outputs(call: GradCall, into: Into | None) -> Grads:
    """Tensors for what is needed; None for the rest."""
    nothing: list[Tensor | None] = [None] * len(call.adapters.spans)
    a, b = into or ([torch.empty_like(t) for t in halves] for halves in call.adapters[:2])
    assert call.dy is not None or not call.needs.bias
    bias = call.dy.new_empty(call.dy.shape[1]) if call.needs.bias and call.dy is not None else None
    return Grads(
        None, None, bias, list(a) if call.needs.a else nothing, list(b) if call.needs.b else nothing
    )


def _groups(adapters: Adapters, grads: Grads) -> list[Any]:
    """fused_lora._native.GradGroup of each adapter."""
    firsts = accumulate((span.rank for span in adapters.spans), initial=0)
    rows = zip(adapters.a, adapters.b, grads.a, grads.b, strict=True)
    return [
        native.load().GradGroup(
            **dict(a_strides=a.stride(), b_strides=b.stride()),
            da_strides=(0, 0) if da is None else da.stride(),
            db_strides=(0, 0) if db is None else db.stride(),
            **dict(first_column=span.start, columns=span.width, scale=scale),
            **dict(first_rank=first, rank=span.rank),
        )
        for (a, b, da, db), span, scale, first in zip(
            rows, adapters.spans, adapters.scales, firsts, strict=False
        )
    ]


def _row(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _dtype(tensor: Tensor) -> Any:
    return getattr(native.load().DType, NAMES[tensor.dtype])
