"""Triton's and the compiled kernels run on a check's operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.cuda import lora_extended
from fused_lora.kernels.cuda.lora_extended import ProductTile
from fused_lora.kernels.cuda.lora_grad import GradSums, Sums, lora_grads
from fused_lora.kernels.cuda.lora_grad_shape import GradShape
from fused_lora.kernels.cuda.lora_merge import merged as compiled_merge
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Grads, InputNorm
from fused_lora.kernels.triton.launches import Launch
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.types import Needs, Span
from fused_lora.verify.check import Named, Operands, Shape, flat, thin
from fused_lora.verify.elementwise import (
    DROPOUT,
    EPS,
    KINDS,
    before,
    narrow,
    other,
    vectors_of_norm,
)

PRODUCTS = (  # ranks beyond a stage, columns of several adapters and of none in a tile; few rows
    Shape(300, 584, 520, (Span(0, 200, 5), Span(200, 328, 70), Span(400, 520, 16)), True, True, 8),
    Shape(5, 72, 88, (Span(0, 88, 24),), bias=False, wide=False, inside=0),
)
WHOLE = (  # columns in whole tiles; two adapters, few ranks and many rows, and the other way
    Shape(300, 512, 192, (Span(0, 128, 12), Span(128, 192, 20)), False, True, 8),
    Shape(5, 256, 64, (Span(0, 64, 5),), bias=False, wide=False, inside=0),
)
PARTS = 3  # that dy of q, k and v is packed of
ROWS = 197  # thirteen tiles, the last of five rows
EVERY = ", every processor"
FEW = 4  # processors that share them: several tiles each, more than are under way at once


def packed_of(columns: int) -> tuple[Shape, ...]:
    """Those of parts of so many columns: adapters of one part and of two, of each, and of all."""
    n = PARTS * columns
    apart = (Span(0, columns, 12), Span(columns, n, 20))
    each = tuple(Span(at, at + columns, 16) for at in range(0, n, columns))
    return (
        Shape(300, 24, n, apart, False, wide=True, inside=8),
        Shape(70, 24, n, each, False, wide=True, inside=0),
        Shape(5, 24, n, (Span(0, n, 5),), False, wide=False, inside=0),
    )


def shape_of(example: GradShape) -> Shape:
    """The problem that checks the form of ``example``: two adapters on unequal columns."""
    rank, columns = max(1, example.ranks // 3), example.n // 8 * 3
    spans = (Span(0, columns, rank), Span(columns, example.n, example.ranks - rank))
    return Shape(ROWS, example.k, example.n, spans, False, wide=True, inside=8, frozen=False)


def grads(p: Operands, example: GradShape) -> Named:
    """Every gradient, and dh where it is formed, by name; after a comma, by which way."""
    h, dh = thin(p)
    none, given = (None, None), (h, dh)
    ways = {"": none, EVERY: none, ", h given": (h, None), ", dh given": (None, dh)}
    if not example.forms:
        ways = {"": given, EVERY: given}
    named: dict[str, Tensor] = {}
    for way, both in ways.items():
        named |= _named(p, way, *both)
    return named | _together(p, *ways[""])


def grads_gelu(p: Operands, example: GradShape) -> Named:
    """Those of GELU(x) of both kinds, which the kernel forms as it reads x."""
    named: dict[str, Tensor] = {}
    for kind, approximate in KINDS.items():
        h, dh = thin(replace(p, x=F.gelu(p.x, approximate=approximate)))
        given = {} if example.forms else {"h": h, "dh": dh}
        for way, chip in {"": _few(p), EVERY: Chip.of(p.x.device)}.items():
            how: dict[str, Any] = {"activation": kind, "chip": chip, **given}
            found = _flat(lora_grads(p.x, p.dy, p.adapters, Needs(bias=True), **how))
            named |= {f"{name} of {kind}{way}": t for name, t in found.items()}
    return named


def grads_norm(p: Operands, example: GradShape) -> Named:
    """Those of LayerNorm(x), which the kernel forms as it reads x."""
    named: dict[str, Tensor] = {}
    wide, (mean, rstd) = p.x.float(), _statistics(p.x)
    for which, (gamma, beta) in vectors_of_norm(p).items():
        n = (wide - mean[:, None]) * rstd[:, None]
        n = n if gamma is None else n * gamma
        h, dh = thin(replace(p, x=(n if beta is None else n + beta).to(p.x.dtype)))
        given = {} if example.forms else {"h": h, "dh": dh}
        every = {EVERY: Chip.of(p.x.device)} if which == "both" else {}
        for way, chip in {"": _few(p), **every}.items():
            how: dict[str, Any] = {"chip": chip, **given}
            norm = InputNorm(mean, rstd, gamma, beta)
            found = _flat(lora_grads(p.x, p.dy, p.adapters, Needs(bias=True), norm=norm, **how))
            named |= {f"{name} of {which}{way}": t for name, t in found.items()}
    return named


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd [M] of a LayerNorm of x."""
    wide = x.float()
    return wide.mean(1), (wide.var(1, correction=0) + EPS).rsqrt()


def _few(p: Operands) -> Chip:
    chip = Chip.of(p.x.device)
    return chip._replace(processors=min(FEW, chip.processors))


def _named(p: Operands, way: str, h: Tensor | None, dh: Tensor | None) -> dict[str, Tensor]:
    chip, needs = Chip.of(p.x.device) if way == EVERY else _few(p), Needs(bias=True)
    formed = p.dy.new_empty(p.dy.shape[0], p.adapters.rank) if dh is None else None
    found = lora_grads(p.x, p.dy, p.adapters, needs, h, dh, chip=chip, dh_out=formed)
    named = {f"{name}{way}": t for name, t in _flat(found).items()}
    named |= {} if formed is None else {f"dh{way}": formed}
    if not way:
        into = (_copies(found.a), _copies(found.b))
        twice = _flat(lora_grads(p.x, p.dy, p.adapters, needs, h, dh, into, chip))
        named |= {f"{name}, added": twice[name] / 2 for name in ("da", "db")}
    return named


def _together(p: Operands, h: Tensor | None, dh: Tensor | None) -> dict[str, Tensor]:
    """As in a program: two passes, of few slices and of many, whose sums are one launch."""
    sums: list[Sums] = []
    chips = (_few(p), Chip.of(p.x.device))
    for chip in chips:
        how: dict[str, Any] = {"chip": chip, "add_up": sums.append}
        lora_grads(p.x, p.dy, p.adapters, Needs(bias=True), h, dh, **how)
    first, *others = (GradSums.of(each) for each in sums)
    launch = first.joined(others)
    assert launch is not None
    launch(tuple(t for each in sums for t in each.tensors))
    return {
        f"{name}, pass {i} of {len(sums)}": t
        for i, each in enumerate(sums)
        for name, t in _flat(each.grads).items()
    }


def _copies(grads: list[Tensor | None]) -> list[Tensor]:
    return [grad.clone() for grad in grads if grad is not None]


def _flat(found: Grads) -> dict[str, Tensor]:
    assert found.bias is not None
    return {"da": flat(found.a), "db": flat(found.b), "dbias": found.bias}


def products(p: Operands, **how: Any) -> Named:
    """y and dx in one tile, several of them a block."""
    return {"y": _product(p, **how).y, "dx": _input_grad(p, **how)}


def products_gelu(p: Operands, **how: Any) -> Named:
    """u and act(u) of both kinds; and du of dx, with x in the place of u."""
    named: dict[str, Tensor] = {}
    for kind in KINDS:
        y, _, u = _product(p, activation=kind, **how)
        assert u is not None
        du = _input_grad(p, activation=kind, u=p.x, **how)
        named |= {"u": u, kind: y, f"{kind} du": du}
    return named


def products_scale(p: Operands, **how: Any) -> Named:
    """y scaled, with dy in the residual's place, and dx that a gradient joins."""
    y = _product(p, factor=p.factor.to(p.x.dtype), residual=p.dy, **how).y
    return {"y": y, "dx": _input_grad(p, residual=p.x, **how)}


EPILOGUES = {"": products, "gelu": products_gelu, "scale": products_scale}


def run_product(p: Operands, behind: str, tile: ProductTile) -> Named:
    """Every result of the compiled product with an epilogue of ``EPILOGUES``."""
    return EPILOGUES[behind](p, tile=tile, chip=_few(p))


def _product(p: Operands, **how: Any) -> lora_extended.CompiledOutput:
    return lora_extended.forward(p.x, p.w, p.bias, p.adapters, h=thin(p)[0], **how)


def _input_grad(p: Operands, **how: Any) -> Tensor:
    return lora_extended.input_grad(p.dy, p.w, p.adapters, thin(p)[1], **how)[0]


def cuda_merged(p: Operands, noise: tuple[int, int] | None = None) -> Tensor:
    """w', rounded to nearest or by ``noise``."""
    return compiled_merge(p.w, p.adapters, noise)


def _left(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [M, K] at the left of a longer tensor."""
    m, k = like.shape
    return like.new_empty((m, k + 8), dtype=dtype or like.dtype)[:, :k]


def _layer_norm(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.elementwise import (
        layer_norm_forward,
        layer_norm_input_grad,
        layer_norm_rebuild,
    )

    n, mean, rstd = layer_norm_forward(p.x, p.gamma, p.beta, EPS, tile=tile)
    again = layer_norm_rebuild(p.x, p.gamma, p.beta, mean, rstd, _left(p.x), tile)
    grad = (p.x, p.gamma, mean, rstd)
    dx = layer_norm_input_grad(narrow(p.x), *grad, other(p.x, 2), tile=tile)
    named = {"n": n, "n again": again, "dx": dx}
    if p.x.dtype is not torch.float32:
        return named
    low = _left(p.x, torch.bfloat16)  # as autocast asks for
    named["n in bfloat16"] = layer_norm_forward(p.x, p.gamma, p.beta, EPS, low, tile).y
    dy, out = narrow(p.x).bfloat16(), torch.empty_like(p.x)
    return named | {"dx of bfloat16": layer_norm_input_grad(dy, *grad, out=out, tile=tile)}


def _gelu(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.elementwise import gelu_forward, gelu_input_grad

    named: dict[str, Tensor] = {}
    for kind in KINDS:
        named[f"{kind}"] = gelu_forward(p.x, kind, _left(p.x), tile)
        named[f"{kind} du"] = gelu_input_grad(other(p.x), 4 * p.x, kind, tile=tile)
    return named


def _extended_gelu(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import forward, input_grad

    h, dh = thin(p)
    named: dict[str, Tensor] = {}
    for kind in KINDS:
        y, _, u = forward(p.x, p.w, p.bias, p.adapters, kind, h, tile)
        assert u is not None
        du, _ = input_grad(p.dy, p.w, p.adapters, dh, tile, activation=kind, u=p.x)
        named |= {"u": u, f"{kind}": y, f"{kind} du": du}
        if p.x.element_size() == 2:
            alone = forward(p.x, p.w, p.bias, p.adapters, kind, h, tile, stores_u=False).y
            named[f"{kind}, u not stored"] = alone
    return named


def _extended_grads(p: Operands, tile: Any, kind: str = "erf") -> Named:
    from fused_lora.kernels.triton.lora_grad import input_grad_and_slices

    h, dh = thin(p)
    return _added_up(p, input_grad_and_slices(p.dy, p.w, p.adapters, dh, kind, p.x, h, tile), kind)


def _gelu_grads(p: Operands, tile: Any, kind: str = "erf") -> Named:
    from fused_lora.kernels.triton.lora_grad import activation_grad_and_slices, add_blocks

    (h, dh), own = thin(p), before(p)
    made = activation_grad_and_slices(narrow(p.x), p.adapters, dh, kind, p.x, h, own, tile)
    assert made.hidden is not None
    dh_before = add_blocks(made.hidden, own, p.x.dtype)
    return {**_added_up(p, made, kind), f"{kind} dh before": dh_before}


def _pack_grads(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_grad import add_blocks
    from fused_lora.kernels.triton.lora_grad_rank import pack_and_slices

    columns = p.dy.shape[1]
    parts = p.dy.split(columns // PARTS, 1)
    made = pack_and_slices(parts, thin(p)[0], p.adapters, tile)
    dh, sums = add_blocks(made.hidden, p.adapters, p.dy.dtype, columns=columns), made.b.sum(0)
    scaled = [p.adapters.scales[g] * sums[own, ranks] for g, own, ranks in p.adapters.ranks()]
    return {"dy": made.dy, "db": flat([db.to(p.dy.dtype) for db in scaled]), "dh": dh}


def _added_up(p: Operands, made: Any, kind: str) -> Named:
    da, db = (slices.sum(0)[:, : p.adapters.rank].to(p.x.dtype) for slices in (made.a, made.b))
    return {f"{kind} du": made.du, f"{kind} da": da, f"{kind} db before": db}


def _extended_scale(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import forward, input_grad

    h, dh = thin(p)
    y, _, _ = forward(p.x, p.w, p.bias, p.adapters, h=h, tile=tile, **_joined(p))
    dx, _ = input_grad(p.dy, p.w, p.adapters, dh, tile, residual=p.x)
    return {"y": y, "dx": dx}


def _one_pass_scale(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_one_pass import forward, input_grad

    low = _low(p)
    y, h, _ = forward(p.x, p.w, p.bias, low, tile, **_joined(p))
    dx, dh = input_grad(p.dy, p.w, low, tile, residual=p.x)
    return {"h": h, "dh": dh, "y": y, "dx": dx}


def _joined(p: Operands) -> dict[str, Any]:
    """LayerScale and a residual, both fp32 where adapters are, as what goes around may be."""
    residual = p.dy.to(p.factor.dtype)
    return {"factor": p.factor, "residual": residual, "out": torch.empty_like(residual)}


def _dropout() -> Any:
    from fused_lora.kernels.triton.philox import dropout

    return dropout(*DROPOUT)


def _shrink_dropout(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_shrink import shrink

    return {"h": shrink(p.x, p.adapters, tile=tile, dropout=_dropout())}


def _halves(p: Operands) -> tuple[Tensor, Tensor]:
    """The left and the right of an uninitialised bordered buffer."""
    (m, k), rank = p.x.shape, p.adapters.rank
    return p.x.new_empty(m, k + rank).split([k, rank], 1)  # type: ignore[return-value]


def _shrink_norm(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.border import Packed, packing
    from fused_lora.kernels.triton.elementwise import layer_norm_rebuild
    from fused_lora.kernels.triton.lora_shrink import layer_norm_shrink

    named: dict[str, Tensor] = {}
    (_, low), pieces = packing([p.adapters, p.adapters], p.x.dtype)
    if pieces:  # what a program has its launch do as well
        given = (p.x, p.gamma, p.beta, EPS, p.adapters, *_halves(p), tile, pieces)
        n, _, _, h = layer_norm_shrink(*given)
        named |= {"n, packing": n, "h, packing": h}
        assert isinstance(low, Packed)
        named |= {"a": low.a, "b": low.b}
    for way, z in {"": p.x, ", of float32": p.x.float()}.items():  # as autocast has it
        n, mean, rstd, h = layer_norm_shrink(z, p.gamma, p.beta, EPS, p.adapters, *_halves(p), tile)
        again = layer_norm_rebuild(z, p.gamma, p.beta, mean, rstd, _left(p.x))
        named |= {f"n{way}": n, f"h{way}": h, f"n, again{way}": again}
    return named


def _shrink_gelu(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_shrink import gelu_shrink

    named: dict[str, Tensor] = {}
    for kind in KINDS:
        named[kind], named[f"h of {kind}"] = gelu_shrink(p.x, kind, p.adapters, *_halves(p), tile)
    return named


def _expand_norm(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_expand import layer_norm_expand

    named: dict[str, Tensor] = {}
    dy, statistics, dh = other(p.x), _statistics(p.x), thin(p)[1]
    for way, x in {"": p.x, ", of float32": p.x.float()}.items():  # as autocast has it
        given = (dy, x, p.gamma, *statistics, dh, p.adapters)
        named[f"dx alone{way}"] = layer_norm_expand(*given, out=torch.empty_like(x), tile=tile)
        named[f"dx{way}"] = layer_norm_expand(*given, other(x, 2), _left(x), tile)
    return named


def _expand_residual(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_expand import residual_expand

    named: dict[str, Tensor] = {}
    for way, residual in {"": other(p.dy), ", of float32": other(p.dy).float()}.items():
        given = (thin(p)[0], p.adapters, residual)
        named[f"y alone{way}"] = residual_expand(p.dy, *given, tile=tile)
        z = p.dy.clone() if residual.dtype is p.dy.dtype else p.dy
        out = z if z is not p.dy else None  # as chains have it: z is written where it can be
        named[f"y{way}"] = residual_expand(z, *given, p.factor, out, tile)
    return named


def _border_weight(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_merge import bordered_weight, bordered_weight_rows

    n, k = p.w.shape
    named: dict[str, Tensor] = {}
    for way, w in {"": p.w, ", by columns": p.w.t().contiguous().t()}.items():
        right = bordered_weight(w, p.adapters, tile=tile)
        below = bordered_weight_rows(w, p.adapters, tile=tile)
        changed = (right[:, :k] != w).sum() + (below[:n] != w).sum()
        named |= {f"right{way}": right, f"below{way}": below, f"w changed{way}": changed[None]}
    return named


def _grad_dropout(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_grad_rank import a_grads

    return {"da": flat(a_grads(thin(p)[1], p.x, p.adapters, tile=tile, dropout=_dropout()))}


def _extended_dropout(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import input_grad

    dh, mask = thin(p)[1], _dropout()
    dx, _ = input_grad(p.dy, p.w, p.adapters, dh, tile, dropout=mask)
    branch, _ = input_grad(p.dy[:, :0], p.w[:0], p.adapters, dh, tile, dropout=mask)
    return {"dx": dx, "dx of the adapters": branch}


def _quantise(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_linear_fp8 import quantise

    return {"x^": quantise(p.x, tile).widened(torch.float32)}


def _extended_fp8(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_linear_fp8 import forward_extended_fp8

    x, w = reference.quantise(p.x), reference.quantise(p.w)
    return {"y": forward_extended_fp8(x, w, p.bias, p.adapters, thin(p)[0], tile)}


def _merge_many(p: Operands, tile: Any) -> Named:
    return {"w'": merged_of_many(p, tile)}


def merged_of_many(p: Operands, tile: Any, noise: tuple[int, int] | None = None) -> Tensor:
    """w', each adapter a row of one table."""
    from fused_lora.kernels.triton.lora_merge import merged_together

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
    y = forward(p.x, p.w, p.bias, low, h=h, tile=tile).y
    return {"y": y, "dx": input_grad(p.dy, p.w, low, dh=dh, tile=tile)[0]}


def _one_pass(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_one_pass import forward, input_grad

    low = _low(p)
    y, h, _ = forward(p.x, p.w, p.bias, low, tile=tile)
    dx, dh = input_grad(p.dy, p.w, low, tile=tile)
    return {"h": h, "dh": dh, "y": y, "dx": dx}


def _grad(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_grad_rank import a_grads, b_grads

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
    "extended_grads": _extended_grads,
    "extended_grads_tanh": partial(_extended_grads, kind="tanh"),
    "gelu_grads": _gelu_grads,
    "gelu_grads_tanh": partial(_gelu_grads, kind="tanh"),
    "pack_grads": _pack_grads,
    "extended_scale": _extended_scale,
    "extended_wide": _extended_scale,
    "one_pass_scale": _one_pass_scale,
    "one_pass_wide": _one_pass_scale,
    "extended_dropout": _extended_dropout,
    "shrink_dropout": _shrink_dropout,
    "shrink_norm": _shrink_norm,
    "shrink_gelu": _shrink_gelu,
    "expand_norm": _expand_norm,
    "expand_residual": _expand_residual,
    "border_weight": _border_weight,
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
