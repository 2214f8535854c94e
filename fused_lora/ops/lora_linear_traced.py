"""lora_linear under ``torch.compile`` and ``torch.export``: registered ops.

M may be symbolic, so what is kept for backward is settled from K, N and the ranks alone
(``plan.choose.traced_keep``); the strategies are chosen at run time among those that keep it.
An exported program has an op of its own, one node too, which runs as an eager call does and which
``run_decompositions`` and ONNX's exporter take apart into torch's operations.
Importing this module registers the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fused_lora.kernels.interface import Adapters
from fused_lora.ops import lora_linear as eager
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.lora_linear_plain import plain
from fused_lora.ops.planning import plan_for, traits_of
from fused_lora.plan.choose import traced_keep
from fused_lora.plan.strategies import keeps_x
from fused_lora.programs.program import Saved, WithoutBackward
from fused_lora.programs.run import call, refuse_double_backward, transformed
from fused_lora.reference import lora_linear as reference
from fused_lora.types import NO_CONTEXT, Forward, Gradient, Impl, Keep, Needs, Plan, Span

LIBRARY = torch.library.Library("fused_lora", "DEF")
LIBRARY.define(
    "lora_linear(Tensor x, Tensor w, Tensor? bias, Tensor[] a, Tensor[] b, Tensor scales, "
    "int[] spans, int needs, str keep, str impl) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor w, Tensor kept, Tensor[] a, Tensor[] b, "
    "Tensor scales, int[] spans, int needs, str keep, str impl) -> Tensor[]"
)

LIBRARY.define(
    "lora_linear_exported(Tensor x, Tensor w, Tensor? bias, Tensor[] a, Tensor[] b, "
    "Tensor scales, int[] spans, str impl) -> Tensor"
)


def traced(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor | Sequence[float],
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    impl: Impl,
) -> Tensor:
    """lora_linear as one node of the graph; the reference as the plain operations that it is."""
    if not isinstance(scales, Tensor):
        scales = torch.tensor(scales, dtype=torch.float64, device="cpu")
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    w = w.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    n, k = w.shape
    if impl is Impl.REFERENCE:
        a, b = ([half.to(dtype) for half in halves] for halves in (a, b))
        y = reference.forward(rows, w, bias, a, b, scales, spans)  # type: ignore[arg-type]
        return y.reshape(*x.shape[:-1], n)
    if _exporting():
        given = (rows, w, bias, list(a), list(b), scales, _flat(spans), impl.value)
        y = torch.ops.fused_lora.lora_linear_exported(*given)
        return y.reshape(*x.shape[:-1], n)
    needs = _asked(rows, w, bias, a, b)
    keep = traced_keep(k, spans, needs)
    settled = (_flat(spans), _bits(needs), keep.value, impl.value)
    y, _ = torch.ops.fused_lora.lora_linear(rows, w, bias, list(a), list(b), scales, *settled)
    return y.reshape(*x.shape[:-1], n)


def _exporting() -> bool:
    """Whether this is ``torch.export``.

    In compiled code the public function is taken for True by torch 2.9 to 2.11, the flag never is.
    """
    return torch.compiler.is_exporting() and torch.compiler._is_exporting_flag


def _asked(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor]
) -> Needs:
    if not torch.is_grad_enabled():
        return Needs(x=False, w=False, bias=False, a=False, b=False)
    return Needs(
        x.requires_grad,
        w.requires_grad,
        bias is not None and bias.requires_grad,
        any(a_g.requires_grad for a_g in a),
        any(b_g.requires_grad for b_g in b),
    )


def _bits(needs: Needs) -> int:
    return needs.x | needs.w << 1 | needs.bias << 2 | needs.a << 3 | needs.b << 4


@lru_cache(maxsize=256)
def _needs(bits: int) -> Needs:
    return Needs(*(bool(bits >> place & 1) for place in range(5)))


def _flat(spans: Sequence[Span]) -> list[int]:
    return [number for span in spans for number in (span.start, span.stop, span.rank)]


@lru_cache(maxsize=1024)
def _spans(flat: tuple[int, ...]) -> tuple[Span, ...]:
    return tuple(Span(*flat[i : i + 3]) for i in range(0, len(flat), 3))


def _plan(m: int, w: Tensor, adapters: Adapters, needs: int, keep: str, impl: str) -> Plan:
    n, k = w.shape
    question = (m, k, n, tuple(adapters.spans), w.dtype, True, _needs(needs), w.device)
    traits = traits_of(adapters.a, adapters.scales)
    return plan_for(*question, Keep(keep), Impl(impl), NO_CONTEXT, traits)


@dataclass(frozen=True)
class _Forward(WithoutBackward):
    """The operation that the registered forward is: (y, what is kept) of (x, w, bias, a, b)."""

    frame: Frame
    needs: int
    keep: str

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Any, Saved]:
        """Both; an empty tensor where nothing is kept."""
        x, w, bias, *ab = inputs
        adapters = self.frame.adapters(ab)
        plan = _plan(x.shape[0], w, adapters, self.needs, self.keep, self.frame.impl.value)
        x = x if x.stride(-1) == 1 else x.contiguous()
        y, kept = eager.forward(x, w, bias, adapters, plan, self.frame.impl)
        return (y, x.new_empty(0) if kept is None else kept), ((), None)


@dataclass(frozen=True)
class _TracedBackward(WithoutBackward):
    """The operation that the registered backward is: the gradients asked for, of (dy, x, ...)."""

    frame: Frame
    needs: int
    keep: str

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Any, Saved]:
        """In the order of x, w, bias, a and b."""
        dy, x, w, kept, *ab = inputs
        adapters, impl = self.frame.adapters(ab), self.frame.impl
        plan = _plan(dy.shape[0], w, adapters, self.needs, self.keep, impl.value)
        dy = dy if dy.stride(-1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()
        h = kept if plan.keep is Keep.HIDDEN else None
        grads = eager.backward(dy, x, h, w, adapters, _needs(self.needs), plan, impl)
        several = len(adapters.a) > 1
        ranks_apart = [g if g is None or not several else g.clone() for g in grads.a]
        flat = [grads.x, grads.w, grads.bias, *ranks_apart, *grads.b]
        return tuple(grad.contiguous() for grad in flat if grad is not None), ((), None)


def _forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    needs: int,
    keep: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    frame = Frame(tuple(scales.tolist()), _spans(tuple(spans)), Impl(impl))
    with torch.no_grad():
        return call(_Forward(frame, needs, keep), (x, w, bias, *a, *b))  # type: ignore[no-any-return]


def _exported(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    impl: str,
) -> Tensor:
    """As an eager call where numbers are given; where a graph is made, torch's own operations."""
    columns = _spans(tuple(spans))
    if torch.compiler.is_compiling() or transformed() or is_in_torch_dispatch_mode():
        numbers = [scales[i].to(x.dtype) for i in range(len(columns))]
        return plain(x, w, bias, a, b, numbers, columns, x.dtype)  # type: ignore[arg-type]
    return eager.lora_linear(x, w, bias, a, b, scales, columns, impl=impl)


def _forward_fake(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    needs: int,
    keep: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    m = x.shape[0]
    hidden = keep == Keep.HIDDEN.value
    h = x.new_empty(m, sum(a_g.shape[0] for a_g in a)) if hidden else x.new_empty(0)
    return x.new_empty(m, w.shape[0]), h


def _backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    kept: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    needs: int,
    keep: str,
    impl: str,
) -> list[Tensor]:
    frame = Frame(tuple(scales.tolist()), _spans(tuple(spans)), Impl(impl))
    with torch.no_grad():
        return list(call(_TracedBackward(frame, needs, keep), (dy, x, w, kept, *a, *b)))


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    kept: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: Tensor,
    spans: list[int],
    needs: int,
    keep: str,
    impl: str,
) -> list[Tensor]:
    asked = _needs(needs)
    n, k = w.shape
    grads = [dy.new_empty(dy.shape[0], k)] if asked.x else []
    grads += [torch.empty_like(w, memory_format=torch.contiguous_format)] if asked.w else []
    grads += [dy.new_empty(n)] if asked.bias else []
    trained = (*(a if asked.a else ()), *(b if asked.b else ()))
    return grads + [torch.empty_like(t, memory_format=torch.contiguous_format) for t in trained]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, bias, a, b, scales, spans, needs, keep, impl = inputs
    # with keep fixed, whether x is read again does not depend on the strategies
    reads_x = keeps_x(_needs(needs), _any_plan(keep))
    ctx.meta = (len(a), spans, needs, keep, impl)
    ctx.save_for_backward(x if reads_x else None, w, output[1], scales, *a, *b)
    ctx.set_materialize_grads(False)


@lru_cache(maxsize=8)
def _any_plan(keep: str) -> Plan:
    return Plan(Forward.SEPARATE, Forward.SEPARATE, Gradient.RANK, Keep(keep))


def _autograd(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    groups, *settled = ctx.meta
    needs = settled[1]
    if dy is None:
        return (None,) * 10
    x, w, kept, scales, *ab = ctx.saved_tensors
    a, b = ab[:groups], ab[groups:]
    grads = iter(torch.ops.fused_lora.lora_linear_backward(dy, x, w, kept, a, b, scales, *settled))
    asked = _needs(needs)
    dx, dw, dbias = (next(grads) if ask else None for ask in (asked.x, asked.w, asked.bias))
    da = [next(grads) if asked.a else None for _ in a]
    db = [next(grads) if asked.b else None for _ in b]
    return dx, dw, dbias, da, db, None, None, None, None, None


LIBRARY.impl("lora_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_exported", _exported, "CompositeImplicitAutograd")
LIBRARY.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_linear", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fused_lora::lora_linear_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fused_lora::lora_linear", _autograd, setup_context=_setup_context, lib=LIBRARY
)
