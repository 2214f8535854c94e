r"""``adapter_config.json``: what PEFT reads from it, read and written the same way here.

PEFT looks a module's rank and alpha up by the first pattern key that matches its name,
``re.match(rf"(.*\.)?({key})$", name)``, and takes s = alpha / rank, or alpha / sqrt(rank).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fused_lora.io.errors import AdapterFileError

# What changes the computation, with the values at which it does not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
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
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "target_modules exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out "
    "megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config "
    "runtime_config qalora_group_size ensure_weight_tying".split()
)
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
        if value and key not in HARMLESS and key not in NEUTRAL and key not in READ:
            raise AdapterFileError(f"{where}: {key} is {value!r}, an option unknown here")
    return Settings(
        int(_number(config, "r", where, whole=True)),
        _number(config, "lora_alpha", where),
        {key: int(v) for key, v in _pattern(config, "rank_pattern", where, whole=True).items()},
        _pattern(config, "alpha_pattern", where),
        bool(config.get("use_rslora")),
        tuple(_names(config, "modules_to_save", where)),
    )


def some_of(config: Mapping[str, Any]) -> list[str]:
    """At most eight of the keys."""
    return sorted(config)[:8]


def config_for(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    names: Iterable[str],
    others: Sequence[str],
    dropout: float,
    base: str | None,
) -> dict[str, Any]:
    """The config from which PEFT gives every module its rank and scale, and adapts no other.

    Args:
        ranks: by name, of the modules adapted.
        scales: likewise.
        names: every module of the model.
        others: modules saved whole.
        dropout: on the adapters' input.
        base: what the model was made from, if it says.
    """
    alphas = {name: alpha_for(scales[name], rank) for name, rank in ranks.items()}
    rank, alpha = most_common(ranks), most_common(alphas)
    return {
        "alpha_pattern": pattern_for(alphas, alpha),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(others) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern_for(ranks, rank),
        "target_modules": targets_for(ranks, names),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def targets_for(targets: Iterable[str], names: Iterable[str]) -> list[str] | str:
    """The names themselves; a pattern where PEFT, which takes a name as an ending, hits others."""
    listed = list(targets)
    endings = tuple(f".{name}" for name in listed)
    if any(name.endswith(endings) for name in set(names) - set(listed)):
        return "|".join(map(re.escape, listed))
    return listed


def alpha_for(scale: float, rank: int) -> float:
    """The alpha whose alpha / rank is ``scale``, to the bit wherever a double has it."""
    near = scale * rank
    tries = (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in tries if alpha / rank == scale), near)


def most_common(values: Mapping[str, float]) -> Any:
    """The value that most modules have."""
    return Counter(values.values()).most_common(1)[0][0]


def pattern_for(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The exceptions from ``default``; every module, where one name's pattern hits another's.

    The longest name goes first, so that a name which ends another does not stand in its way.
    """
    ordered = sorted(values, key=len, reverse=True)
    exceptions = {name: values[name] for name in ordered if values[name] != default}
    if all(lookup(exceptions, name, default) == value for name, value in values.items()):
        return exceptions
    return {f"^{re.escape(name)}": values[name] for name in ordered}


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
