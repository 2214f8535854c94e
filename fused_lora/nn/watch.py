"""Watching modules that a program stands in for: whether each is still what it was.

A program computes what the forwards of several modules would. Whatever makes calling one of them do
more or other than its class says (hooks, a forward of its own, another class or another forward of
its class, a child put in its place) is seen here, at every call, in a few comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules import module as torch_module

from fused_lora.nn.stand_in import device_hook, replaced_forward

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)


class Watch:
    """Some modules as they are now, all of them without hooks."""

    __slots__ = ("children", "forwards", "hooks", "kinds")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.kinds = [(module, module.__dict__, type(module)) for module in modules]
        self.forwards = [(kind, kind.forward) for kind in {type(module) for module in modules}]
        self.hooks = [*(m.__dict__[name] for m in modules for name in HOOKS), *GLOBAL_HOOKS]
        below = [module._modules for module in modules if module._modules]
        self.children = [(own, [*own.values()]) for own in below]

    def intact(self) -> bool:
        """Whether nothing has changed."""
        if any(self.hooks):
            return False
        for module, own, kind in self.kinds:
            if module.__class__ is not kind or "forward" in own:
                return False
        for kind, forward in self.forwards:
            if kind.forward is not forward:
                return False
        for own, before in self.children:  # noqa: SIM110, a call less
            if [*own.values()] != before:
                return False
        return True


def why_watched(*modules: nn.Module) -> str | None:
    """Why calling one of these does more than its class says; None where none does."""
    for module in modules:
        own, kind = module.__dict__, type(module)
        if any(own[name] for name in HOOKS):
            return f"hooks on a {kind.__name__}"
        if "forward" in own:
            return device_hook(module) or f"a {kind.__name__} has a forward of its own"
        if why := replaced_forward(kind):
            return why
    return "hooks on all modules" if any(GLOBAL_HOOKS) else None
