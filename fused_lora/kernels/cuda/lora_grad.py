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
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad_shape import ADAPTERS, GradCall, GradShape
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.programs.record import opaque
from fused_lora.types import Needs, Span

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
        launch = _Launch(
            *(adapters.scales, adapters.spans, needs, plan),
            *(into is not None and beta == 1, activation),
        )
        halves = (tuple(adapters.a), tuple(adapters.b))
        results = (tuple(grads.a), tuple(grads.b), grads.bias)
        written = [t for t in (*grads.a, *grads.b, grads.bias, dh_out) if t is not None]
        given = (x, dy, *halves, h, dh, *results, dh_out)
        opaque(launch, lambda *_: None, *given, writes=written)
    return grads


@dataclass(frozen=True, eq=False)
class _Launch:
    """One launch but for its tensors: done now, or as a call of a program."""

    scales: Sequence[float]
    spans: Sequence[Span]
    needs: Needs
    plan: Any
    add: bool
    activation: str = "none"

    __name__: ClassVar[str] = "lora_grad"
    launches: ClassVar[int] = 2  # the pass, and the sum of its slices

    @property
    def scratch_bytes(self) -> int:
        """The slices' sums, written and read."""
        return 2 * 4 * int(self.plan.partial_floats)

    def __call__(
        self,
        x: Tensor | None,
        dy: Tensor | None,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        h: Tensor | None,
        dh: Tensor | None,
        da: Sequence[Tensor | None],
        db: Sequence[Tensor | None],
        dbias: Tensor | None,
        dh_out: Tensor | None,
    ) -> None:
        """On the current stream."""
        call = GradCall(x, dy, Adapters(a, b, self.scales, self.spans), self.needs, h, dh)
        grads = Grads(None, None, dbias, list(da), list(db))
        _launch(call, self.plan, grads, self.add, dh_out, self.activation)


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


def _launch(
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
    dtypes = dict(
        type=_dtype(first),
        adapter=_dtype(call.adapters.a[0]),
        grad=_dtype(written[0] if written else first),
        dbias_type=_dtype(grads.bias if grads.bias is not None else first),
    )
    problem = module.GradProblem(
        plan=plan,
        **{name: _address(getattr(call, name)) for name in ("x", "dy", "h", "dh")},
        **{f"{name}_row": _row(getattr(call, name)) for name in ("x", "dy", "h", "dh")},
        groups=_groups(call.adapters, grads),
        dbias=_address(grads.bias),
        dh_out=_address(dh_out),
        dh_out_row=_row(dh_out),
        rows=first.shape[0],
        **dtypes,
        add=add,
        activation=getattr(module.Activation, activation),
    )
    partial = first.new_empty(plan.partial_floats, dtype=torch.float32)
    device, stream = _queue(first.device)
    module.lora_grad(
        problem=problem, plan=plan, partial=partial.data_ptr(), device=device, stream=stream
    )


def _groups(adapters: Adapters, grads: Grads) -> list[Any]:
    """fused_lora._native.GradGroup of each adapter."""
    firsts = accumulate((span.rank for span in adapters.spans), initial=0)
    rows = zip(adapters.a, adapters.b, grads.a, grads.b, strict=True)
    return [
        native.load().GradGroup(
            **dict(a=_address(a), b=_address(b), da=_address(da), db=_address(db)),
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


def _queue(device: torch.device) -> tuple[int, int]:
    """Device number and stream; a CPU, where tests launch, has neither."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _dtype(tensor: Tensor) -> Any:
    return getattr(native.load().DType, NAMES[tensor.dtype])
