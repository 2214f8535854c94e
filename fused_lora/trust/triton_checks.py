"""What each Triton kernel computes of one problem, under the names of ``equations``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fused_lora.kernels.triton.launches import Launch
from fused_lora.trust import triton_partners
from fused_lora.trust.equations import Named, flat, thin
from fused_lora.trust.problems import Operands


def run(launch: Launch, p: Operands) -> Named:
    """Every result of ``launch.kernel`` for ``p``, by name."""
    return RUNS[launch.kernel](p, launch.tile)


def _shrink(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_shrink import shrink, shrink_grad

    h, dh = shrink(p.x, p.adapters, tile=tile), shrink_grad(p.dy, p.adapters, tile=tile)
    return {"h": h, "dh": dh}


def _extended(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_extended import forward, input_grad

    h, dh = thin(p)
    y = forward(p.x, p.w, p.bias, p.adapters, h=h, tile=tile).y
    return {"y": y, "dx": input_grad(p.dy, p.w, p.adapters, dh=dh, tile=tile)[0]}


def _one_pass(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_one_pass import forward, input_grad

    y, h, _ = forward(p.x, p.w, p.bias, p.adapters, tile=tile)
    dx, dh = input_grad(p.dy, p.w, p.adapters, tile=tile)
    return {"h": h, "dh": dh, "y": y, "dx": dx}


def _grad(p: Operands, tile: Any) -> Named:
    from fused_lora.kernels.triton.lora_grad import a_grads, b_grads

    h, dh = thin(p)
    da, db = a_grads(dh, p.x, p.adapters, tile=tile), b_grads(h, p.dy, p.adapters, tile=tile)
    return {"da": flat(da), "db": flat(db)}


def _merge(p: Operands, tile: Any) -> Named:
    return {"w'": merged(p, tile)}


def merged(p: Operands, tile: Any, noise: tuple[int, int] | None = None) -> Tensor:
    """w', rounded to nearest or by ``noise``."""
    from fused_lora.kernels.triton.lora_merge import lora_merge

    return lora_merge(p.w, *p.adapters, noise, tile=tile)


RUNS: dict[str, Callable[[Operands, Any], Named]] = {
    **triton_partners.RUNS,
    "extended": _extended,
    "one_pass": _one_pass,
    "shrink": _shrink,
    "grad": _grad,
    "merge": _merge,
}
