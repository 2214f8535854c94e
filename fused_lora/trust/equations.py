"""What the kernels should compute of one problem, by plain torch in its own dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fused_lora.reference import lora_linear as reference
from fused_lora.trust.problems import Operands
from fused_lora.types import Needs

Named = Mapping[str, Tensor]


def equations(p: Operands, kernel: str = "") -> Named:
    """Every result of ``kernel`` by name, and maybe others."""
    from fused_lora.trust.partners import PARTNERS

    return PARTNERS.get(kernel, products)(p)


def products(p: Operands) -> Named:
    """Those of lora_linear and of the merge."""
    a, b, scales, spans = p.adapters
    h, dh = thin(p)
    y = reference.forward(p.x, p.w, p.bias, *p.adapters)
    grads = reference.backward(p.dy, p.x, p.w, *p.adapters, Needs())
    merged = p.w.clone()
    for a_g, b_g, s_g, span in zip(a, b, scales, spans, strict=True):
        merged[span.start : span.stop] += s_g * (b_g @ a_g)
    assert grads.x is not None
    da, db = flat(grads.a), flat(grads.b)
    return {"h": h, "dh": dh, "y": y, "dx": grads.x, "da": da, "db": db, "w'": merged}


def gradients(p: Operands) -> Named:
    """What ``equations`` has of adapters' gradients, that of the bias, and dh; without w."""
    h, dh = thin(p)
    low = p.adapters.to(p.x.dtype)
    da = dh.T @ p.x
    db = [low.scales[g] * p.dy[:, cols].T @ h[:, ranks] for g, cols, ranks in low.ranks()]
    return {"da": da.flatten(), "db": flat(db), "dbias": p.dy.sum(0), "dh": dh}


def thin(p: Operands) -> tuple[Tensor, Tensor]:
    """h and dh; given to the kernels that read them, so that one is judged at a time."""
    a, b, scales, spans = p.adapters.to(p.x.dtype)
    dh = [s * p.dy[:, c.start : c.stop] @ b_g for s, c, b_g in zip(scales, spans, b, strict=True)]
    return p.x @ torch.cat(tuple(a)).T, torch.cat(dh, 1)


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """A group's gradients as one vector: apart, one element would be judged by one rounding."""
    return torch.cat([t.flatten() for t in tensors if t is not None])
