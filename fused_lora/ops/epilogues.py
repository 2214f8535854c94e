"""What lies beside a product: in a kernel's own pass where one is trusted, else composed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.cuda import lora_linear as compiled
from fused_lora.kernels.cuda.lora_grad_shape import GradShape, shape_of
from fused_lora.kernels.interface import Adapters, Epilogue, InputNorm, LowRank
from fused_lora.kernels.triton import available, tiles
from fused_lora.kernels.triton.launches import extended_grads, gelu_grads
from fused_lora.ops import elementwise
from fused_lora.ops import lora_grad_backends as compiled_grads
from fused_lora.ops.backends import (
    why_not_device,
    why_not_launch,
    why_not_product,
    why_not_product_behind,
)
from fused_lora.ops.chain.stage import Previous, finish
from fused_lora.ops.lora_linear import call_plan, forward
from fused_lora.ops.measured import Together
from fused_lora.ops.planning import problem, together_wins
from fused_lora.plan.strategies import fuses_activation, fuses_activation_grad, fuses_residual
from fused_lora.types import (
    AdapterTraits,
    Backend,
    Forward,
    FusionContext,
    Impl,
    Keep,
    Needs,
    Plan,
    Span,
    ragged,
)
from fused_lora.verify.verdicts import why_not_concrete

# Whether a kernel computes what lies beside a product in its own pass; a sentence if none does.
#
# forward    y = residual + factor act(x wT + bias + s h bT)        ``Epilogue``
# dx         du = act'(u) (dy w + dh a), where x = act(u)           ``ActivationGrad``


LIBRARY = (Impl.ATEN, Impl.REFERENCE)


def plan_in_context(
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    bias: bool,
    spans: tuple[Span, ...],
    needs: Needs,
    traits: AdapterTraits,
    impl: Impl,
    dtype: torch.dtype,  # of the product
    context: FusionContext,
    keeps_h: bool = False,  # gradients may be formed in tiles of du or dy, which takes a kept h
) -> Plan:
    """The plan of a product with something beside it.

    One whose epilogues are not trusted was chosen for nothing: it is asked for without them.
    """
    keep = None
    if keeps_h and needs.a and needs.b and holds_gradients(w, spans, dtype, context):
        keep = Keep.HIDDEN
    ask = partial(call_plan, x, w, bias, spans, needs, traits, keep, impl, dtype)
    plan = ask(context)
    compiled = plan.grads_by is Backend.CUDA
    if keep and not (compiled and _in_tiles(plan, x, w, spans, context, dtype)):
        ask = partial(call_plan, x, w, bias, spans, needs, traits, None, impl, dtype)
        plan = ask(context)
    reason = None
    if context.activated and fuses_activation(plan):
        reason = why_not_fused(x, w, spans, plan, Epilogue("erf"), dtype)
    if reason is None and context.joined and fuses_residual(plan):
        reason = why_not_fused(x, w, spans, plan, Epilogue(), dtype)
    if reason is None and context.input_activated and needs.x and fuses_activation_grad(plan):
        reason = why_not_activation_grad(x, w, spans, plan, dtype)
    plain = context._replace(activated=False, input_activated=False, joined=False)
    return ask(plain) if reason else plan


def _in_tiles(
    plan: Plan,
    x: Tensor,
    w: Tensor,
    spans: tuple[Span, ...],
    context: FusionContext,
    dtype: torch.dtype,
) -> bool:
    """Whether tiles of du or of dy may hold gradients of a linear of this plan."""
    if not (context.activated or context.input_activated):
        if plan.backend is not Backend.ATEN:
            return False
        rank = sum(span.rank for span in spans)
        return why_not_launch("pack_grads", x.shape[0], w.shape[0], rank, x, dtype) is None
    if plan.backend is Backend.TRITON:
        return True
    if not context.activated:
        return compiled_grads.forms_gradients(plan)
    return why_not_launch(gelu_grads("erf"), x.shape[0], w.shape[0], 0, x, dtype) is None


def holds_gradients(
    w: Tensor, spans: tuple[Span, ...], dtype: torch.dtype, context: FusionContext
) -> bool:
    """Whether tiles may hold gradients of this linear: of du, of which it made u or x = act(u); or
    of its dy, which attention packs."""
    n, k = w.shape
    if not (context.activated or context.input_activated):
        return dtype.itemsize == 2 and tiles.packs_gradients(n // compiled_grads.PARTS, spans)
    columns, depth = (n, 0) if context.activated else (k, n)
    ranks = sum(span.rank for span in spans)
    return dtype.itemsize == 2 and tiles.holds_gradients(columns, depth, ranks)


def why_nobody(like: Tensor, dtype: torch.dtype, impl: Impl) -> str | None:
    """One sentence why no plan has an epilogue for products in ``dtype``; None when some may."""
    if impl in LIBRARY:
        return f"impl={impl.value!r} is the library's, which has no such epilogue"
    reason = why_not_device(like, dtype)
    compiled_too = impl is Impl.CUDA and why_not_product(like.device) is None
    return None if compiled_too else reason


def why_not_fused(
    x: Tensor,  # [M, K], or as many elements in other rows
    w: Tensor,  # [N, K]
    spans: tuple[Span, ...],
    plan: Plan,
    epilogue: Epilogue,
    dtype: torch.dtype,  # of the product
) -> str | None:
    """One sentence why no epilogue serves ``epilogue``; None when one does."""
    active = epilogue.activation != "none"
    if active and not fuses_activation(plan):
        return f"GELU is behind triton:extended and cuda:extended; the plan is {plan}"
    if not fuses_residual(plan):
        return f"residuals are added by EXTENDED and triton:one_pass; the plan is {plan}"
    others = [t for t in (epilogue.factor, epilogue.residual) if t is not None]
    if active and others:
        return "an activation and a scale or a residual together are checked by nobody"
    n, k = w.shape
    if plan.backend is Backend.CUDA:
        reason = compiled.why_not_epilogue(dtype, epilogue)
        shape, behind = (x.shape[0], n, k), compiled.kind(epilogue)
        ranks = sum(span.rank for span in spans)
        return reason or why_not_product_behind(shape, ranks, behind, dtype, x.device)
    for t in others:
        if t.dtype not in available.DTYPES or t.stride(-1) != 1:
            return f"it reads contiguous rows of 16 or 32 bits, got {t.dtype} {t.stride()}"
    kernel = epilogue.kernel(plan.forward.value, dtype)
    return why_not_launch(kernel, x.shape[0], n, k, x, dtype, ragged(spans))


def why_not_activation_grad(
    dy: Tensor,  # [M, N]
    w: Tensor,  # [N, K]
    spans: tuple[Span, ...],
    plan: Plan,
    dtype: torch.dtype,  # of dx and u
) -> str | None:
    """One sentence why no epilogue of dx takes the derivative of GELU; None when one does."""
    if not fuses_activation_grad(plan):
        return (
            "the derivative is taken behind dx of triton:extended and cuda:extended, and the plan "
            f"is {plan}"
        )
    n, k = w.shape
    if plan.backend is Backend.CUDA:
        if reason := why_not_concrete(dy):
            return reason
        shape, ranks = (dy.shape[0], k, n), sum(span.rank for span in spans)
        return why_not_product_behind(shape, ranks, "gelu", dtype, dy.device, "columns")
    return why_not_launch("extended_gelu", dy.shape[0], k, n, dy, dtype, ragged(spans))


def why_not_previous(
    previous: Previous,
    kind: str,  # of the GELU between them: erf, tanh
    dy: Tensor,  # [M, N]
    w: Tensor,  # [N, K]
    spans: tuple[Span, ...],
    needs: Needs,
    plan: Plan,
    dtype: torch.dtype,  # of dy as it is multiplied
    traits: AdapterTraits,
) -> str | None:
    """One sentence why no dx through a derivative forms gradients as well; None when one does.

    Those are da of its own linear, and db of the one that made u.
    """
    rank = sum(span.rank for span in spans)
    given = (previous.linear, dy, w, rank, needs, plan, dtype)
    if reason := compiled_grads.why_not_previous(*given):
        return reason
    n, k = w.shape
    if plan.backend is Backend.ATEN:  # whose dx was left open for it
        return why_not_launch(gelu_grads(kind), dy.shape[0], k, 0, dy, dtype)
    question = (extended_grads(kind), dy.shape[0], k, n, dy, dtype, ragged(spans))
    if reason := why_not_launch(*question):
        return reason
    context = FusionContext(input_activated=True)
    own = problem(dy.shape[0], k, n, spans, dtype, False, needs, context, traits, dy.device)
    both = Together(plan, kind, *previous[1:])
    wins = together_wins(own, both, dtype, dy.device)
    return None if wins else "it is slower than gradients in a pass of their own"


def why_not_packed(previous: Previous, like: Tensor) -> str | None:
    """One sentence why no kernel forms db and dh where it packs dy of its parts; None if one does.

    ``like`` is of as many rows, and where dy will be.
    """
    linear, question, plan, _ = previous
    dtype = linear.h.dtype
    if reason := compiled_grads.why_not_packed(linear, question.n, plan):
        return reason
    return why_not_launch("pack_grads", like.shape[0], question.n, question.rank, like, dtype)


def why_not_activated(
    dy: Tensor,  # [M, N], or as many elements in other rows
    w: Tensor,  # [N, K]
    spans: tuple[Span, ...],
    needs: Needs,
    plan: Plan,
    dtype: torch.dtype,  # of dy as it is multiplied
) -> str | None:
    """One sentence why no gradients form x = GELU(u) as they read u; None when some do."""
    if reason := _why_not_formed(dy, needs, plan):
        return reason
    shape = _grad_shape(dy, w, spans, needs, plan, dtype)
    return compiled_grads.why_not_activated(shape, dtype, dy.device)


def why_not_normed(
    norm: InputNorm,
    z: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    spans: tuple[Span, ...],
    needs: Needs,
    plan: Plan,
    dtype: torch.dtype,  # of dy as it is multiplied
) -> str | None:
    """One sentence why no gradients form x, the LayerNorm of z, as they read z; None when some do.

    Asked in forward, where dy is not there yet, and in backward.
    """
    if reason := _why_not_formed(z, needs, plan):
        return reason
    if z.dtype is not dtype:
        return f"x is formed of a z of dy's dtype, {dtype}, not of {z.dtype}"
    return compiled_grads.why_not_normed(norm, z, z, _grad_shape(z, w, spans, needs, plan, dtype))


def _why_not_formed(like: Tensor, needs: Needs, plan: Plan) -> str | None:
    if plan.grads_by is not Backend.CUDA:
        return f"x is formed by the compiled gradients, and the plan is {plan}"
    return "the gradient of w reads x" if needs.w else why_not_concrete(like)


def _grad_shape(
    like: Tensor,  # [M, ...]
    w: Tensor,
    spans: tuple[Span, ...],
    needs: Needs,
    plan: Plan,
    dtype: torch.dtype,
) -> GradShape:
    n, k = w.shape
    question = problem(like.shape[0], k, n, spans, dtype, False, needs, device=like.device)
    return shape_of(question, plan)


# A product and what follows it: in the kernel's epilogue where one is trusted, else composed.
#
# u = x wT + bias + s h bT      y = residual + factor act(u)


EpilogueResult = tuple[Tensor, Tensor | None, Tensor | None]


def with_epilogue(
    rows: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    adapters: Adapters,
    plan: Plan,
    impl: Impl,
    epilogue: Epilogue,
    bordered: Tensor | None = None,  # as for ``lora_linear.forward``
    out: Tensor | None = None,  # [M, N], rows contiguous: for y behind an activation
    h: Tensor | None = None,  # [M, sum R], likewise
) -> EpilogueResult:
    """y [M, N], what the plan keeps, and u [M, N] where an activation follows."""
    if impl is not Impl.REFERENCE and plan.forward is Forward.OPEN:
        z, h = aten.open_forward(rows, w, bias, adapters, h)
        y = expanded(z, LowRank(h, adapters), epilogue)
        return y, h if plan.keep is Keep.HIDDEN else None, None
    question = (rows, w, tuple(adapters.spans), plan, epilogue, rows.dtype)
    if impl is not Impl.REFERENCE and why_not_fused(*question) is None:
        return _epilogue(plan).forward_epilogue(rows, w, bias, adapters, plan, epilogue, out, h)
    y, kept = forward(rows, w, bias, adapters, plan, impl, bordered, h)
    return composed(y, kept, epilogue, out)


def expanded(z: Tensor, low_rank: LowRank, epilogue: Epilogue) -> Tensor:
    """residual + factor (z + s h bT), z overwritten; in one pass where a kernel serves that."""
    (h, adapters), (_, factor, residual, _) = low_rank, epilogue
    given = ("expand_residual", z, z.dtype, adapters.rank, residual, factor)
    if residual is not None and elementwise.why_not_expand(*given) is None:
        return elementwise.residual_expand(z, low_rank, residual, factor)
    return finish(aten.expand(z, h, adapters.to(z.dtype)), residual, factor)


def composed(
    u: Tensor, kept: Tensor | None, epilogue: Epilogue, out: Tensor | None = None
) -> EpilogueResult:
    """The same in passes of their own."""
    if epilogue.activation == "none":
        return finish(u, epilogue.residual, epilogue.factor), kept, None
    y = elementwise.gelu_forward(u, epilogue.activation, out)
    return finish(y, epilogue.residual, epilogue.factor), kept, u


def _epilogue(plan: Plan) -> Any:
    if plan.backend is Backend.CUDA:
        return compiled
    from fused_lora.kernels.triton import lora_linear as triton

    return triton
