"""``adapter_config.json``, written so that PEFT adapts these modules, at these scales, alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fused_lora.io.peft import lookup


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
