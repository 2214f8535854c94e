"""Adapter gradients by the compiled kernels, beside whichever room computes dx.

Where the plan says so they come first, and dx reads the dh that they form: dy is read twice in all.
h and dh are handed over where the rest of the plan has them, formed on chip where a block or
cluster can, and by the library where none can. An x that is GELU(u) or a LayerNorm need not be made
again: the kernel forms it as it reads what it was made of, where this device has found that right.
A form of the kernel that this device has not checked, or found wrong, is left to the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad import add_slices, lora_grads
from fused_lora.kernels.cuda.lora_grad_shape import (
    ADAPTERS,
    GradCall,
    GradShape,
    aligned,
    examples,
    fitting,
    why_not_dtype,
    why_not_norm,
)
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import (
    ActivationGrad,
    Adapters,
    Grads,
    HiddenGrad,
    InputNorm,
    PreviousLinear,
)
from fused_lora.kernels.triton import tiles
from fused_lora.types import Backend, Forward, Impl, Keep, Needs, Plan
from fused_lora.verify.check import CannotVerifyNow
from fused_lora.verify.kernel_registry import Checked, of_compiled_grads
from fused_lora.verify.verdicts import verdict

PARTS = 3  # that dy of qkv comes in

why_not_on = lru_cache(maxsize=64)(native.why_not_on)


@lru_cache(maxsize=4096)
def checked(
    shape: GradShape, dtype: torch.dtype, device: torch.device, source: str = ""
) -> Checked | None:
    """What is checked before the compiled kernel serves ``shape``; None where no check is.

    ``source``: gelu or norm, before it forms x of what is given in its place.
    """
    chip = Chip.of(device)
    form, known = fitting(shape, chip).form(chip), examples(chip, shape.tf32)
    if form is None or form not in known:
        return None
    name = "tf32" if shape.tf32 else str(dtype).removeprefix("torch.")
    return of_compiled_grads(form, known[form], name, source)


def backward(
    dy: Tensor,  # [M, N], rows contiguous
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]; None where dx reads a kept w', or is not asked for
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
    kernels: Any,  # the kernels that compute dx
    activation_grad: tuple[
        ActivationGrad, ...
    ] = (),  # one where dx goes on to du, for a room that takes it
    activation: str = "none",  # erf or tanh: ``x`` is the u of x = GELU(u)
    norm: InputNorm | None = None,  # or the z of which it is the LayerNorm
    dh: Tensor | None = None,  # [M, sum R], where whoever formed dy formed it
    impl: Impl = Impl.AUTO,
) -> Grads:
    """The gradients named by ``needs``."""
    from fused_lora.ops.lora_merge import with_border

    if activation_grad and activation_grad[0].previous:
        assert kept is not None and w is not None
        return _with_previous(dy, kept, w, adapters, needs, plan, *activation_grad)
    dw = None
    if needs.w:
        assert x is not None
        dw = dy.t() @ x
    h = kept if plan.keep is Keep.HIDDEN else None
    own = replace(needs, x=False, w=False)
    how, dx = (activation, norm), None

    def input_grad(place: HiddenGrad | None = None) -> tuple[Tensor, Tensor | None]:
        made = with_border(w, adapters, plan, impl, of_dx=True)
        operands = (dy, kept, w, adapters, plan, *activation_grad)
        return kernels.input_grad(*operands, given=place, **made)  # type: ignore[no-any-return]

    if needs.x and (plan.writes_dh or dh is not None):
        place = aten.place_of_dh(dy, adapters.rank, plan, dh)
        written = place.dh if dh is None else None
        grads = adapter_grads(dy, x, h, dh, adapters, own, written, *how)
        dx, _ = input_grad(place)
        dh = place.dh
    else:
        if needs.x:
            dx, dh = input_grad()
        grads = adapter_grads(dy, x, h, dh, adapters, own, None, *how)
    return grads._replace(x=dx, w=dw, dh=dh if needs.x and plan.dx is Forward.OPEN else None)


def _with_previous(
    dy: Tensor,
    h: Tensor,
    w: Tensor,
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
    activation_grad: ActivationGrad,
) -> Grads:
    """db and dh of dy alone; then du, with da of the tiles of u and the previous db of those of du.

    Neither u nor du is read again for a gradient. Behind the library's product, which is read once
    more, the tiles of du form the previous dh as well.
    """
    from fused_lora.kernels.triton import lora_linear as triton

    previous = activation_grad.previous
    assert previous is not None
    dh = dy.new_empty(dy.shape[0], adapters.rank)
    grads = adapter_grads(dy, None, h, None, adapters, replace(needs, x=False, a=False), dh)
    if plan.backend is Backend.TRITON:
        made = triton.input_grad_and_slices(dy, w, adapters, dh, activation_grad)
    else:
        made = triton.activation_grad_and_slices(dy @ w, adapters, dh, activation_grad)
    own, k = adapters.uniform(ADAPTERS), w.shape[1]
    a: list[Tensor | None] = [torch.empty_like(a_g) for a_g in own.a]
    add_slices(made.a, k, 0, own, Grads(None, None, None, a, [None] * len(a)))
    b = list(previous.b_grads)
    add_slices(made.b, 0, k, previous.adapters, Grads(None, None, None, [None] * len(b), b))
    return grads._replace(x=made.du, a=_as(a, adapters.a))


def why_not_previous(
    previous: PreviousLinear,
    dy: Tensor,
    w: Tensor,
    ranks: int,
    needs: Needs,
    plan: Plan,
    dtype: torch.dtype,  # of dy as it is multiplied
) -> str | None:
    """One sentence why ``_with_previous`` has nothing for these; None where it has."""
    if not forms_gradients(plan):
        return f"triton's dx forms them in its tiles, or the kernel behind open; the plan is {plan}"
    if not (plan.grads_by is Backend.CUDA and plan.writes_dh and plan.keep is Keep.HIDDEN):
        return f"h is kept and dh written by the compiled gradients, and the plan is {plan}"
    if needs.w or not (needs.a and needs.b):
        return "a and b train, and w does not"
    if dtype.itemsize != 2:
        return f"its tiles are of 16 bits, not of {dtype}"
    n, k = w.shape
    before = previous.adapters.rank
    depth = n if plan.backend is Backend.TRITON else 0
    if not tiles.holds_gradients(k, depth, max(ranks, before)):
        return (
            f"its tiles are whole and hold {tiles.MOST_GRAD_RANKS} ranks; w is [{n}, {k}], the "
            f"ranks are {ranks} and {before}"
        )
    if previous.adapters.uniform(ADAPTERS) is not previous.adapters:
        return "the previous adapters are of several dtypes"
    alone = GradShape(0, n, ranks, h_given=True, needs_a=False, needs_bias=needs.bias)
    alone = alone._replace(writes_dh=True)
    fits = fitting(alone, Chip.of(dy.device)).writes_dh and _trusted(alone, dtype, dy.device)
    return None if fits else "no block forms dh beside db, or it is not checked, or found wrong"


def packed_gradients(parts: Sequence[Tensor], previous: PreviousLinear) -> Tensor:
    """dy [M, N] of its parts of equal columns; db and dh of the linear that made them go where
    ``previous`` has them."""
    from fused_lora.kernels.triton.lora_grad import add_blocks
    from fused_lora.kernels.triton.lora_grad_rank import pack_and_slices

    linear, (dy, b, hidden) = previous.adapters, pack_and_slices(parts, *previous[:2])
    add_blocks(hidden, linear, dy.dtype, previous.dh, dy.shape[1])
    nothing: list[Tensor | None] = [None] * len(linear.b)
    grads = Grads(None, None, None, nothing, list(previous.b_grads))
    add_slices(b, 0, dy.shape[1], linear, grads)
    return dy


def why_not_packed(previous: PreviousLinear, columns: int, plan: Plan) -> str | None:
    """One sentence why ``packed_gradients`` has nothing for dy of so many columns.

    Products of this project's keep packed adapters instead of h; with h backward would pack again.
    """
    if plan.backend is not Backend.ATEN:
        return f"it takes an h that the library's plans keep, and the plan is {plan}"
    if plan.grads_by is not Backend.CUDA:
        return f"the compiled gradients add its sums, and the plan is {plan}"
    if previous.h.dtype.itemsize != 2:
        return f"its tiles are of 16 bits, not of {previous.h.dtype}"
    if previous.adapters.uniform(ADAPTERS) is not previous.adapters:
        return "the adapters are of several dtypes"
    if not tiles.packs_gradients(columns // PARTS, previous.adapters.spans):
        return f"its tiles are whole, of one adapter each; the spans are {previous.adapters.spans}"
    return None


def forms_gradients(plan: Plan) -> bool:
    """Whether a pass of its backward through an activation's derivative may form gradients."""
    triton = plan.backend is Backend.TRITON and plan.dx is Forward.EXTENDED
    return triton or (plan.backend is Backend.ATEN and plan.dx is Forward.OPEN)


def adapter_grads(
    dy: Tensor,  # [M, N], rows contiguous
    x: Tensor | None,  # [M, K]; None where h is given and only b trains
    h: Tensor | None,  # [M, sum R]; formed where needed and not given
    dh: Tensor | None,  # [M, sum R], likewise
    adapters: Adapters,
    needs: Needs,
    dh_out: Tensor | None = None,  # [M, sum R], rows contiguous: a dh that is formed goes here
    activation: str = "none",  # as above
    norm: InputNorm | None = None,
) -> Grads:
    """da, db and dbias, each in its own operand's dtype."""
    call = GradCall(x, dy, adapters, needs, h, dh, writes_dh=dh_out is not None)
    if activation != "none" and why_not_activated(call.shape, dy.dtype, dy.device):
        x, activation = activated(x, activation), "none"
    if norm is not None and x is not None and why_not_normed(norm, x, dy, call.shape):
        x, norm = normed(x, norm), None
    if why_not_dtype(dy.dtype) or not _trusted(call.shape, dy.dtype, dy.device):
        low = adapters.to(dy.dtype)
        dh = dh if dh_out is None else aten.shrink_grad(dy, low, dh_out)
        a, b = aten.rank_grads(dy, x, h, dh, adapters, low, needs)
        return Grads(None, None, dy.sum(0) if needs.bias else None, a, b)
    shape = fitting(call.shape, Chip.of(dy.device))
    h, dh, dh_out = _given(shape, dy, x, h, dh, adapters, dh_out)
    reads_dy = needs.b or shape.needs_bias or (needs.a and dh is None) or dh_out is not None
    reads_dy = reads_dy or x is None  # one of them tells rows and dtype
    x, rows = (None if x is None else aligned(x)), aligned(dy) if reads_dy else None
    asked = replace(needs, bias=shape.needs_bias)
    how: dict[str, Any] = dict(dh_out=dh_out, activation=activation, norm=norm)
    dh = dh if needs.a else None  # which nothing else reads
    found = lora_grads(x, rows, adapters.uniform(ADAPTERS), asked, h, dh, **how)
    if needs.bias and not shape.needs_bias:
        found = found._replace(bias=dy.sum(0))
    return found._replace(a=_as(found.a, adapters.a), b=_as(found.b, adapters.b))


def why_not_activated(shape: GradShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """One sentence why the kernel does not form x = GELU(u) as it reads u; None when it does."""
    if shape.tf32 or dtype.itemsize != 2:
        return f"it forms x of a u of 16 bits, not of {dtype}"
    return _why_not_formed(shape, dtype, device, "gelu")


def why_not_normed(norm: InputNorm, z: Tensor, dy: Tensor, shape: GradShape) -> str | None:
    """One sentence why the kernel does not form x, the LayerNorm of ``z``, as it reads z."""
    if z.dtype is not dy.dtype:
        return f"it forms x of a z of dy's dtype, {dy.dtype}, not of {z.dtype}"
    return why_not_norm(norm, z) or _why_not_formed(shape, dy.dtype, dy.device, "norm")


def _why_not_formed(
    shape: GradShape, dtype: torch.dtype, device: torch.device, source: str
) -> str | None:
    if fitting(shape, Chip.of(device)).h_given and shape.needs_b and not shape.h_given:
        return "no block holds h, which the library forms of x"
    return None if _trusted(shape, dtype, device, source) else "it is not checked, or found wrong"


def activated(u: Tensor | None, activation: str) -> Tensor:
    """x = GELU(u), for whoever reads it."""
    from fused_lora.ops import elementwise

    assert u is not None
    return elementwise.gelu_forward(u, activation)


def normed(z: Tensor | None, norm: InputNorm) -> Tensor:
    """x, the LayerNorm of ``z``, likewise."""
    from fused_lora.ops import elementwise

    assert z is not None
    mean, rstd, gamma, beta = norm
    return elementwise.layer_norm_rebuild(z, gamma, beta, mean, rstd)


def _trusted(shape: GradShape, dtype: torch.dtype, device: torch.device, source: str = "") -> bool:
    subject = checked(shape, dtype, device, source)
    try:
        return subject is not None and verdict(subject, device).passed
    except CannotVerifyNow:
        return False


def _given(
    shape: GradShape,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    dh: Tensor | None,
    adapters: Adapters,
    dh_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """h and dh as the kernel for ``shape`` is given them, formed by the library where missing; and
    where the kernel writes dh, None where it is there by now."""
    if shape.h_given and shape.needs_b and h is None:
        assert x is not None
        h = aten.shrink(x, adapters.to(dy.dtype))
    if shape.dh_given and (shape.needs_a or dh_out is not None) and dh is None:
        dh = aten.shrink_grad(dy, adapters.to(dy.dtype), dh_out)
    return h, dh, dh_out if dh is None else None


def _as(grads: list[Tensor | None], like: Any) -> list[Tensor | None]:
    """Each in the dtype of its own operand."""
    pairs = zip(grads, like, strict=True)
    return [None if grad is None else grad.to(own.dtype) for grad, own in pairs]
