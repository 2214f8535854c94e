"""What the caller of ``patch`` set, in his own words or a LoraConfig's, as one choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fused_lora.nn import AdapterConfig
from fused_lora.patching.errors import PatchError
from fused_lora.patching.lora_config import is_lora_config, options_of
from fused_lora.patching.options import Choice, Selection, roles_of


def options_given(*values: Any) -> dict[str, Any]:
    """The options that the caller set."""
    names = ("rank", "targets", "qkv", "rank_pattern", "alpha_pattern", "trainable", "seed")
    return {n: v for n, v in zip(names, values, strict=True) if v is not None and v != ()}


def _merged(of_config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A LoraConfig's options and the caller's own; a head may be named by both."""
    for name in ("targets", "rank_pattern", "alpha_pattern"):
        if name in given:
            raise PatchError(f"{name}={given[name]!r}: the LoraConfig says that already")
    own = given.get("trainable", ())
    trainable = (*of_config["trainable"], *((own,) if isinstance(own, str) else own))
    return {"qkv": "joint"} | of_config | given | {"trainable": trainable}


def choice_of(
    given: Mapping[str, Any], allow_large_rank: bool, selection: Selection
) -> tuple[Choice, list[re.Pattern[str]]]:
    """The choice, and the names of what else trains; raises PatchError or ValueError."""
    asked = dict(given)
    config = asked.pop("rank") if is_lora_config(asked.get("rank")) else None
    if config is not None:
        asked = _merged(options_of(config, asked), asked)
    trained = patterns_of(asked.pop("trainable", ()))
    asked.pop("seed", None)
    rank, qkv = asked.pop("rank", 16), asked.pop("qkv", "separate")
    roles = roles_of(asked.pop("targets", None))
    patterns = asked.pop("rank_pattern", {}), asked.pop("alpha_pattern", {})
    adapter = AdapterConfig(**asked)
    if adapter.base_dtype and selection.keep_forward:
        raise PatchError(
            f"base_dtype={adapter.base_dtype!r} quantises the base, and keep_forward=True leaves "
            "it to forwards of its own: give one of them"
        )
    choice = Choice(adapter, rank, roles, qkv, *patterns, allow_large_rank, config, selection)
    return choice, trained


def patterns_of(trainable: Iterable[str]) -> list[re.Pattern[str]]:
    """``trainable`` as regular expressions; raises PatchError where one is none."""
    if isinstance(trainable, str):
        trainable = [trainable]
    try:
        return [re.compile(pattern) for pattern in trainable]
    except re.error as error:
        raise PatchError(
            f"trainable: {error.pattern!r} is no regular expression: {error}"
        ) from None
