"""What each compiled kernel computes of one problem, under the names of its equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fused_lora.kernels.cuda import lora_extended
from fused_lora.kernels.cuda.chip import Chip
from fused_lora.kernels.cuda.lora_extended import Tile
from fused_lora.kernels.cuda.lora_grad import lora_grads
from fused_lora.kernels.cuda.lora_grad_shape import GradShape
from fused_lora.kernels.cuda.merged import merged as compiled_merge
from fused_lora.kernels.interface import Grads
from fused_lora.trust.check import Named, Operands, Shape, flat, thin
from fused_lora.trust.elementwise import KINDS
from fused_lora.types import Needs, Span

PRODUCTS = (  # ranks beyond a stage, columns of several adapters and of none in a tile; few rows
    Shape(300, 584, 520, (Span(0, 200, 5), Span(200, 328, 70), Span(400, 520, 16)), True, True, 8),
    Shape(5, 72, 88, (Span(0, 88, 24),), bias=False, wide=False, inside=0),
)
ROWS = 197  # thirteen tiles, the last of five rows
EVERY = ", every processor"
FEW = 4  # processors that share them: several tiles each, more than are under way at once


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
    return named


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


def _copies(grads: list[Tensor | None]) -> list[Tensor]:
    return [grad.clone() for grad in grads if grad is not None]


def _flat(found: Grads) -> dict[str, Tensor]:
    assert found.bias is not None
    return {"da": flat(found.a), "db": flat(found.b), "dbias": found.bias}


def products(p: Operands, **how: Any) -> Named:
    """y and dx in one tile, several of them a block."""
    return {"y": _product(p, **how).y, "dx": _input_grad(p, **how)}


def products_gelu(p: Operands, **how: Any) -> Named:
    """u and act(u) of both kinds."""
    named: dict[str, Tensor] = {}
    for kind in KINDS:
        y, _, u = _product(p, activation=kind, **how)
        assert u is not None
        named |= {"u": u, kind: y}
    return named


def products_scale(p: Operands, **how: Any) -> Named:
    """y scaled, with dy in the residual's place, and dx that a gradient joins."""
    y = _product(p, factor=p.factor.to(p.x.dtype), residual=p.dy, **how).y
    return {"y": y, "dx": _input_grad(p, residual=p.x, **how)}


ENDINGS = {"": products, "gelu": products_gelu, "scale": products_scale}


def run_product(p: Operands, behind: str, tile: Tile) -> Named:
    """Every result of the compiled product with an ending of ``ENDINGS``."""
    return ENDINGS[behind](p, tile=tile, chip=_few(p))


def _product(p: Operands, **how: Any) -> lora_extended.CompiledOutput:
    return lora_extended.forward(p.x, p.w, p.bias, p.adapters, h=thin(p)[0], **how)


def _input_grad(p: Operands, **how: Any) -> Tensor:
    return lora_extended.input_grad(p.dy, p.w, p.adapters, thin(p)[1], **how)[0]


def cuda_merged(p: Operands, noise: tuple[int, int] | None = None) -> Tensor:
    """w', rounded to nearest or by ``noise``."""
    return compiled_merge(p.w, p.adapters, noise)
