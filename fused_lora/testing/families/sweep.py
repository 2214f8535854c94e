"""One family: patched, and compared with naive LoRA; or refused, with the reason."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_lora.nn import FusedLoRAParameter, FusedLoRAWeight
from fused_lora.patching.example import examples_for
from fused_lora.patching.patch import adapted, patch
from fused_lora.patching.report import PatchError
from fused_lora.testing.families import of_others, of_timm, of_torchvision, of_transformers
from fused_lora.testing.families.truth import Adapter, install
from fused_lora.testing.yardstick import Comparison, in_every_order, judge

LIBRARIES: dict[str, ModuleType] = {
    "timm": of_timm,
    "transformers": of_transformers,
    "torchvision": of_torchvision,
    "others": of_others,
}
RANK = 2
EXACT = 1e-7  # in float64; some models compute positions in fp32 all the same
NOISE = 1e-8  # of the largest gradient: a smaller norm is the rounding of an exact zero


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
    verdicts: tuple[Comparison, ...] = ()  # fp32: of y, and of all adapter gradients together
    worst: float = 0.0  # float64: relative error of the worst adapter gradient
    unreached: int = 0  # adapter parameters whose gradient is zero, where naive LoRA's is not

    @property
    def passed(self) -> bool:
        """Whether it computes what naive LoRA does, or said why not."""
        exact = self.worst <= EXACT and not self.unreached
        return bool(self.refusal) or (exact and all(each.passed for each in self.verdicts))


def families() -> Iterator[tuple[str, str]]:
    """Every (library, family)."""
    for library, home in LIBRARIES.items():
        for family in home.MODELS:
            yield library, family


@functools.cache
def outcome(library: str, family: str) -> Outcome:
    """Served with separate adapters on q, k and v; else with a joint one; else refused."""
    home = LIBRARIES[library]
    torch.manual_seed(0)
    model, example = _off_its_zeros(home.build(family)), home.example(family)
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
    verdicts, worst, unreached = _compare(model, patched, _inputs(model, example))
    return Outcome(
        library,
        family,
        type(model).__name__,
        qkv,
        tuple(roles),
        len(report.rows),
        sum(isinstance(module, FusedLoRAWeight) for _, module in adapted(patched)),
        "",
        verdicts,
        worst,
        unreached,
    )


def _off_its_zeros(model: nn.Module) -> nn.Module:
    """Layers that start at zero would keep every gradient behind them there."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _wake(model: nn.Module) -> None:
    for _, module in adapted(model):
        for _, b in module.adapters():
            nn.init.normal_(b, std=0.1)


def _inputs(model: nn.Module, example: Any) -> Any:
    """Random values of the example's shape, two images where it says nothing."""
    return torch.randn(2, *examples_for(model)[0].shape[1:]) if example is None else example


def _compare(
    model: nn.Module, patched: nn.Module, inputs: Any
) -> tuple[tuple[Comparison, ...], float, int]:
    adapters = list(_adapters(patched))
    truth = _gradients(*install(model, adapters, torch.float64, by_weight=True), inputs)
    naive = install(model, adapters, torch.float32, by_weight=False)
    plain = in_every_order(lambda: _gradients(*naive, inputs))
    ours = _gradients(patched, _halves(adapters), inputs)
    wide = _to(copy.deepcopy(patched), torch.float64)
    exact = _gradients(wide, _halves(_adapters(wide)), inputs)
    mine, right, others = _row(ours[1:]), _row(truth[1:]), [_row(run[1:]) for run in plain]
    verdicts = (
        judge("y", ours[0], [run[0] for run in plain], truth[0], torch.float32),
        judge("adapter gradients", mine, others, right, torch.float32),
    )
    return verdicts, _worst(exact[1:], truth[1:]), _unreached(exact[1:], truth[1:])


def _row(gradients: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in gradients])


def _worst(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Relative to each gradient; to all of them, for one that is nothing beside the rest."""
    floor = _noise(truth)
    pairs = zip(ours, truth, strict=True)
    return max(float((mine - true).norm()) / max(float(true.norm()), floor) for mine, true in pairs)


def _unreached(ours: list[Tensor], truth: list[Tensor]) -> int:
    """How many are zero where the truth is more than noise."""
    floor = _noise(truth)
    pairs = zip(ours, truth, strict=True)
    return sum(float(true.norm()) > floor and not bool(mine.any()) for mine, true in pairs)


def _noise(truth: list[Tensor]) -> float:
    return NOISE * max(float(each.norm()) for each in truth)


def _halves(adapters: Iterable[Adapter]) -> list[Tensor]:
    return [half for each in adapters for half in (each.a, each.b)]


def _to(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` itself in ``dtype``; its complex buffers, which have no such dtype, stay."""
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _adapters(patched: nn.Module) -> Iterator[Adapter]:
    for name, module in adapted(patched):
        holder, tensor = name, "weight"
        if isinstance(module, FusedLoRAParameter):
            holder, tensor = name.rpartition(".")[0], name.rpartition(".")[2] + "_weight"
        pairs = zip(module.adapters(), module.scales, module.groups.values(), strict=True)
        for (a, b), scale, span in pairs:
            read = isinstance(module, FusedLoRAWeight)
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
    values = output.values() if isinstance(output, Mapping) else [output]
    tensors = [t for value in values for t in tree_leaves(value) if isinstance(t, Tensor)]
    return torch.cat([t.flatten() for t in tensors if t.is_floating_point()])
