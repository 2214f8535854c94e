"""lora_mlp: fc1, activation and fc2, plain or gated, keeping x and u; with a norm before and a
residual around it, the whole second half of a transformer block.

    u = lora_linear(n),  g = act(u) or act(u_gate) u_value,  z = lora_linear(g)
    y = z, or x + gamma mask z;  n = x, or LayerNorm(x)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.ops.chain.activation import ACTIVATIONS, Activation, Gated
from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LinearStage
from fused_lora.ops.chain.norm import LayerNorm
from fused_lora.ops.chain.stage import ChainRecipe, Stage
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.operand import (
    Adapted,
    Norm,
    check_frozen,
    check_recompute,
    compute_dtype,
)
from fused_lora.types import Beside


def lora_mlp(
    x: Tensor,
    fc1: Adapted | tuple[Adapted, Adapted],
    fc2: Adapted,
    activation: str = "gelu",
    *,
    gated: str | None = None,
    norm: Norm | None = None,
    around: bool = False,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    recompute: str = "elementwise",
) -> Tensor:
    """An MLP whose activations are made again in backward.

    Args:
        x: [..., K], kept for backward.
        fc1: the first projection, or the two (gate, value) of a gated MLP that has them apart.
        fc2: the second.
        activation: "gelu", "gelu_tanh", "silu" or "sigmoid".
        gated: which half of a single fc1's output is the gate, "first" or "last"; None for a
            plain MLP. With two fc1, leave it None.
        norm: a LayerNorm before fc1.
        around: add x itself to the result.
        gamma: LayerScale's frozen factor [N] on the result before x is added.
        mask: drop path's factor per sample, likewise.
        recompute: what backward makes again: "none"; "elementwise", the norm's output and g;
            "gemm", u as well.

    Returns:
        y [..., N].

    Raises:
        TypeError, ValueError: operands or options that do not fit, with the values seen.
    """
    given = (x, fc1, fc2, activation, gated, norm, around, gamma, mask, recompute)
    recipe, dtype = mlp_spec(*given), compute_dtype(x)
    operands = list(norm[:2]) if norm else []
    for linear in (fc1, fc2) if isinstance(fc1, Adapted) else (*fc1, fc2):
        operands += linear.tensors()
    source = x if norm or around else x.to(dtype)
    return chain(recipe, source, operands, None, gamma, mask)


def mlp_spec(
    x: Tensor,
    fc1: Adapted | tuple[Adapted, Adapted],
    fc2: Adapted,
    activation: str,
    gated: str | None,
    norm: Norm | None,
    around: bool,
    gamma: Tensor | None,
    mask: Tensor | None,
    recompute: str,
) -> ChainRecipe:
    """What ``lora_mlp`` is asked to do; raises as it does."""
    firsts = (fc1,) if isinstance(fc1, Adapted) else tuple(fc1)
    _check_mlp(x, firsts, fc2, activation, gated, norm, recompute)
    if around and fc2.w.shape[0] != x.shape[-1]:
        raise ValueError(f"fc2 has {fc2.w.shape[0]} columns, the x around it {x.shape[-1]}")
    check_frozen(gamma=gamma, mask=mask)
    act: Stage = Activation(activation)
    if gated or len(firsts) == 2:
        act = Gated(activation, gated == "last")
    frames = tuple([first.frame() for first in firsts])
    eps = norm.eps if norm else None
    return _mlp_spec(eps, frames, act, fc2.frame(), compute_dtype(x), recompute, around)


@lru_cache(maxsize=256)
def _mlp_spec(
    eps: float | None,
    firsts: tuple[Frame, ...],
    act: Stage,
    fc2: Frame,
    dtype: torch.dtype,
    recompute: str,
    around: bool,
) -> ChainRecipe:
    stages: list[Stage] = [] if eps is None else [LayerNorm(eps, dtype)]
    active = act.gelu is not None
    first = LinearStage(firsts, dtype, Beside(activated=active))
    stages += [first, act, LinearStage((fc2,), dtype, Beside(sloped=active))]
    u = len(stages) - 2  # the boundary behind fc1
    keep = {"none": range(1, len(stages)), "elementwise": (u,), "gemm": ()}[recompute]
    return ChainRecipe(tuple(stages), frozenset(keep), recompute == "gemm", around)


def _check_mlp(
    x: Tensor,
    firsts: tuple[Adapted, ...],
    fc2: Adapted,
    activation: str,
    gated: str | None,
    norm: Norm | None,
    recompute: str,
) -> None:
    check_recompute(recompute)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if gated not in (None, "first", "last") or (gated and len(firsts) == 2):
        raise ValueError(f"gated must be None, 'first' or 'last' of one fc1, got {gated!r}")
    if norm:
        norm.check(x)
    for first in firsts:
        first.check(x)
    widths = {first.w.shape[0] for first in firsts}
    if len(firsts) not in (1, 2) or len(widths) != 1 or (gated and min(widths) % 2):
        raise ValueError(f"fc1 has {len(firsts)} projections of {sorted(widths)} columns")
    fc2.check_behind(x, widths.pop() // (2 if gated else 1))
