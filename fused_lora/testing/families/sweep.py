"""One family: patched, and compared with naive LoRA; or refused, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_lora.nn import FusedLoRAChild, FusedLoRARead
from fused_lora.patching.errors import PatchError
from fused_lora.patching.example import example_for
from fused_lora.patching.patch import adapted, patch
from fused_lora.testing.families import of_others, of_timm, of_torchvision, of_transformers
from fused_lora.testing.families.truth import Adapter, install
from fused_lora.testing.yardstick import Verdict, judge

LIBRARIES: dict[str, ModuleType] = {
    "timm": of_timm,
    "transformers": of_transformers,
    "torchvision": of_torchvision,
    "others": of_others,
}
RANK = 2


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    library: str
    family: str
    model: str  # class name
    qkv: str  # the mode it was served in
    roles: tuple[str, ...] = ()
    linears: int = 0
    read: int = 0  # of them, weights that are read without a call
    refusal: str = ""
    verdicts: tuple[Verdict, ...] = ()  # of the output, then of every adapter gradient


def families() -> Iterator[tuple[str, str]]:
    """Every (library, family)."""
    for library, home in LIBRARIES.items():
        for family in home.MODELS:
            yield library, family


def outcome(library: str, family: str) -> Outcome:
    """Served with separate adapters on q, k and v; else with a joint one; else refused."""
    home = LIBRARIES[library]
    torch.manual_seed(0)
    model, example = home.build(family), home.example(family)
    try:
        return _served(library, family, model, example, "separate")
    except PatchError as error:
        if "joint" not in str(error):
            return Outcome(library, family, type(model).__name__, "", refusal=str(error))
    return _served(library, family, model, example, "joint")


def _served(library: str, family: str, model: nn.Module, example: Any, qkv: str) -> Outcome:
    patched = copy.deepcopy(model)
    report = patch(patched, RANK, example_input=example, qkv=qkv, seed=0, scale=0.5)
    _wake(patched)
    roles = sorted({role for row in report.rows for role in row.role.split("|")})
    return Outcome(
        library,
        family,
        type(model).__name__,
        qkv,
        tuple(roles),
        len(report.rows),
        sum(isinstance(module, FusedLoRARead) for _, module in adapted(patched)),
        verdicts=tuple(_verdicts(model, patched, _inputs(model, example))),
    )


def _wake(model: nn.Module) -> None:
    for _, module in adapted(model):
        for _, b in module.adapters():
            nn.init.normal_(b, std=0.1)


def _inputs(model: nn.Module, example: Any) -> Any:
    """Random values of the example's shape; a batch of one, as some inputs are no batch."""
    return torch.randn(example_for(model).shape) if example is None else example


def _verdicts(model: nn.Module, patched: nn.Module, inputs: Any) -> Iterator[Verdict]:
    adapters = list(_adapters(patched))
    leaves = [half for each in adapters for half in (each.a, each.b)]
    truth, true_leaves = install(model, adapters, torch.float64, by_weight=True)
    plain, plain_leaves = install(model, adapters, torch.float32, by_weight=False)
    ours = _gradients(patched, leaves, inputs)
    theirs = _gradients(plain, plain_leaves, inputs)
    right = _gradients(truth, true_leaves, inputs)
    for i, each in enumerate(zip(ours, theirs, right, strict=True)):
        yield judge("y" if i == 0 else f"gradient {i}", *each, torch.float32)


def _adapters(patched: nn.Module) -> Iterator[Adapter]:
    for name, module in adapted(patched):
        holder, tensor = name, "weight"
        if isinstance(module, FusedLoRAChild):
            holder, tensor = name.rpartition(".")[0], name.rpartition(".")[2] + "_weight"
        pairs = zip(module.adapters(), module.scales, module.groups.values(), strict=True)
        for (a, b), scale, span in pairs:
            read = isinstance(module, FusedLoRARead)
            yield Adapter(holder, tensor, (span.start, span.stop), scale, a, b, read)


def _gradients(model: nn.Module, leaves: list[Tensor], inputs: Any) -> list[Tensor]:
    """y and the gradient of every leaf; zeros for one that none reaches."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(1)  # of models that draw, such as masked ones
    inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    y = _flat(_call(model, inputs))
    weights = torch.randn(len(y), generator=torch.Generator().manual_seed(2)).to(dtype)
    found = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
    none = zip(found, leaves, strict=True)
    return [y.detach(), *(torch.zeros_like(p) if g is None else g for g, p in none)]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _flat(output: Any) -> Tensor:
    """Every floating result in one row."""
    values = output.values() if hasattr(output, "values") else [output]
    tensors = [t for value in values for t in tree_leaves(value) if isinstance(t, Tensor)]
    return torch.cat([t.flatten() for t in tensors if t.is_floating_point()])
