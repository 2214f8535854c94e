"""PEFT's ``LoraConfig``, read as the options of ``patch``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

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


def names_of(config: Any, model: nn.Module, found: Iterable[str]) -> list[str]:
    """Which of the projections ``found`` the config names; PatchError where that is none.

    What else of the model it names (a patch embedding that shares a projection's name) stays as it
    is, since adapters go on the projections of blocks alone.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    found = list(found)
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return found
    named = [name for name in found if check_target_module_exists(config, name)]
    for target in sorted(targets) if not isinstance(targets, str) else ():
        if not any(name == target or name.endswith(f".{target}") for name in found):
            raise PatchError(
                f"LoraConfig.target_modules names {target!r}, which is no projection of a block of "
                f"{type(model).__name__}; those end in {sorted({n.split('.')[-1] for n in found})}"
            )
    if not named:
        raise PatchError(f"LoraConfig.target_modules {targets!r} matches none of {found[:6]}")
    return named


def passed_over(config: Any, model: nn.Module, served: Iterable[str]) -> dict[str, str]:
    """What else PEFT would adapt, and why it stays as it is here."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules is None or config.target_modules == "all-linear":
        return {}
    served = set(served)
    return {
        name: "named by the LoraConfig, but no projection of a block"
        for name, module in model.named_modules()
        if name and name not in served and getattr(module, "weight", None) is not None
        if check_target_module_exists(config, name)
    }


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
