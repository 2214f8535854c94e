"""The operations beside a product: what each computes, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.interface import Adapters
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.reference.dropout import dropout
from fused_lora.types import Span
from fused_lora.verify.check import Named, Operands, flat, gradients, products, thin

# What the partners of a product should compute of one problem, by plain torch in its own dtype.
#
# LayerNorm and GELU take x [M, K] as their input and u; rows of x stand for gradients as well.


EPS = 1e-6  # of LayerNorm
DROPOUT = (0.3, 2**63 + 5, 2**40 + 1)  # p, and a seed and a step with bits in all four words
KINDS = {"erf": "none", "tanh": "tanh"}  # of GELU, here and in torch


def other(x: Tensor, rows: int = 1) -> Tensor:
    """Another [M, K] as random as x."""
    return x.roll(rows, 0)


def narrow(x: Tensor) -> Tensor:
    """A gradient [M, K] that any dtype holds exactly."""
    return (8 * other(x)).round() / 8


def _layer_norm(p: Operands) -> Named:
    """n, and dx with a gradient that joins; wrong statistics would show in what reads them."""
    y = torch.native_layer_norm(p.x, p.x.shape[1:], p.gamma, p.beta, EPS)[0]
    dx = _norm_grad(p, narrow(p.x))
    low = y.bfloat16() if y.dtype is torch.float32 else y
    named = {"n": y, "n again": y, "n in bfloat16": low}
    return named | {"dx": dx + other(p.x, 2), "dx of bfloat16": dx}


def _norm_grad(p: Operands, dy: Tensor) -> Tensor:
    """dx of LayerNorm of x."""
    _, *statistics = torch.native_layer_norm(p.x, p.x.shape[1:], p.gamma, p.beta, EPS)
    given = (dy, p.x, p.x.shape[1:], *statistics, p.gamma, p.beta, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(*given)[0]  # type: ignore[no-any-return]


def _slope(u: Tensor, dy: Tensor, kind: str) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, u, approximate=KINDS[kind])


def _gelu(p: Operands) -> Named:
    """y and du of both kinds; du far into the tails."""
    named = {}
    for kind, approximate in KINDS.items():
        named[f"{kind}"] = F.gelu(p.x, approximate=approximate)
        named[f"{kind} du"] = _slope(4 * p.x, other(p.x), kind)
    return named


def _extended_gelu(p: Operands) -> Named:
    """u and act(u), and dx behind an activation of x."""
    right = products(p)
    named = {"u": right["y"]}
    for kind, approximate in KINDS.items():
        named[f"{kind}"] = F.gelu(right["y"], approximate=approximate)
        named[f"{kind} du"] = _slope(p.x, right["dx"], kind)
    return named


def _extended_grads(p: Operands) -> Named:
    """du behind an activation of x = u, da of act(u) and duT h, both transposed."""
    return _grads_behind(p, products(p)["dx"])


def _gelu_grads(p: Operands) -> Named:
    """Likewise of a dx that waits for dh a; and dh of the linear before."""
    a = torch.cat(tuple(p.adapters.to(p.x.dtype).a))
    named = dict(_grads_behind(p, narrow(p.x) + thin(p)[1] @ a))
    for kind in KINDS:
        made_u = replace(p, dy=named[f"{kind} du"], adapters=before(p))
        named[f"{kind} dh before"] = thin(made_u)[1]
    return named


def _pack_grads(p: Operands) -> Named:
    """dy of its parts, db and dh of it."""
    return {"dy": p.dy, "db": gradients(p)["db"], "dh": thin(p)[1]}


def _grads_behind(p: Operands, dx: Tensor) -> Named:
    h, dh = thin(p)
    named: dict[str, Tensor] = {}
    for kind, approximate in KINDS.items():
        du = _slope(p.x, dx, kind)
        da = F.gelu(p.x, approximate=approximate).T @ dh
        named |= {f"{kind} du": du, f"{kind} da": da, f"{kind} db before": du.T @ h}
    return named


def before(p: Operands) -> Adapters:
    """Those of a linear that made x: side by side, with b of a's columns."""
    (a, _, scales, spans), k = p.adapters, p.x.shape[1]
    edges = [*(k * g // (len(a) + 1) for g in range(len(a))), k]
    own = [Span(edges[g], edges[g + 1], span.rank) for g, span in enumerate(spans)]
    b = [a_g[:, span.start : span.stop].t() for a_g, span in zip(a, own, strict=True)]
    return Adapters(a, b, scales, own)


def _product_scale(p: Operands) -> Named:
    """y scaled, with dy in the residual's place, and dx that a gradient joins; h and dh."""
    right = products(p)
    return {**right, "y": p.dy + p.factor * right["y"], "dx": right["dx"] + p.x}


def _shrink_dropout(p: Operands) -> Named:
    return {"h": _shrunk(p, dropout(p.x, *DROPOUT))}


def _shrink_norm(p: Operands) -> Named:
    """n, and h of it; a and b as its launch packs them, in rows of whole 16 elements."""
    n, low = _layer_norm(p)["n"], p.adapters.to(p.x.dtype)
    a, b = torch.cat(tuple(low.a)), p.x.new_zeros(low.rank, max(c.stop for c in low.spans))
    for g, columns, ranks in low.ranks():
        b[ranks, columns] = low.b[g].T
    a, b = (F.pad(half, (0, -half.shape[1] % 16)) for half in (a, b))
    return {"n": n, "h": _shrunk(p, n), "a": a, "b": b}


def _shrink_gelu(p: Operands) -> Named:
    """g of both kinds, and h of each."""
    made = {kind: F.gelu(p.x, approximate=approximate) for kind, approximate in KINDS.items()}
    return {**made, **{f"h of {kind}": _shrunk(p, g) for kind, g in made.items()}}


def _expand_norm(p: Operands) -> Named:
    """dx of LayerNorm with a low-rank term in its dy, and with a gradient that joins."""
    alone = _norm_grad(p, other(p.x) + _terms(p)["dx"])
    return {"dx alone": alone, "dx": alone + other(p.x, 2)}


def _expand_residual(p: Operands) -> Named:
    """A residual beside dy with a low-rank term, which is scaled and which is not."""
    y = p.dy + _terms(p)["y"]
    return {"y alone": other(p.dy) + y, "y": other(p.dy) + p.factor * y}


def _border_weight(p: Operands) -> Named:
    """[w | s b] and [w ; a]; and of how many elements of w the bits differ from its own."""
    low, n = p.adapters.to(p.x.dtype), p.w.shape[0]
    right = p.w.new_zeros(n, low.rank)
    for g, columns, ranks in low.ranks():
        right[columns, ranks] = low.scales[g] * low.b[g]
    below = torch.cat((p.w, *low.a))
    return {"right": torch.cat((p.w, right), 1), "below": below, "w changed": p.w.new_zeros(1)}


def _terms(p: Operands) -> Named:
    """What adapters add to y and to dx."""
    return products(replace(p, w=torch.zeros_like(p.w), bias=None))


def gradients_gelu(p: Operands) -> Named:
    """Those of adapters on GELU(x), of both kinds."""
    return {
        f"{name} of {kind}": t
        for kind, approximate in KINDS.items()
        for name, t in gradients(replace(p, x=F.gelu(p.x, approximate=approximate))).items()
    }


def gradients_norm(p: Operands) -> Named:
    """Those of adapters on LayerNorm(x), with gamma and beta, with either and with none."""
    found: dict[str, Tensor] = {}
    for which, vectors in vectors_of_norm(p).items():
        n = F.layer_norm(p.x, p.x.shape[1:], *vectors, EPS)
        found |= {f"{name} of {which}": t for name, t in gradients(replace(p, x=n)).items()}
    return found


def vectors_of_norm(p: Operands) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """gamma and beta of a LayerNorm, by which of them there are."""
    return {
        "both": (p.gamma, p.beta),
        "gamma": (p.gamma, None),
        "beta": (None, p.beta),
        "none": (None, None),
    }


def _shrunk(p: Operands, x: Tensor) -> Tensor:
    return x @ torch.cat(tuple(p.adapters.to(x.dtype).a)).T


def _grad_dropout(p: Operands) -> Named:
    dropped, _, parts = dropout(p.x, *DROPOUT), *apart(p)
    return {"da": flat([part.T @ dropped for part in parts])}


def _extended_dropout(p: Operands) -> Named:
    a = p.adapters.to(p.x.dtype).a
    branch = dropout(apart(p)[0] @ torch.cat(tuple(a)), *DROPOUT)
    return {"dx of the adapters": branch, "dx": p.dy @ p.w + branch}


def _quantise(p: Operands) -> Named:
    return {"x^": reference.quantise(p.x).widened(p.x.dtype)}


def _extended_fp8(p: Operands) -> Named:
    """y on the codes of x and w, which are those of any dtype that holds them."""
    return {"y": reference.forward(p.x, reference.quantise(p.w), p.bias, *p.adapters)}


def apart(p: Operands) -> tuple[Tensor, tuple[Tensor, ...]]:
    """dh, and the ranks of each group of it."""
    dh = thin(p)[1]
    return dh, dh.split([span.rank for span in p.adapters.spans], dim=1)


EQUATIONS: dict[str, Callable[[Operands], Named]] = {
    "extended_gelu": _extended_gelu,
    "extended_grads": _extended_grads,
    "extended_grads_tanh": _extended_grads,
    "gelu_grads": _gelu_grads,
    "gelu_grads_tanh": _gelu_grads,
    "pack_grads": _pack_grads,
    "extended_scale": _product_scale,
    "extended_wide": _product_scale,
    "one_pass_scale": _product_scale,
    "one_pass_wide": _product_scale,
    "extended_dropout": _extended_dropout,
    "shrink_dropout": _shrink_dropout,
    "shrink_norm": _shrink_norm,
    "shrink_gelu": _shrink_gelu,
    "expand_norm": _expand_norm,
    "expand_residual": _expand_residual,
    "border_weight": _border_weight,
    "grad_dropout": _grad_dropout,
    "quantise": _quantise,
    "extended_fp8": _extended_fp8,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
}
