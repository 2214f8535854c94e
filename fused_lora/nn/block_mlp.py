"""FusedLoRAMlp: an adapted MLP, plain or gated, that keeps its input and u alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fused_lora.nn import block_parts as parts
from fused_lora.nn.block_swap import Fused, hooked
from fused_lora.ops.lora_mlp import lora_mlp
from fused_lora.ops.operand import Adapted

PACKED = "timm.layers.mlp.GluMlp"
APART = "timm.layers.mlp.SwiGLU"


class FusedLoRAMlp(Fused):
    """An MLP (timm's Mlp, GluMlp or SwiGLU) whose activations are made again in backward."""

    known = parts.MLPS
    fc2: Any

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        if parts.why_not_input(x, self.fc2.weight) or why_not_mlp(self):
            return super().forward(x)
        return lora_mlp(x, **mlp_options(self), recompute=self.recompute)


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
    return "hooks on the MLP's children" if hooked(*children) else None


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
