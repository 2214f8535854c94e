"""Triton's kernels run on a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.triton.launches import Launch
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.trust.check import Named, Operands, flat, thin
from fused_lora.trust.elementwise import DROPOUT, EPS, KINDS, narrow, other


def _left(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [M, K] at the left of a longer tensor."""
    m, k = like.shape
    return like.new_empty((m, k + 8), dtype=dtype or like.dtype)[:, :k]


def _layer_norm(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.layer_norm import layer_norm_forward, layer_norm_input_grad, layer_norm_rebuild

    n, mean, rstd = forward_extended_fp8(p.x, p.gamma, p.beta, EPS, tile=tile)
    again = layer_norm_rebuild(p.x, p.gamma, p.beta, mean, rstd, _left(p.x), tile)
    grad = (p.x, p.gamma, mean, rstd)
    dx = gelu_input_grad(narrow(p.x), *grad, other(p.x, 2), tile=tile)
    named = {"n": n, "n again": again, "dx": dx}
    if p.x.dtype is not torch.float32:
        return named
    low = _left(p.x, torch.bfloat16)  # as autocast asks for
    named["n in bfloat16"] = forward_extended_fp8(p.x, p.gamma, p.beta, EPS, low, tile).y
    dy, out = narrow(p.x).bfloat16(), torch.empty_like(p.x)
    return named | {"dx of bfloat16": gelu_input_grad(dy, *grad, out=out, tile=tile)}


def _gelu(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.gelu import gelu_forward, gelu_input_grad

    named: dict[str, Tensor] = {}
    for kind in KINDS:
        named[f"{kind}"] = forward_extended_fp8(p.x, kind, _left(p.x), tile)
        named[f"{kind} du"] = gelu_input_grad(other(p.x), 4 * p.x, kind, tile=tile)
    return named


def _extended_gelu(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import forward, input_grad

    h, dh = thin(p)
    named: dict[str, Tensor] = {}
    for kind in KINDS:
        y, _, u = forward_extended_fp8(p.x, p.w, p.bias, p.adapters, kind, h, tile)
        assert u is not None
        du, _ = gelu_input_grad(p.dy, p.w, p.adapters, dh, tile, activation=kind, u=p.x)
        named |= {"u": u, f"{kind}": y, f"{kind} du": du}
        if p.x.element_size() == 2:
            alone = forward_extended_fp8(p.x, p.w, p.bias, p.adapters, kind, h, tile, stores_u=False).y
            named[f"{kind}, u not stored"] = alone
    return named


def _extended_scale(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import forward, input_grad

    h, dh = thin(p)
    residual = p.dy.to(p.factor.dtype)  # where adapters are fp32, so may what goes around be
    ending: dict[str, Any] = {"factor": p.factor, "residual": residual}
    ending["out"] = torch.empty_like(residual)
    y, _, _ = forward_extended_fp8(p.x, p.w, p.bias, p.adapters, h=h, tile=tile, **ending)
    dx, _ = gelu_input_grad(p.dy, p.w, p.adapters, dh, tile, residual=p.x)
    return {"y": y, "dx": dx}


def _dropout() -> Any:
    from fused_lora.kernels.triton.dropout import dropout

    return dropout(*DROPOUT)


def _shrink_dropout(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_shrink import shrink

    return {"h": shrink(p.x, p.adapters, tile=tile, dropout=_dropout())}


def _halves(p: Operands) -> tuple[Tensor, Tensor]:
    """The left and the right of an uninitialised bordered buffer."""
    (m, k), rank = p.x.shape, p.adapters.rank
    return p.x.new_empty(m, k + rank).split([k, rank], 1)  # type: ignore[return-value]


def _shrink_norm(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.layer_norm import layer_norm_rebuild
    from fused_lora.kernels.triton.row_shrink import layer_norm_shrink

    named: dict[str, Tensor] = {}
    for way, z in {"": p.x, ", of float32": p.x.float()}.items():  # as autocast has it
        n, mean, rstd, h = layer_norm_shrink(z, p.gamma, p.beta, EPS, p.adapters, *_halves(p), tile)
        again = layer_norm_rebuild(z, p.gamma, p.beta, mean, rstd, _left(p.x))
        named |= {f"n{way}": n, f"h{way}": h, f"n, again{way}": again}
    return named


def _shrink_gelu(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.row_shrink import gelu_shrink

    named: dict[str, Tensor] = {}
    for kind in KINDS:
        named[kind], named[f"h of {kind}"] = gelu_shrink(p.x, kind, p.adapters, *_halves(p), tile)
    return named


def _grad_dropout(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_grad import a_grads

    return {"da": flat(a_grads(thin(p)[1], p.x, p.adapters, tile=tile, dropout=_dropout()))}


def _extended_dropout(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import input_grad

    dh, mask = thin(p)[1], _dropout()
    dx, _ = gelu_input_grad(p.dy, p.w, p.adapters, dh, tile, dropout=mask)
    branch, _ = gelu_input_grad(p.dy[:, :0], p.w[:0], p.adapters, dh, tile, dropout=mask)
    return {"dx": dx, "dx of the adapters": branch}


def _quantise(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.quantise import quantise

    return {"x^": quantise(p.x, tile).widened(torch.float32)}


def _extended_fp8(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended_fp8 import forward_extended_fp8

    x, w = reference.quantise(p.x), reference.quantise(p.w)
    return {"y": forward_extended_fp8(x, w, p.bias, p.adapters, thin(p)[0], tile)}


def _merge_many(p: Operands, tile: Any) -> Named:
    return {"w'": merged_of_many(p, tile)}


def merged_of_many(p: Operands, tile: Any, noise: tuple[int, int] | None = None) -> Tensor:
    """w', each adapter a row of one table."""
    from fused_lora.kernels.triton.merged import merged_together

    (out,) = merged_together([p.w], [p.adapters], noise, tile)
    return out


def run(launch: Launch, p: Operands) -> Named:
    """Every result of ``launch.kernel`` for ``p``, by name."""
    return RUNS[launch.kernel](p, launch.tile)


def _low(p: Operands) -> Any:
    """The adapters as products read them: where they are packed, beside others, as chains do."""
    from fused_lora.kernels.triton.border import packed_together

    return packed_together([p.adapters, p.adapters], p.x.dtype)[1]


def _shrink(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_shrink import shrink, shrink_grad

    low = _low(p)
    h, dh = shrink(p.x, low, tile=tile), shrink_grad(p.dy, low, tile=tile)
    return {"h": h, "dh": dh}


def _extended(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import forward, input_grad

    (h, dh), low = thin(p), _low(p)
    y = forward_extended_fp8(p.x, p.w, p.bias, low, h=h, tile=tile).y
    return {"y": y, "dx": gelu_input_grad(p.dy, p.w, low, dh=dh, tile=tile)[0]}


def _one_pass(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_one_pass import forward, input_grad

    low = _low(p)
    y, h, _ = forward_extended_fp8(p.x, p.w, p.bias, low, tile=tile)
    dx, dh = gelu_input_grad(p.dy, p.w, low, tile=tile)
    return {"h": h, "dh": dh, "y": y, "dx": dx}


def _grad(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_grad import a_grads, b_grads

    h, dh = thin(p)
    da, db = a_grads(dh, p.x, p.adapters, tile=tile), b_grads(h, p.dy, p.adapters, tile=tile)
    return {"da": flat(da), "db": flat(db)}


def _merge(p: Operands, tile: Any) -> Named:
    return {"w'": triton_merged(p, tile)}


def triton_merged(p: Operands, tile: Any, noise: tuple[int, int] | None = None) -> Tensor:
    """w', rounded to nearest or by ``noise``."""
    from fused_lora.kernels.triton.lora_merge import lora_merge

    return lora_merge(p.w, *p.adapters, noise, tile=tile)


RUNS: dict[str, Callable[[Operands, Any], Named]] = {
    "extended_gelu": _extended_gelu,
    "extended_scale": _extended_scale,
    "extended_wide": _extended_scale,
    "extended_dropout": _extended_dropout,
    "shrink_dropout": _shrink_dropout,
    "shrink_norm": _shrink_norm,
    "shrink_gelu": _shrink_gelu,
    "grad_dropout": _grad_dropout,
    "merge_many": _merge_many,
    "quantise": _quantise,
    "extended_fp8": _extended_fp8,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "extended": _extended,
    "one_pass": _one_pass,
    "shrink": _shrink,
    "grad": _grad,
    "merge": _merge,
}
