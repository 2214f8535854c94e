"""What a trial forward may not leave behind: the model before and after it, compared and restored.

Nothing of the user's runs in a trial: hooks, global ones too, are taken off, and accelerate's
forwards give way to those of the classes. torch's own hooks that make a weight stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fused_lora.nn.stand_in import of_torch
from fused_lora.patching.errors import PatchError

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS)
GLOBAL = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the class, attributes, tensors and hooks of before.

    Raises:
        PatchError: a parameter or buffer of the model's own was written.
    """
    modules = [(name, _State(module)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for _, state in modules:
            state.restore()
    for name, state in modules:
        if written := state.written():
            raise PatchError(
                f"the trial forward wrote {name and name + '.'}{written} in place: the model "
                "changes its own weights in a forward, past the stand-ins it was given"
            )


class _State:
    """One module: its class, attributes and tables, and how often its tensors were written."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.attributes = dict(module.__dict__)
        tables = ((name, module.__dict__.get(name)) for name in TABLES)
        self.tables = {name: table.copy() for name, table in tables if table is not None}
        self.versions = {name: _version(tensor) for name, tensor in self._tensors()}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        both = self.tables["_parameters"] | self.tables["_buffers"]
        return [(name, tensor) for name, tensor in both.items() if tensor is not None]

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        own = self.module.__dict__
        own.clear()
        own.update(self.attributes)
        for name, table in self.tables.items():
            own[name].clear()
            own[name].update(table)

    def written(self) -> str:
        """The first tensor that was written; empty where none was."""
        changed = (n for n, tensor in self._tensors() if _version(tensor) != self.versions[n])
        return next(changed, "")


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within, no hook of the user's is called; the modules themselves are put right by others."""
    everywhere = [getattr(torch_module, name) for name in GLOBAL]
    before = [table.copy() for table in everywhere]
    for table in everywhere:
        table.clear()
    for module in model.modules():
        for name in HOOKS:
            table = module.__dict__[name]
            for key in [key for key, hook in table.items() if not of_torch(hook)]:
                del table[key]
        if "_hf_hook" in module.__dict__:
            module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        for table, then in zip(everywhere, before, strict=True):
            table.update(then)


def hooked(model: nn.Module) -> bool:
    """Whether the user, or the model itself, hooked any module."""
    tables: Iterator[Any] = (m.__dict__[name] for m in model.modules() for name in HOOKS)
    return any(not of_torch(hook) for table in tables for hook in table.values())


def one_image_is_enough(model: nn.Module) -> None:
    """Batch norms evaluate, which a single vector would not let train; put right by others."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
