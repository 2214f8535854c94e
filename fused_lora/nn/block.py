"""FusedLoRABlock: a transformer block in two halves that keep what the frozen block keeps, and h.

    x = x + drop_path1(ls1(attn(norm1(x))))
    x = x + drop_path2(ls2(mlp(norm2(x))))

Each half is fused where it can be, at every call anew, and left to its modules where it cannot.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.nn import block_parts as parts
from fused_lora.nn.block_mlp import mlp_options, why_not_mlp
from fused_lora.nn.block_swap import Fused, hooked
from fused_lora.ops.chain.attention import Split
from fused_lora.ops.layer_norm_lora_linear import layer_norm_lora_linear
from fused_lora.ops.lora_attention import lora_attention
from fused_lora.ops.lora_mlp import lora_mlp
from fused_lora.ops.lora_residual import lora_residual


class FusedLoRABlock(Fused):
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
        known = parts.kind(self.attn) in parts.ATTENTIONS
        if parts.why_not_input(x, self.attn.qkv.weight if known else self.mlp.fc2.weight):
            return super().forward(x, *args, **kwargs)
        return self._mlp_half(self._attention_half(x, *args, **kwargs))

    def _attention_half(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x + drop_path1(ls1(attn(norm1(x))))."""
        masked: dict[str, Any] = {}  # older timm has no is_causal: none is passed unasked
        if attn_mask is not None:
            masked["attn_mask"] = attn_mask
        if is_causal:
            masked["is_causal"] = True
        attn, scale, drop = self.attn, self.ls1, self.drop_path1
        if why_not_attention_half(self):
            return x + drop(scale(attn(self.norm1(x), **masked)))
        norm, gamma = parts.norm_of(self.norm1), parts.gamma_of(scale)
        qkv, proj = parts.operands(attn.qkv), parts.operands(attn.proj)
        lean = self.recompute == "gemm"
        if lean and not masked and not why_not_lean(attn):
            mask = parts.mask_of(drop, x, gamma)
            return lora_attention(x, norm, qkv, proj, attn.num_heads, gamma, mask)
        packed = layer_norm_lora_linear(x, norm, qkv, self.recompute)
        out = attend(attn, packed, masked)
        mask = parts.mask_of(drop, x, gamma)
        return lora_residual(out, proj, x, gamma, mask, lean)

    def _mlp_half(self, x: Tensor) -> Tensor:
        """x + drop_path2(ls2(mlp(norm2(x))))."""
        mlp, scale, drop = self.mlp, self.ls2, self.drop_path2
        if why_not_mlp_half(self):
            return x + drop(scale(mlp(self.norm2(x))))
        norm, gamma = parts.norm_of(self.norm2), parts.gamma_of(scale)
        mask = parts.mask_of(drop, x, gamma)
        around: dict[str, Any] = {"norm": norm, "around": True, "gamma": gamma, "mask": mask}
        return lora_mlp(x, **mlp_options(mlp), **around, recompute=self.recompute)


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
    inner = (attn.qkv, attn.proj, attn.attn_drop, attn.proj_drop)
    return "hooks on the attention's children" if hooked(*inner) else None


def why_not_mlp_half(block: Any) -> str | None:
    """Why the half with the MLP goes through its modules."""
    return why_not_mlp(block.mlp) or _why_not_around(block, "2")


def why_not_lean(attn: Any) -> str | None:
    """Why q, k and v are kept even where the GEMMs are made again."""
    if not (parts.absent(attn.q_norm) and parts.absent(attn.k_norm)):
        return "qk-norm"
    return "attention dropout" if parts.active_dropout(attn.attn_drop) else None


def _why_not_around(block: Any, half: str) -> str | None:
    norm, scale, drop = (getattr(block, name + half) for name in ("norm", "ls", "drop_path"))
    inner = block.attn if half == "1" else block.mlp
    if why := parts.why_not_norm(norm) or parts.why_not_branch(scale, drop):
        return why
    own = hooked(norm, scale, drop, inner)
    return "hooks on the block's children" if own else None


def _why_not_inside(attn: Any) -> str | None:
    if not attn.fused_attn:
        return "attention without scaled_dot_product_attention"
    if not all(parts.absent(getattr(attn, name, None)) for name in ("norm", "gate")):
        return "a norm or a gate on the attention's output"
    if type(attn.attn_drop) is not nn.Dropout:
        return f"attention dropout of type {type(attn.attn_drop).__name__}"
    return "dropout behind the attention" if parts.active_dropout(attn.proj_drop) else None
