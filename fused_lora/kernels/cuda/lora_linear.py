"""lora_linear by compiled kernels, and with an epilogue behind its product."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_extended, native
from fused_lora.kernels.cuda.lora_extended import ProductTile, aligned, packed, readable
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.full_grads import full_grads
from fused_lora.kernels.gemm import columns, outer, product
from fused_lora.kernels.interface import ActivationGrad, Adapters, Epilogue, Grads, HiddenGrad
from fused_lora.plan.problem import Problem
from fused_lora.programs.record import begins_at
from fused_lora.types import Gradient, Keep, Needs, Plan

# Grouped LoRA linear by the Hopper product, and library GEMMs around it.
#
#     forward   EXTENDED  h = x aT by the library; y = x wT + bias + s h bT in one accumulator
#     dx        EXTENDED  dh = s dy b by the library; dx = dy w + dh a in one accumulator, or
#                         du = act'(u) dx where x = act(u)
#     gradients RANK      db = s dyT h, da = dhT x      FULL  from dw = dyT x, by the library
#
# The face and its meaning are those of ``fused_lora.kernels.aten.lora_linear``. Served where it is
# asked for by name, on sm_90, once the device has checked it.


ARCH = 90  # what the kernels are written for


def why_not(device: torch.device) -> str | None:
    """One sentence why no product can be computed on ``device``; None when one can."""
    if reason := native.why_not_on(device):
        return reason
    if (arch := Chip.of(device).arch) != ARCH:
        return f"the compiled product is written for sm_{ARCH}, this is sm_{arch}"
    return why_not_compiled()


def why_not_compiled() -> str | None:
    """One sentence why the module's product is empty; None when it has code."""
    if (code := native.compiled_without().get("lora_linear")) is None:
        return None
    return f"compiled without {code}: the module has code for {', '.join(native.archs())}"


def tiles(p: Problem, plan: Plan, dtype: torch.dtype, device: torch.device) -> list[ProductTile]:
    """The tiles of y, and of dx, that ``plan`` launches for ``p``, without repeats."""
    found = [lora_extended.tile_of(p.m, p.n, p.k, p.rank, dtype, device)]
    if p.needs.x:
        found.append(lora_extended.tile_of(p.m, p.k, p.n, p.rank, dtype, device, "columns"))
    return list(dict.fromkeys(found))


def forward(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    bordered: Tensor | None = None,  # for the library's one GEMM: not read here
    h: Tensor | None = None,  # [M, sum R] where it is there already
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and what ``plan.keep`` names: h [M, sum R] or None."""
    y, h, _ = lora_extended.forward(readable(x), readable(w), vector(bias), adapters, h=h)
    kept = packed(h, adapters) if plan.keep is Keep.HIDDEN else None
    return y, kept


def vector(t: Tensor | None) -> Tensor | None:
    """``t`` [N], copied unless it is contiguous and begins at a multiple of 4 bytes."""
    if t is None or (t.is_contiguous() and begins_at(t) % 4 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def input_grad(
    dy: Tensor,  # [M, N], rows contiguous
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]
    adapters: Adapters,
    plan: Plan,
    activation_grad: ActivationGrad | None = None,  # without a previous linear
    given: HiddenGrad | None = None,  # dh where it is there already
) -> tuple[Tensor, Tensor | None]:
    """dx [M, K], or du in its place, and dh [M, sum R], rows contiguous."""
    assert w is not None
    there = given.dh if given else None
    activation, u = "none", None
    if activation_grad:
        activation, u, previous = activation_grad
        assert previous is None
        u = readable(u)
    dx, dh = lora_extended.input_grad(
        *(readable(dy), readable(w), adapters, there), activation=activation, u=u
    )
    return dx, packed(dh, adapters)


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    kept: Tensor | None,  # what forward kept
    w: Tensor | None,  # [N, K]; None where dx is not asked for
    adapters: Adapters,
    needs: Needs,
    plan: Plan,
    activation_grad: ActivationGrad | None = None,  # where dx goes on to du
    given: HiddenGrad | None = None,  # dh where it is there already
) -> Grads:
    """The gradients named by ``needs``."""
    dx, dh = None, given.dh if given else None
    if needs.x:
        dx, dh = input_grad(dy, kept, w, adapters, plan, activation_grad, given)
    dw = None
    if needs.w:
        assert x is not None
        dw = dy.t() @ x
    if plan.gradient is Gradient.FULL:
        a, b = full_grads(dy, x, dw, adapters, adapters.to(dy.dtype), needs)
    else:
        h = kept if plan.keep is Keep.HIDDEN else None
        a = _a_grads(dy, dh, x, adapters) if needs.a else _none(adapters)
        b = _b_grads(dy, h, x, adapters) if needs.b else _none(adapters)
    return Grads(dx, dw, dy.sum(0) if needs.bias else None, a, b)


def _a_grads(
    dy: Tensor, dh: Tensor | None, x: Tensor | None, adapters: Adapters
) -> list[Tensor | None]:
    """da = dhT x, each in its own dtype."""
    assert x is not None
    dh = packed(lora_extended.shrink_grad(dy, adapters), adapters) if dh is None else dh
    return [
        product(columns(dh, ranks).t(), x, 1.0, adapters.a[g].dtype)
        for g, _, ranks in adapters.ranks()
    ]


def _b_grads(
    dy: Tensor, h: Tensor | None, x: Tensor | None, adapters: Adapters
) -> list[Tensor | None]:
    """db = s dyT h, each in its own dtype."""
    if h is None:
        assert x is not None
        h = packed(lora_extended.shrink(x, adapters), adapters)
    return [
        outer(columns(dy, cols), columns(h, ranks), adapters.scales[g], adapters.b[g].dtype)
        for g, cols, ranks in adapters.ranks()
    ]


def _none(adapters: Adapters) -> list[Tensor | None]:
    return [None] * len(adapters.spans)


def kind(epilogue: Epilogue) -> str:
    """What a check of it is called: gelu, or scale."""
    return "scale" if epilogue.activation == "none" else "gelu"


def why_not_epilogue(dtype: torch.dtype, epilogue: Epilogue) -> str | None:
    """One sentence why a product of ``dtype`` cannot end so; None when it can."""
    for name, t in (("factor", epilogue.factor), ("residual", epilogue.residual)):
        if t is not None and t.dtype is not dtype:
            return f"its epilogue reads a {name} of {dtype}, got {t.dtype}"
    if epilogue.residual is not None and not aligned(epilogue.residual):
        return "the residual or its rows do not begin at multiples of 16 bytes"
    return None


def forward_epilogue(
    x: Tensor,  # [M, K], rows contiguous
    w: Tensor,  # [N, K], x's dtype
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
    plan: Plan,
    epilogue: Epilogue,
    out: Tensor | None = None,  # [M, N] for y, rows contiguous
    h: Tensor | None = None,  # [M, sum R] where it is there already
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], h [M, sum R] where the plan keeps it, and u [M, N] of an activation."""
    direct = out if out is not None and aligned(out) else None
    y, h, u = lora_extended.forward(
        *(readable(x), readable(w), vector(bias), adapters, epilogue.activation, h),
        factor=vector(epilogue.factor),
        residual=epilogue.residual,
        out=direct,
    )
    if out is not None and direct is None:
        y = out.copy_(y)
    return y, packed(h, adapters) if plan.keep is Keep.HIDDEN else None, u
