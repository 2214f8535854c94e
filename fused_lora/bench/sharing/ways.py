"""The same joint step three ways: nothing shared, shared by autograd's slices, shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch as substituted

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora
from fused_lora.bench.shapes import Shape
from fused_lora.distill.slad_loss import Logits, slad_losses
from fused_lora.nn import AdaptedLinear, borrow

STUDENTS = {
    "vit_small_patch16_224": "vit_tiny_patch16_224",
    "vit_base_patch16_224": "vit_small_patch16_224",
    "vit_large_patch16_224": "vit_base_patch16_224",
}


@contextmanager
def slices() -> Iterator[None]:
    """Inside, parts of parameters are autograd's own slices."""
    with substituted.object(borrow, "lends", lambda owner: False):
        yield


@dataclass(frozen=True)
class Way:
    """One way: its models, and what they run under."""

    models: nn.ModuleList  # teacher, student
    inside: Callable[[], AbstractContextManager] = nullcontext

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Both forwards, SLAD's loss, one backward; gradients are dropped first."""
        self.models.zero_grad(set_to_none=True)
        with self.inside():
            teacher, student = (model(images).float() for model in self.models)
            slad_losses(Logits(student, teacher), labels).total.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Of the teacher's adapters."""
        named = self.models[0].named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


def ways(shape: Shape, rank: int, device: str, dtype: torch.dtype) -> dict[str, Way]:
    """By name; all from the same weights."""
    from fused_lora.bench.suites.train_step import build  # registering suites imports this file

    names = shape.name, STUDENTS[shape.name]
    pair = nn.ModuleList(build(name, device, dtype, seed) for seed, name in enumerate(names))
    fused_lora.patch(pair[0], rank, targets=["q", "k", "v"], seed=0)
    _wake(pair[0])
    fused_lora.share_adapters(*pair)
    apart = copy.deepcopy(pair)
    fused_lora.unshare_adapters(apart[1])
    _lend_no_more(apart[0])
    return {"apart": Way(apart), "slices": Way(pair, slices), "shared": Way(pair)}


def _wake(model: nn.Module) -> None:
    for module in model.modules():
        for _, b in module.adapters() if isinstance(module, AdaptedLinear) else ():
            nn.init.normal_(b, std=0.02)


def _lend_no_more(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module._lent = False


class Launches(TorchDispatchMode):
    """Counts the operations that write memory, and the bytes they write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run ``func``; count it unless all it made are views."""
        held = {t.untyped_storage().data_ptr() for t in _tensors((*args, *(kwargs or {}).values()))}
        out = func(*args, **(kwargs or {}))
        mutates = func._schema.is_mutable
        written = [
            t for t in _tensors([out]) if mutates or t.untyped_storage().data_ptr() not in held
        ]
        self.count += bool(written)
        self.nbytes += sum(t.nbytes for t in written)
        return out


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
