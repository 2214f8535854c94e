"""PEFT's key format, and the adapted linears it names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fused_lora.io.errors import AdapterFileError
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.shared import SharedLoRALinear

PREFIX = "base_model.model."
ASIDE = "fused_lora.b."  # before <module>.<group>: a b that its fold into lora_B would round


def a_key(module: str) -> str:
    """The key of a [R, K]."""
    return f"{PREFIX}{module}.lora_A.weight"


def b_key(module: str) -> str:
    """The key of b [N, R]."""
    return f"{PREFIX}{module}.lora_B.weight"


def magnitude_key(module: str) -> str:
    """The key of DoRA's m [N]."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def aside_key(module: str, group: str) -> str:
    """The key of one group's own b; PEFT passes over it."""
    return f"{ASIDE}{module}.{group}"


def bare(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, which would put ``module.`` before every name."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the dotted name that it has in the vanilla model."""
    return {plain(name): module for name, module in model.named_modules()}


def plain(name: str) -> str:
    """``name`` without what ``torch.compile`` puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linears by dotted name; raises AdapterFileError if the model has none."""
    if not isinstance(model, nn.Module):
        raise AdapterFileError(f"expected a torch.nn.Module, got {type(model).__name__}")
    names = module_names(model)
    found = {name: m for name, m in names.items() if isinstance(m, AdaptedLinear)}
    if not found and any(name.endswith(".lora_A") for name in names):
        raise AdapterFileError(
            f"{type(model).__name__} carries PEFT's adapters: call its save_pretrained, "
            "load_adapter or PeftModel.from_pretrained"
        )
    if not found:
        raise AdapterFileError(
            f"{type(model).__name__} carries no adapters: call fused_lora.patch on it first"
        )
    if "" in found:
        raise AdapterFileError(
            f"the model itself is a {type(model).__name__}: its adapter has no dotted name; put "
            "the layer inside a module"
        )
    return found


def unmerged(model: nn.Module) -> dict[str, AdaptedLinear]:
    """``adapted(model)``; raises AdapterFileError where one is merged, or another model's."""
    found = adapted(model)
    for name, module in found.items():
        if isinstance(module, SharedLoRALinear):
            raise AdapterFileError(
                f"{name} shares its teacher's adapters, which loading would overwrite: load into "
                "the teacher, or call fused_lora.unshare_adapters first"
            )
        if module.merged:
            raise AdapterFileError(f"{name} is merged: call fused_lora.unmerge before loading")
    return found


def some(names: Iterable[str]) -> str:
    """The first three of ``names``, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def check_keys(where: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises AdapterFileError unless both name the same keys."""
    expected, found = set(expected), set(found)
    missing, unexpected = expected - found, found - expected
    said = [f"missing {some(missing)}"] * bool(missing)
    said += [f"unexpected {some(unexpected)}"] * bool(unexpected)
    if said:
        raise AdapterFileError(
            f"{where}: {'; '.join(said)} ({len(found)} keys found, the model has {len(expected)}): "
            "patch the model as it was when the adapter was saved"
        )
