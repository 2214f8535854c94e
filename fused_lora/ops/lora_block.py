"""The halves of a transformer block as one autograd node each."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.arguments import one_of
from fused_lora.kernels.aten import attention as kernels
from fused_lora.ops.chain.chain import chain
from fused_lora.ops.chain.linear import LinearStage
from fused_lora.ops.chain.stage import ChainSpec, Stage
from fused_lora.ops.chain.stages import ACTIVATIONS, Activation, Attention, Gated, LayerNorm, split
from fused_lora.ops.lora_linear import Frame
from fused_lora.ops.operand import Adapted, Norm, check_frozen, check_recompute, compute_dtype
from fused_lora.types import FusionContext

# lora_attention: the first half of a transformer block in one node.
#
# qkv = lora_linear(LayerNorm(x)),  out = softmax(q kT / sqrt D) v,
# y = x + gamma mask lora_linear(out)


KEEPS = {  # boundaries: 1 behind the norm, 2 behind qkv, 3 behind the attention
    "none": frozenset({1, 2, 3}),
    "elementwise": frozenset({2, 3}),
    "gemm": frozenset({3}),
}


def lora_attention(
    x: Tensor,
    norm: Norm,
    qkv: Adapted,
    proj: Adapted,
    heads: int,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    recompute: str = "gemm",
) -> Tensor:
    """Norm, fused qkv, attention, output projection and residual.

    Args:
        x: [B, T, d]; it and the attention's output are what is kept.
        norm: gamma, beta and eps.
        qkv: the projection to q, k and v, 3 heads D columns.
        proj: the output projection, d columns.
        heads: H.
        gamma: LayerScale's frozen factor [d], or None.
        mask: drop path's factor per sample, or None.
        recompute: what backward makes again: "none"; "elementwise", the norm's output; "gemm",
            q, k and v as well.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    spec = attention_spec(x, norm, qkv, proj, heads, gamma, mask, recompute)
    operands = (norm.gamma, norm.beta, *qkv.tensors(), *proj.tensors())
    return chain(spec, x, operands, None, gamma, mask)


def attention_spec(
    x: Tensor,
    norm: Norm,
    qkv: Adapted,
    proj: Adapted,
    heads: int,
    gamma: Tensor | None,
    mask: Tensor | None,
    recompute: str,
) -> ChainSpec:
    """What ``lora_attention`` is asked to do; raises as it does."""
    if x.dim() != 3:
        raise ValueError(f"lora_attention: x must be [B, T, d], got shape {tuple(x.shape)}")
    norm.check(x)
    qkv.check(x)
    width = qkv.w.shape[0]
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"lora_attention: {width} columns of qkv do not make 3 x {heads} heads")
    proj.check_behind(x, width // 3)
    if proj.w.shape[0] != x.shape[2]:
        raise ValueError(f"lora_attention: proj has {proj.w.shape[0]} columns, x {x.shape[2]}")
    check_frozen(gamma=gamma, mask=mask)
    check_recompute(recompute)
    frames, dtype = (qkv.frame(), proj.frame()), compute_dtype(x)
    kernel = None if torch.compiler.is_compiling() else kernel_for(x, heads, width)
    attention = Attention(heads, x.shape[1], kernel)
    return _attention_spec(norm.eps, *frames, attention, dtype, recompute)


def kernel_for(x: Tensor, heads: int, width: int) -> kernels.Key | None:
    """Torch's fused attention for these, whose backward takes what its forward gave; or None.

    Args:
        x: [B, T, d].
        heads: H.
        width: columns of q, k and v together.
    """
    qkv = torch.empty(1, x.shape[1], width, dtype=compute_dtype(x), device=x.device)
    return kernels.serves(*split(qkv, heads))


@lru_cache(maxsize=256)
def _attention_spec(
    eps: float,
    qkv: Frame,
    proj: Frame,
    attention: Attention,
    dtype: torch.dtype,
    recompute: str,
) -> ChainSpec:
    within = FusionContext(packed_with=2)
    first = LinearStage((qkv,), dtype, within, keeps_h=recompute != "gemm")
    last = LinearStage((proj,), dtype, within)
    stages = (LayerNorm(eps, dtype), first, attention, last)
    return ChainSpec(stages, KEEPS[recompute], lean=recompute == "gemm", around=True)


# lora_mlp: fc1, activation and fc2, plain or gated, keeping x and u; with a norm before and a
# residual around it, the whole second half of a transformer block.
#
#     u = lora_linear(n),  g = act(u) or act(u_gate) u_value,  z = lora_linear(g)
#     y = z, or x + gamma mask z;  n = x, or LayerNorm(x)


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
    spec, dtype = mlp_spec(*given), compute_dtype(x)
    operands = list(norm[:2]) if norm else []
    for linear in (fc1, fc2) if isinstance(fc1, Adapted) else (*fc1, fc2):
        operands += linear.tensors()
    source = x if norm or around else x.to(dtype)
    return chain(spec, source, operands, None, gamma, mask)


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
) -> ChainSpec:
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
) -> ChainSpec:
    stages: list[Stage] = [] if eps is None else [LayerNorm(eps, dtype)]
    active = act.gelu is not None
    packed_with = len(firsts) + 1
    first = FusionContext(activated=active, packed_with=packed_with)
    last = FusionContext(input_activated=active, packed_with=packed_with)
    keeps_h = active and len(firsts) == 1 and recompute != "gemm"  # which keeps none
    before = LinearStage(firsts, dtype, first, keeps_h)
    stages += [before, act, LinearStage((fc2,), dtype, last, keeps_h)]
    u = len(stages) - 2  # the boundary behind fc1
    keep = {"none": range(1, len(stages)), "elementwise": (u,), "gemm": ()}[recompute]
    return ChainSpec(tuple(stages), frozenset(keep), recompute == "gemm", around)


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
    one_of("activation", activation, list(ACTIVATIONS))
    one_of("gated", gated, ("first", "last"), none=True)
    if gated and len(firsts) == 2:
        raise ValueError(f"gated is of one fc1, got {gated!r} and two")
    if norm:
        norm.check(x)
    for first in firsts:
        first.check(x)
    widths = {first.w.shape[0] for first in firsts}
    if len(firsts) not in (1, 2) or len(widths) != 1 or (gated and min(widths) % 2):
        raise ValueError(f"fc1 has {len(firsts)} projections of {sorted(widths)} columns")
    fc2.check_behind(x, widths.pop() // (2 if gated else 1))


def lora_residual(
    x: Tensor,
    linear: Adapted,
    residual: Tensor,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    lean: bool = False,
) -> Tensor:
    """An output projection with what follows it in a block.

    Args:
        x: [..., K], kept for backward.
        linear: the projection, N columns.
        residual: [..., N], not kept.
        gamma: [N], LayerScale's frozen factor, or None.
        mask: drop path's factor per sample, such as [B, 1, 1], or None.
        lean: keep no h for backward but make it again.

    Returns:
        y [..., N] in the wider dtype of residual and projection.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    linear.check(x)
    check_frozen(gamma=gamma, mask=mask)
    expected = (*x.shape[:-1], linear.w.shape[0])
    if residual.shape != expected:
        raise ValueError(f"residual must be {expected}, got shape {tuple(residual.shape)}")
    dtype = compute_dtype(x)
    spec = _residual_spec(linear.frame(), dtype, lean)
    return chain(spec, x.to(dtype), linear.tensors(), residual, gamma, mask)


@lru_cache(maxsize=256)
def _residual_spec(frame: Frame, dtype: torch.dtype, lean: bool) -> ChainSpec:
    return ChainSpec((LinearStage((frame,), dtype),), lean=lean)


def layer_norm_lora_linear(
    x: Tensor, norm: Norm, linear: Adapted, recompute: str = "elementwise"
) -> Tensor:
    """The adapted projection (a grouped qkv, or fc1) of a normalised x.

    Args:
        x: [..., K]; kept for backward, in its own dtype.
        norm: gamma, beta and eps.
        linear: the projection, N columns.
        recompute: "none" keeps the norm's output too; otherwise backward makes it again.

    Returns:
        y [..., N] in the compute dtype.

    Raises:
        TypeError, ValueError: operands that do not fit, with the values seen.
    """
    check_recompute(recompute)
    norm.check(x)
    linear.check(x)
    spec = _norm_linear_spec(norm.eps, linear.frame(), compute_dtype(x), recompute)
    return chain(spec, x, (norm.gamma, norm.beta, *linear.tensors()))


@lru_cache(maxsize=256)
def _norm_linear_spec(eps: float, frame: Frame, dtype: torch.dtype, recompute: str) -> ChainSpec:
    keep = frozenset({1} if recompute == "none" else ())
    stages = (LayerNorm(eps, dtype), LinearStage((frame,), dtype))
    return ChainSpec(stages, keep, recompute == "gemm")
