r"""``adapter_config.json``, read as PEFT reads it.

PEFT looks a module's rank and alpha up by the first pattern key that matches its name,
``re.match(rf"(.*\.)?({key})$", name)``, and takes s = alpha / rank, or alpha / sqrt(rank).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fused_lora.io.blocks import Blocks, blocks_of
from fused_lora.io.errors import AdapterFileError

# What changes the computation, with the values at which it does not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
# What decides only where adapters go, how they trained, or nothing at all.
HARMLESS = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
    ]
)
BLOCKS, DORA = "use_bdlora", "use_dora"
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save")


@dataclass(frozen=True)
class Settings:
    """What a config says of ranks, scales, and modules saved whole."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool = False
    modules_to_save: tuple[str, ...] = ()
    blocks: Blocks | None = None  # where lora_B holds its diagonal blocks alone
    dora: bool = False  # whether there are magnitudes

    def rank_of(self, name: str) -> int:
        """The rank R of the module ``name``."""
        return int(lookup(self.rank_pattern, name, self.rank))

    def scale_of(self, name: str) -> float:
        """The factor s of the module ``name``."""
        rank = self.rank_of(name)
        alpha = lookup(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def lookup(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches ``name``, as PEFT looks it up."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def settings_of(config: Any, where: str) -> Settings:
    """Reads a config; raises AdapterFileError for what could not be computed as PEFT would."""
    if not isinstance(config, dict):
        raise AdapterFileError(f"{where}: expected an object, got {type(config).__name__}")
    if "peft_type" not in config:
        raise AdapterFileError(f"{where}: no peft_type; found the keys {some_of(config)}")
    for key, value in sorted(config.items(), key=lambda item: item[0] != "peft_type"):
        if value not in NEUTRAL.get(key, (value,)):
            raise AdapterFileError(
                f"{where}: {key} is {value!r}; only {NEUTRAL[key][0]!r} can be loaded"
            )
        if (
            value
            and key not in HARMLESS
            and key not in NEUTRAL
            and key not in (*READ, BLOCKS, DORA)
        ):
            raise AdapterFileError(f"{where}: {key} is {value!r}, an option unknown here")
    return Settings(
        int(_number(config, "r", where, whole=True)),
        _number(config, "lora_alpha", where),
        {key: int(v) for key, v in _pattern(config, "rank_pattern", where, whole=True).items()},
        _pattern(config, "alpha_pattern", where),
        bool(config.get("use_rslora")),
        tuple(_names(config, "modules_to_save", where)),
        blocks_of(config.get(BLOCKS), where),
        bool(config.get(DORA)),
    )


def some_of(config: Mapping[str, Any]) -> list[str]:
    """At most eight of the keys."""
    return sorted(config)[:8]


def _number(config: Mapping[str, Any], key: str, where: str, whole: bool = False) -> float:
    value = config.get(key)
    _check_number(value, f"{where}: {key}", whole)
    return value  # type: ignore[return-value]


def _check_number(value: Any, what: str, whole: bool) -> None:
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or (whole and value < 1):
        kind = "a whole number from 1" if whole else "a finite number"
        raise AdapterFileError(f"{what} should be {kind}, got {value!r}")


def _pattern(
    config: Mapping[str, Any], key: str, where: str, whole: bool = False
) -> dict[str, float]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"{where}: {key} should be an object, got {patterns!r}")
    for name, value in patterns.items():
        _check_number(value, f"{where}: {key}[{name!r}]", whole)
        try:
            re.compile(rf"(.*\.)?({name})$")
        except re.error as error:
            raise AdapterFileError(f"{where}: {key}[{name!r}] is no pattern: {error}") from None
    return patterns


def _names(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise AdapterFileError(f"{where}: {key} should be a list of module names, got {names!r}")
    return names
