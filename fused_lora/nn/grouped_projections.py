"""Projections of one x (q, k, v): the first one called computes all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.block_modules import FusedModule, fused_class, operands
from fused_lora.nn.grouped_call import GroupedCall, open_calls
from fused_lora.nn.stand_in import HOOKS
from fused_lora.nn.weight_adapter import FusedLoRAWeight
from fused_lora.ops.lora_linear import autocasts
from fused_lora.ops.lora_linear_many import lora_linear_many
from fused_lora.programs.run import transformed

#     q = q_proj(x); k = k_proj(x); v = v_proj(x)        one lora_linear_many, three results
#
# The module's own forward stays as it is. While it runs, a ``GroupedCall`` is open in its thread: a
# linear of the group that is called with the same tensor as the first one, unchanged since, returns
# the result computed then. In every other case it computes by itself. Results that nobody asked for
# are dropped when the forward ends.


PLAIN = (Tensor, nn.Parameter)  # no subclass: nothing sharded, quantised or recorded


class FusedLoRAGroupedProjections(FusedModule):
    """A mixin before the module's own class, which keeps its forward; opens a ``GroupedCall``."""

    known = frozenset()  # of any class: its forward is its own

    @classmethod
    def gather(cls, module: nn.Module, groups: Sequence[Sequence[str]]) -> nn.Module:
        """Let the adapted linears at these paths below ``module`` share; the same object."""
        if isinstance(module, FusedModule):
            raise TypeError(f"{type(module).__name__} is fused already")
        module.__class__ = fused_class(cls, type(module))  # type: ignore[arg-type]
        module.__dict__["_grouped_paths"] = tuple(map(tuple, groups))
        _mark(module, groups, grouped=True)
        return module

    def release(self) -> nn.Module:
        """Become what it was."""
        _mark(self, self.__dict__.pop("_grouped_paths"), grouped=False)
        return super().release()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        if torch.compiler.is_compiling() or transformed():
            return super().forward(*args, **kwargs)
        groups = [
            [_below(self, path) for path in paths] for paths in self.__dict__["_grouped_paths"]
        ]
        calls = open_calls.calls
        calls.append(GroupedCall([group for group in groups if None not in group], compute_group))  # type: ignore[misc]
        try:
            return super().forward(*args, **kwargs)
        finally:
            calls.pop()


def compute_group(group: Sequence[AdaptedLinear], x: Tensor) -> Sequence[Tensor] | None:
    """The results of all of them on ``x``; None where each is to compute its own."""
    if type(x) not in PLAIN or x.is_inference() or x.dim() == 0 or transformed():
        return None
    if torch_module._has_any_global_hook() or not all(_fits(each, x) for each in group):
        return None
    return lora_linear_many(x, [operands(each) for each in group])


def why_not_grouped(linear: nn.Module) -> str | None:
    """One sentence why this linear never shares; None where it may."""
    if not isinstance(linear, AdaptedLinear) or isinstance(linear, FusedLoRAWeight):
        return f"is a {type(linear).__name__}"
    if linear.additive:
        return "computes its base in a way of its own"
    if linear.config.dora:
        return "has dora, which scales y"
    if linear.config.base_dtype:
        return f"has its base in {linear.config.base_dtype}"
    return "has dropout, a mask of its own" if linear.config.dropout else None


def _fits(each: AdaptedLinear, x: Tensor) -> bool:
    """Whether it is at present nothing but its equation, on what ``x`` is."""
    if why_not_grouped(each) or _obstructed(each) or each.merged or not each.adapter_enabled:
        return False
    w = each.base
    if type(w) not in PLAIN or w.device != x.device or w.shape[1:] != x.shape[-1:]:
        return False
    return autocasts(x) or w.dtype is x.dtype


def _obstructed(module: nn.Module) -> bool:
    """Whether calling it does something before its forward; hooks on its result may stay."""
    own = module.__dict__
    return "forward" in own or any(own[name] for name in HOOKS if name != "_forward_hooks")


def _below(module: nn.Module | None, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def _mark(module: nn.Module, groups: Sequence[Sequence[str]], grouped: bool) -> None:
    for path in (path for paths in groups for path in paths):
        if (linear := _below(module, path)) is not None:
            linear.__dict__.pop("_grouped", None)
            if grouped:
                linear.__dict__["_grouped"] = True
