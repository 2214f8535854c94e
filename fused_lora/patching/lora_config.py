"""PEFT's ``LoraConfig``, read as the options of ``patch``."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from fused_lora.nn.kernel import is_convolution, why_not_kernel
from fused_lora.patching.errors import PatchError

SERVED = frozenset({
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
    "init_lora_weights",
})  # fmt: skip
MEANINGLESS = frozenset({  # here, or before training
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "runtime_config", "megatron_core", "megatron_config",
    "ensure_weight_tying",
})  # fmt: skip
INITS = {True: "kaiming", "gaussian": "gaussian"}
SAYS = ("alpha", "scale", "rank_stabilized", "dropout", "init")  # options of patch that it fixes


def is_lora_config(value: object) -> bool:
    """Whether ``value`` is PEFT's; without importing PEFT."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(value, peft.LoraConfig)


def options_of(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``patch`` that ``config`` amounts to; raises PatchError for what it cannot be.

    Args:
        config: a ``peft.LoraConfig``.
        given: options that the caller set besides, none of which may say the same.
    """
    if clash := [name for name in given if name in SAYS]:
        raise PatchError(f"{clash[0]}={given[clash[0]]!r}: the LoraConfig says that already")
    _check_served(config)
    if config.init_lora_weights not in INITS:
        raise PatchError(
            f"LoraConfig.init_lora_weights is {config.init_lora_weights!r}; "
            f"{list(INITS)} are served"
        )
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rank_stabilized": config.use_rslora,
        "dropout": config.lora_dropout,
        "init": INITS[config.init_lora_weights],
        "rank_pattern": _patterns(config.rank_pattern),
        "alpha_pattern": _patterns(config.alpha_pattern),
        "trainable": tuple(rf"(^|\.){name}\." for name in config.modules_to_save or ()),
    }


@dataclass(frozen=True)
class Named:
    """The modules that PEFT would adapt for a LoraConfig, by name, with what each of them is."""

    model: nn.Module
    config: Any  # target_modules resolved

    @classmethod
    def by(cls, config: Any, model: nn.Module) -> Named:
        """Read as PEFT reads it; "all-linear" is every linear but PEFT's exceptions."""
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

        return cls(model, _maybe_include_all_linear_layers(copy.copy(config), model))

    @property
    def everything(self) -> bool:
        """Whether the config names no module, which stands for the projections of blocks."""
        return self.config.target_modules is None

    def __contains__(self, name: str) -> bool:
        from peft.tuners.tuners_utils import check_target_module_exists

        if not name or self._saved_whole(name):
            return False
        return self.everything or bool(check_target_module_exists(self.config, name))

    def _saved_whole(self, name: str) -> bool:
        whole = self.config.modules_to_save or ()
        return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in whole)

    def among(self, found: Iterable[str]) -> list[str]:
        """Which of the projections ``found`` it names."""
        return [name for name in found if name in self]

    def linears_beside(self, found: Iterable[str]) -> list[str]:
        """Linears outside the blocks, or unknown in them, that it names: heads, poolers."""
        if self.everything:
            return []
        found = set(found)
        named = ((n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear))
        return [name for name, _ in named if name not in found and name in self]

    def convolutions(self) -> list[str]:
        """Those that it names and whose kernel can be adapted as PEFT adapts it."""
        if self.everything:
            return []
        named = ((n, m) for n, m in self.model.named_modules() if is_convolution(m))
        return [name for name, m in named if name in self and not why_not_kernel(m)]

    def check(self, found: Iterable[str], served: Iterable[str]) -> None:
        """Raises PatchError for a target that nothing answers to, or where nothing is served.

        Args:
            found: the projections of blocks.
            served: what is adapted, these or other linears.
        """
        found, targets = list(found), self.config.target_modules
        linears = (n for n, m in self.model.named_modules() if isinstance(m, nn.Linear))
        there = {*found, *linears, *self.convolutions()}
        for target in sorted(targets or ()) if not isinstance(targets, str) else ():
            if not any(_hits(target, name) for name in there):
                if reasons := self._why_not_convolutions(target):
                    raise PatchError(f"LoraConfig.target_modules names {target!r}: {reasons}")
                raise PatchError(
                    f"LoraConfig.target_modules names {target!r}, which is no projection of a "
                    f"block of {type(self.model).__name__} and no linear beside them; the "
                    f"projections end in {sorted({n.split('.')[-1] for n in found})}"
                )
        if not list(served):
            raise PatchError(f"LoraConfig.target_modules {targets!r} matches none of {found[:6]}")

    def _why_not_convolutions(self, target: str) -> str:
        named = ((n, m) for n, m in self.model.named_modules() if _hits(target, n))
        reasons = [f"{n}, {why_not_kernel(m)}" for n, m in named if is_convolution(m)]
        return "; ".join(reasons[:3])

    def passed_over(self, served: Iterable[str]) -> dict[str, str]:
        """What else PEFT would adapt, and why it stays as it is here."""
        if self.everything:
            return {}
        served = set(served)
        return {
            name: f"named by the LoraConfig, but {_why_left(module, self.config)}"
            for name, module in self.model.named_modules()
            if name not in served and getattr(module, "weight", None) is not None
            if not isinstance(module, nn.Linear) and name in self
        }


def _hits(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _why_left(module: nn.Module, config: Any) -> str:
    if is_convolution(module):
        if config.lora_dropout:
            return f"lora_dropout={config.lora_dropout} would drop from the images of a convolution"
        return why_not_kernel(module) or "left out by exclude or layers"
    return f"no projection of a block, no linear, no convolution: a {type(module).__name__}"


def _check_served(config: Any) -> None:
    plain = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        same = value == getattr(plain, field.name) or not value
        if field.name in SERVED | MEANINGLESS or same:
            continue
        raise PatchError(
            f"LoraConfig.{field.name} is {value!r}, which is not served; leave it out, or patch "
            "the model that peft.get_peft_model returns"
        )


def _patterns(patterns: Mapping[str, Any]) -> dict[str, Any]:
    return {rf"^(.*\.)?({key})$": value for key, value in (patterns or {}).items()}
