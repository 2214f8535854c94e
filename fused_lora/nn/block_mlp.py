"""FusedLoRAMlp: an adapted MLP, plain or gated, that keeps its input and u alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_lora.nn import block_parts as parts
from fused_lora.nn.block_swap import Fused
from fused_lora.nn.half import Half
from fused_lora.nn.watch import why_watched
from fused_lora.ops.chain.chain import Chain
from fused_lora.ops.lora_mlp import asked, lora_mlp
from fused_lora.ops.operand import Adapted, compute_dtype
from fused_lora.programs.run import transformed

PACKED = "timm.layers.mlp.GluMlp"
APART = "timm.layers.mlp.SwiGLU"


class FusedLoRAMlp(Fused):
    """An MLP (timm's Mlp, GluMlp or SwiGLU) whose activations are made again in backward."""

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
        """See ``Half``."""
        return why_not_mlp(mlp)

    def gather(self, mlp: Any, x: Tensor) -> tuple[tuple[Any, ...], list[Any], Any, bool]:
        """See ``Half``."""
        state, operands, held = mlp_state(mlp)
        return (mlp.__dict__["_recompute"], *state), [x, None, None, None, *operands], None, held

    def choose(self, mlp: Any, x: Tensor) -> Any:
        """One chain, where x is in the dtype that it computes in."""
        if x.dtype is not compute_dtype(x):
            return None
        options: dict[str, Any] = {"norm": None, "around": False, "gamma": None, "mask": None}
        return Chain(asked(x, **mlp_options(mlp), **options, recompute=mlp.recompute))

    def by_parts(self, mlp: Any, x: Tensor) -> Tensor:
        """See ``Half``."""
        return lora_mlp(x, **mlp_options(mlp), recompute=mlp.recompute)

    def by_modules(self, mlp: Any, x: Tensor) -> Tensor:
        """See ``Half``."""
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
