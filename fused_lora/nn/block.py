"""Blocks and MLPs as one call each: they keep what the frozen ones keep, and h."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from fused_lora.nn import block_modules as parts
from fused_lora.nn.block_modules import FusedModule, Half
from fused_lora.nn.stand_in import why_watched
from fused_lora.ops.chain.chain import Chain
from fused_lora.ops.chain.stages import Split
from fused_lora.ops.lora_block import (
    attention_spec,
    kernel_for,
    layer_norm_lora_linear,
    lora_mlp,
    lora_residual,
    mlp_spec,
)
from fused_lora.ops.operand import Adapted, compute_dtype
from fused_lora.programs.run import attention_settings, transformed

PACKED = "timm.layers.mlp.GluMlp"
APART = "timm.layers.mlp.SwiGLU"


class FusedLoRAMlp(FusedModule):
    """An MLP (timm's Mlp, GluMlp or SwiGLU) whose activations are recomputed in backward."""

    known = parts.MLPS
    fc2: Any

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        if torch.compiler.is_compiling() or transformed() or isinstance(x, Proxy):
            return super().forward(x)
        (half,) = self.__dict__.get("_halves") or self._new_halves()
        return half(self, x)  # type: ignore[no-any-return]

    def _new_halves(self) -> tuple[Half]:
        return self.__dict__.setdefault("_halves", (WholeMlp(),))


class WholeMlp(Half):
    """An MLP without a norm before it or a residual around it."""

    __slots__ = ()
    weight = 4

    def watched(self, mlp: Any) -> Sequence[nn.Module]:
        """All below it."""
        return [module for module in mlp.modules() if module is not mlp]

    def why_not(self, mlp: Any) -> str | None:
        return why_not_mlp(mlp)

    def gather(self, mlp: Any, x: Tensor) -> tuple[tuple[Any, ...], list[Any], Any, bool]:
        state, operands, held = mlp_state(mlp)
        return (mlp.__dict__["_recompute"], *state), [x, None, None, None, *operands], None, held

    def choose(self, mlp: Any, x: Tensor) -> Any:
        """One chain, where x is in the dtype that it computes in."""
        if x.dtype is not compute_dtype(x):
            return None
        options: dict[str, Any] = {"norm": None, "around": False, "gamma": None, "mask": None}
        return Chain(mlp_spec(x, **mlp_options(mlp), **options, recompute=mlp.recompute))

    def by_parts(self, mlp: Any, x: Tensor) -> Tensor:
        return lora_mlp(x, **mlp_options(mlp), recompute=mlp.recompute)

    def by_modules(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.plain.forward(mlp, x)  # type: ignore[no-any-return]


def mlp_state(mlp: Any) -> tuple[tuple[Any, ...], list[Any], bool]:
    """What beside tensors decides how ``mlp`` computes, the operands of its projections, and
    whether all of these are its own."""
    inside, own = mlp.__dict__["_modules"], mlp.__dict__
    drops = inside["drop1"].__dict__, inside["drop2"].__dict__
    state = [own.get("gate_last"), inside["act"].__dict__.get("approximate")]
    for drop in drops:
        state += [drop["training"], drop["p"]]
    operands: list[Any] = []
    held = True
    for name in ("fc1_g", "fc1_x", "fc2") if "fc1_g" in inside else ("fc1", "fc2"):
        linear = inside[name]
        state.append(linear._state())
        own, whole = linear._gather()
        operands += own
        held = held and whole
    return tuple(state), operands, held


def linears(mlp: Any) -> Iterator[Any]:
    """Its projections, fc2 last."""
    for name in ("fc1_g", "fc1_x", "fc2") if parts.kind(mlp) == APART else ("fc1", "fc2"):
        yield getattr(mlp, name)


def why_not_mlp(mlp: Any) -> str | None:
    """Why ``mlp`` cannot be fused over, in one sentence; None where it can."""
    if parts.kind(mlp) not in parts.MLPS:
        return f"MLP of type {type(mlp).__name__}"
    children = [*linears(mlp), mlp.act, mlp.drop1, mlp.norm, mlp.drop2]
    if why := next(filter(None, map(parts.why_not_linear, linears(mlp))), None):
        return why
    if parts.kind(mlp.act) not in parts.ACTIVATIONS:
        return f"activation of type {type(mlp.act).__name__}"
    if not parts.absent(mlp.norm):
        return "a norm inside the MLP"
    if parts.active_dropout(mlp.drop1, mlp.drop2):
        return "dropout inside the MLP"
    return why_watched(*children)


def mlp_options(mlp: Any) -> dict[str, Any]:
    """The arguments of ``lora_mlp`` that ``mlp`` stands for."""
    *firsts, fc2 = (parts.operands(linear) for linear in linears(mlp))
    fc1: Adapted | tuple[Adapted, ...] = firsts[0] if len(firsts) == 1 else tuple(firsts)
    gated = None
    if parts.kind(mlp) == PACKED:
        gated = "last" if mlp.gate_last else "first"
    act = parts.ACTIVATIONS[parts.kind(mlp.act)]
    if act == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh":
        act = "gelu_tanh"
    return {"fc1": fc1, "fc2": fc2, "activation": act, "gated": gated}


# FusedLoRABlock: a transformer block in two halves that keep what the frozen block keeps, and h.
#
#     x = x + drop_path1(ls1(attn(norm1(x))))
#     x = x + drop_path2(ls2(mlp(norm2(x))))
#
# Each half is fused where it can be, at every call anew, and left to its modules where it cannot.


class FusedLoRABlock(FusedModule):
    """A pre-norm block (timm's, with or without LayerScale, drop path and qk-norm)."""

    known = parts.BLOCKS
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    ls1: Any
    ls2: Any
    drop_path1: Any
    drop_path2: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the plain class has it."""
        if isinstance(x, Proxy):  # others of its arguments may be proxies too
            return super().forward(x, *args, **kwargs)
        if args or kwargs or torch.compiler.is_compiling() or transformed():
            return self._as_written(x, *args, **kwargs)
        attention, mlp = self.__dict__.get("_halves") or self._new_halves()
        return mlp(self, attention(self, x))  # type: ignore[no-any-return]

    def _new_halves(self) -> tuple[Half, Half]:
        return self.__dict__.setdefault("_halves", (AttentionHalf(), MlpHalf()))

    def _as_written(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the plain class has it, the attention's mask where there is one."""
        masked: dict[str, Any] = {}  # older timm has no is_causal: none is passed unasked
        if attn_mask is not None:
            masked["attn_mask"] = attn_mask
        if is_causal:
            masked["is_causal"] = True
        plain = torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled()
        if plain or parts.kind(self.attn) not in parts.ATTENTIONS:
            return super().forward(x, **masked)
        if parts.why_not_input(x, self.attn.qkv.weight):
            return super().forward(x, **masked)
        _, mlp = self.__dict__.get("_halves") or self._new_halves()
        if why_not_attention_half(self):
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **masked)))
        else:
            x = attention_by_parts(self, x, masked)
        return mlp(self, x)  # type: ignore[no-any-return]


class AttentionHalf(Half):
    """x + drop_path1(ls1(attn(norm1(x))))."""

    __slots__ = ()

    def watched(self, block: Any) -> Sequence[nn.Module]:
        """Norm, attention and all below it, LayerScale and drop path."""
        return [block.norm1, *block.attn.modules(), block.ls1, block.drop_path1]

    def why_not(self, block: Any) -> str | None:
        return why_not_attention_half(block)

    def gather(self, block: Any, x: Tensor) -> tuple[tuple[Any, ...], list[Any], Any, bool]:
        own = block.__dict__
        around = own["_modules"]
        attn = around["attn"].__dict__
        inside = attn["_modules"]
        qkv, proj, norm = inside["qkv"], inside["proj"], around["norm1"].__dict__
        scale, drop = around["ls1"].__dict__, around["drop_path1"]
        drops = drop.__dict__.get("drop_prob") if drop.training else None
        state = (
            *(own["_recompute"], norm["eps"], norm["normalized_shape"], attn["num_heads"]),
            *(attn["fused_attn"], attn["training"], inside["attn_drop"].__dict__["p"]),
            *(inside["proj_drop"].__dict__["p"], inside["proj_drop"].__dict__["training"], drops),
            *(qkv._state(), proj._state(), attention_settings()),
        )
        vectors = norm["_parameters"]
        gamma = scale["_parameters"].get("gamma")
        before = [x, None, gamma, None, vectors["weight"], vectors["bias"]]
        (first, held), (last, held_too) = qkv._gather(), proj._gather()
        return state, before + first + last, drop if drops else None, held and held_too

    def choose(self, block: Any, x: Tensor) -> Any:
        """One chain where torch's attention takes part in it."""
        attn, width = block.attn, block.attn.qkv.out_features
        if why_qkv_is_kept(attn) or x.dim() != 3:
            return None
        if block.recompute != "gemm" and kernel_for(x, attn.num_heads, width) is None:
            return None  # torch's own then keeps what it needs
        norm, gamma = parts.norm_of(block.norm1), parts.gamma_of(block.ls1)
        linears = parts.operands(attn.qkv), parts.operands(attn.proj)
        return Chain(
            attention_spec(x, norm, *linears, attn.num_heads, gamma, None, block.recompute)
        )

    def by_parts(self, block: Any, x: Tensor) -> Tensor:
        """The attention between two chains."""
        return attention_by_parts(block, x, {})

    def by_modules(self, block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))  # type: ignore[no-any-return]


class MlpHalf(Half):
    """x + drop_path2(ls2(mlp(norm2(x))))."""

    __slots__ = ()

    def watched(self, block: Any) -> Sequence[nn.Module]:
        """Norm, MLP and all below it, LayerScale and drop path."""
        return [block.norm2, *block.mlp.modules(), block.ls2, block.drop_path2]

    def why_not(self, block: Any) -> str | None:
        return why_not_mlp_half(block)

    def gather(self, block: Any, x: Tensor) -> tuple[tuple[Any, ...], list[Any], Any, bool]:
        own = block.__dict__
        around = own["_modules"]
        norm, scale, drop = around["norm2"].__dict__, around["ls2"].__dict__, around["drop_path2"]
        drops = drop.__dict__.get("drop_prob") if drop.training else None
        state, operands, held = mlp_state(around["mlp"])
        state = (own["_recompute"], norm["eps"], norm["normalized_shape"], drops, *state)
        vectors = norm["_parameters"]
        gamma = scale["_parameters"].get("gamma")
        before = [x, None, gamma, None, vectors["weight"], vectors["bias"]]
        return state, before + operands, drop if drops else None, held

    def choose(self, block: Any, x: Tensor) -> Any:
        """One chain."""
        norm, gamma = parts.norm_of(block.norm2), parts.gamma_of(block.ls2)
        options = {"around": True, "gamma": gamma, "mask": None, "recompute": block.recompute}
        return Chain(mlp_spec(x, **mlp_options(block.mlp), norm=norm, **options))

    def by_modules(self, block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def attention_by_parts(block: Any, x: Tensor, masked: dict[str, Any]) -> Tensor:
    """The half with torch's own attention between two chains."""
    attn, gamma = block.attn, parts.gamma_of(block.ls1)
    qkv, proj = parts.operands(attn.qkv), parts.operands(attn.proj)
    packed = layer_norm_lora_linear(x, parts.norm_of(block.norm1), qkv, block.recompute)
    out = attend(attn, packed, masked)
    mask = parts.mask_of(block.drop_path1, x, gamma)
    return lora_residual(out, proj, x, gamma, mask, block.recompute == "gemm")


def attend(attn: Any, qkv: Tensor, masked: dict[str, Any]) -> Tensor:
    """out [B, T, H D] of qkv [B, T, 3 H D]; torch's attention keeps what it needs by itself."""
    q, k, v = Split.apply(qkv, attn.num_heads)
    dropout = attn.attn_drop.p if attn.training else 0.0
    q, k = _head_norm(attn.q_norm, q), _head_norm(attn.k_norm, k)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **masked)
    return out.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _head_norm(norm: Any, q: Tensor) -> Tensor:
    """``norm(q)``, laid out token by token as q is: so is then the attention's output, of which the
    projection would otherwise keep a copy."""
    if parts.absent(norm):
        return q
    return norm(q.transpose(1, 2)).transpose(1, 2) if parts.kind(norm) in parts.NORMS else norm(q)


def why_not_block(block: Any) -> str | None:
    """Why neither half of ``block`` can be fused over; None where one can."""
    if parts.kind(block) not in parts.BLOCKS:
        return f"{type(block).__name__} is no block whose forward is known"
    reasons = why_not_halves(block)
    return "; ".join(reasons) if len(reasons) == 2 else None


def why_not_halves(block: Any) -> list[str]:
    """A sentence for each half of a known block that goes through its modules."""
    halves = {"attention": why_not_attention_half(block), "MLP": why_not_mlp_half(block)}
    return [f"{half}: {reason}" for half, reason in halves.items() if reason]


def why_not_attention_half(block: Any) -> str | None:
    """Why the half with the attention goes through its modules."""
    attn = block.attn
    if parts.kind(attn) not in parts.ATTENTIONS:
        return f"attention of type {type(attn).__name__}"
    for linear in (attn.qkv, attn.proj):
        if why := parts.why_not_linear(linear):
            return why
    if why := _why_not_around(block, "1") or _why_not_inside(attn):
        return why
    return why_watched(*attn.modules())


def why_not_mlp_half(block: Any) -> str | None:
    """Why the half with the MLP goes through its modules."""
    return why_not_mlp(block.mlp) or _why_not_around(block, "2")


def why_qkv_is_kept(attn: Any) -> str | None:
    """Why q, k and v are kept even where the GEMMs are recomputed."""
    if not (parts.absent(attn.q_norm) and parts.absent(attn.k_norm)):
        return "qk-norm"
    return "attention dropout" if parts.active_dropout(attn.attn_drop) else None


def _why_not_around(block: Any, half: str) -> str | None:
    norm, scale, drop = (getattr(block, name + half) for name in ("norm", "ls", "drop_path"))
    inner = block.attn if half == "1" else block.mlp
    if why := parts.why_not_norm(norm) or parts.why_not_branch(scale, drop):
        return why
    return why_watched(norm, scale, drop, inner)


def _why_not_inside(attn: Any) -> str | None:
    if not attn.fused_attn:
        return "attention without scaled_dot_product_attention"
    if not all(parts.absent(getattr(attn, name, None)) for name in ("norm", "gate")):
        return "a norm or a gate on the attention's output"
    if type(attn.attn_drop) is not nn.Dropout:
        return f"attention dropout of type {type(attn.attn_drop).__name__}"
    return "dropout behind the attention" if parts.active_dropout(attn.proj_drop) else None
