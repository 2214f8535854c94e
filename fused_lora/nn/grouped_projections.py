"""Linears of one module that are given the same x: the first one called computes for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.block_modules import Fused, fused_class, operands
from fused_lora.nn.scope import Scope, running
from fused_lora.nn.weight_adapter import FusedLoRARead
from fused_lora.ops.lora_linear import autocasts
from fused_lora.ops.lora_linear_many import lora_linear_many
from fused_lora.programs.run import transformed

# Linears of one module that are given the same x: the first one called computes for all.
#
#     q = q_proj(x); k = k_proj(x); v = v_proj(x)        one lora_linear_many, three results
#
# The module's own forward stays as it is. Around it a scope is open, of this call and this thread;
# in it, a sibling that is called with the very tensor that the first one was given, unchanged
# since, takes its own result. Whatever is otherwise, it computes by itself. What nobody took goes
# with the scope, at the latest when the forward ends.


PLAIN = (Tensor, nn.Parameter)  # no subclass: nothing sharded, quantised or recorded


class FusedLoRASiblings(Fused):
    """The half that opens the scope; the other half is the module's own class and forward."""

    known = frozenset()  # of any class: its forward is its own

    @classmethod
    def gather(cls, module: nn.Module, groups: Sequence[Sequence[str]]) -> nn.Module:
        """Let the adapted linears at these paths below ``module`` share; the same object."""
        if isinstance(module, Fused):
            raise TypeError(f"{type(module).__name__} is fused already")
        module.__class__ = fused_class(cls, type(module))  # type: ignore[arg-type]
        module.__dict__["_siblings"] = tuple(map(tuple, groups))
        _mark(module, groups, sibling=True)
        return module

    def release(self) -> nn.Module:
        """Become what it was."""
        _mark(self, self.__dict__.pop("_siblings"), sibling=False)
        return super().release()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        if torch.compiler.is_compiling() or transformed():
            return super().forward(*args, **kwargs)
        groups = [[_below(self, path) for path in paths] for paths in self.__dict__["_siblings"]]
        scopes = running.scopes
        scopes.append(Scope([group for group in groups if None not in group], served))  # type: ignore[misc]
        try:
            return super().forward(*args, **kwargs)
        finally:
            scopes.pop()


def served(group: Sequence[AdaptedLinear], x: Tensor) -> Sequence[Tensor] | None:
    """The results of all of them on ``x``; None where each is to compute its own."""
    if type(x) not in PLAIN or x.is_inference() or x.dim() == 0 or transformed():
        return None
    if torch_module._has_any_global_hook() or not all(_fits(each, x) for each in group):
        return None
    return lora_linear_many(x, [operands(each) for each in group])


def why_alone(linear: nn.Module) -> str | None:
    """One sentence why this linear never shares; None where it may."""
    if not isinstance(linear, AdaptedLinear) or isinstance(linear, FusedLoRARead):
        return f"is a {type(linear).__name__}"
    if linear.around:
        return "computes its base in a way of its own"
    if linear.config.dora:
        return "has dora, which scales y"
    if linear.config.base_dtype:
        return f"has its base in {linear.config.base_dtype}"
    return "has dropout, a mask of its own" if linear.config.dropout else None


def _fits(each: AdaptedLinear, x: Tensor) -> bool:
    """Whether it is at present nothing but its equation, on what ``x`` is."""
    if why_alone(each) or _obstructed(each) or each.merged or not each.adapter_enabled:
        return False
    w = each.base
    if type(w) not in PLAIN or w.device != x.device or w.shape[1:] != x.shape[-1:]:
        return False
    return autocasts(x) or w.dtype is x.dtype


def _obstructed(module: nn.Module) -> bool:
    """Whether calling it does something before its forward; hooks on its result may stay."""
    own = module.__dict__
    hooks = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[name] for name in hooks)


def _below(module: nn.Module | None, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def _mark(module: nn.Module, groups: Sequence[Sequence[str]], sibling: bool) -> None:
    for path in (path for paths in groups for path in paths):
        if (linear := _below(module, path)) is not None:
            linear.__dict__.pop("_sibling", None)
            if sibling:
                linear.__dict__["_sibling"] = True
