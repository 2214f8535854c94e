"""PEFT, the library most people use: one adapter on a fused qkv, fp32 adapters by default."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora.bench.adapters import projections
from fused_lora.bench.contenders.frozen import let_gradient_in
from fused_lora.bench.depth import blocks
from fused_lora.bench.registry import Contender, register


@register
class Peft(Contender):
    """``peft.get_peft_model`` as its documentation has it, with a scale of 1."""

    name, title, form = "peft", "PEFT", "joint"
    widen = True  # autocast_adapter_dtype: 16-bit adapters are made fp32

    def why_not(self, dtype: str) -> str | None:
        """PEFT is an optional package."""
        return super().why_not(dtype) if find_spec("peft") else "peft is not installed"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap ``model``; targets are full names, so patch_embed.proj is never among them."""
        import peft

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(projections(model)),
        )
        return peft.get_peft_model(model, config, autocast_adapter_dtype=self.widen)


@register
class PeftBf16(Peft):
    """PEFT with adapters kept in bf16; the base is bf16 too unless autocast is on."""

    name, title = "peft_bf16", "PEFT, bf16 adapters"
    widen, dtypes = False, ("bf16", "amp")

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap ``model``, then store the adapters in bf16."""
        wrapped = super().install(model, rank)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        return wrapped


@register
class PeftCheckpoint(Peft):
    """PEFT with every block inside ``torch.utils.checkpoint``, which keeps the block's input."""

    name, title = "peft_checkpoint", "PEFT, checkpointed"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap ``model``, then the forward of its blocks; the embedding lets the gradient in."""
        wrapped = super().install(model, rank)
        if isinstance(embed := getattr(model, "patch_embed", None), nn.Module):
            embed.register_forward_hook(let_gradient_in)
        for block in blocks(wrapped):
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
        return wrapped
