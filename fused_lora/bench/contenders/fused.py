"""This library: the two ways it adapts a fused qkv projection."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from fused_lora.bench.adapters import projections, thirds
from fused_lora.bench.registry import Contender, register


@register
class Fused(Contender):
    """``fused_lora.patch`` on a model; on a bare layer set, its modules one by one."""

    name, title = "fused", "fused_lora"
    ours = True
    level: str = "linear"
    recompute: str | None = None  # the choices of ``patch`` that tell these apart

    def why_not(self, dtype: str) -> str | None:
        """The patcher is a room of its own."""
        found = find_spec("fused_lora.patching")
        return None if found else "this build of fused_lora has no patching room"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Adapt every projection; adapters are fp32 by default."""
        if hasattr(model, "blocks"):
            import fused_lora

            fused_lora.patch(
                model,
                rank,
                qkv=self.form,
                scale=1.0,
                allow_large_rank=True,
                level=self.level,
                recompute=self.recompute,
            )
        else:
            self._adopt(model, rank)
        return model

    def _adopt(self, model: nn.Module, rank: int) -> None:
        from fused_lora.nn import FusedLoRAGroupedLinear, FusedLoRALinear

        for name, linear in projections(model).items():
            if name.endswith("qkv") and self.form == "separate":
                FusedLoRAGroupedLinear.adopt(linear, spans=thirds(linear), rank=rank, scale=1.0)
            else:
                FusedLoRALinear.adopt(linear, rank=rank, scale=1.0)


@register
class FusedJoint(Fused):
    """The same with one adapter on a fused qkv, as PEFT has it."""

    name, title, form = "fused_joint", "fused_lora (joint)", "joint"


@register
class FusedBlock(Fused):
    """Whole blocks, which make norms and activations again in backward."""

    name, title = "fused_block", "fused_lora (block)"
    level, recompute = "block", "elementwise"


@register
class FusedBlockJoint(Fused):
    """The same with one adapter on a fused qkv."""

    name, title, form = "fused_block_joint", "fused_lora (block, joint)", "joint"
    level, recompute = "block", "elementwise"


@register
class FusedBlockNone(Fused):
    """Whole blocks that keep everything."""

    name, title = "fused_block_none", "fused_lora (block, keeps all)"
    level, recompute = "block", "none"


@register
class FusedBlockGemm(Fused):
    """Whole blocks, which make qkv and the output of fc1 again as well."""

    name, title = "fused_block_gemm", "fused_lora (block, GEMMs again)"
    level, recompute = "block", "gemm"
