"""PEFT's adapter_config.json: its settings read, and those of a model written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_lora.io.fuse import Group
from fused_lora.io.keys import AdapterFileError, b_key

# PEFT's BdLora layout: of a block-diagonal b, the blocks alone, one below the other.
#
#     dense    B = diag(b_q, b_k, b_v)    [N, 3 R]
#     blocks   B = [b_q; b_k; b_v]        [N, R]        under the same key, a as before
#
# Every block has as many rows and columns as every other: so for a fused qkv with one rank.


LAYOUTS = ("dense", "blocks")


@dataclass(frozen=True)
class Blocks:
    """Which modules have it: those whose last name contains one of ``patterns``."""

    patterns: tuple[str, ...]
    count: int

    def holds(self, module: str) -> bool:
        """Whether ``module`` has its b in blocks, as PEFT decides it."""
        last = module.rpartition(".")[2]
        return any(pattern in last for pattern in self.patterns)


def blocks_of(noted: Any, where: str) -> Blocks | None:
    """The config's ``use_bdlora``; raises AdapterFileError for what cannot be read."""
    if not noted:
        return None
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not isinstance(noted, dict) or set(noted) - known:
        raise AdapterFileError(f"{where}: use_bdlora is {noted!r}; its fields are {sorted(known)}")
    if noted.get("target_modules_bd_a"):
        raise AdapterFileError(
            f"{where}: use_bdlora has {noted['target_modules_bd_a']!r} in blocks of lora_A; blocks "
            "of lora_B alone can be loaded"
        )
    patterns, count = noted.get("target_modules_bd_b") or [], noted.get("nblocks", 1)
    words = isinstance(patterns, list) and all(isinstance(each, str) for each in patterns)
    if not words or type(count) is not int or count < 1:
        raise AdapterFileError(f"{where}: use_bdlora cannot be read: {noted!r}")
    return Blocks(tuple(patterns), count)


def dense(b: Tensor, blocks: Blocks, where: str) -> Tensor:
    """b [N, count R] of its blocks [N, R]."""
    if b.dim() != 2 or b.shape[0] % blocks.count:
        raise AdapterFileError(f"{where}: {tuple(b.shape)} are not {blocks.count} equal blocks")
    return torch.block_diag(*b.chunk(blocks.count))


def in_blocks(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Sequence[Group]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors in blocks, the config's ``use_bdlora``); AdapterFileError where it cannot be."""
    held = {name: each for name, each in groups.items() if len(each) > 1}
    if not held:
        raise AdapterFileError(
            'layout="blocks": no module has several adapters, which is what its blocks are; '
            f"{next(iter(groups))} has one"
        )
    counts = {len(each) for each in held.values()}
    blocks = Blocks(tuple(sorted({name.rpartition(".")[2] for name in held})), min(counts))
    if clash := [n for n in groups if blocks.holds(n) and n not in held] or len(counts) > 1:
        raise AdapterFileError(f'layout="blocks": {clash} would be read as {blocks} too')
    new = dict(tensors)
    for name, each in held.items():
        _check_equal(name, each, tensors[b_key(name)])
        new[b_key(name)] = _diagonal(tensors[b_key(name)], each)
    config = {
        "target_modules_bd_a": [],
        "target_modules_bd_b": list(blocks.patterns),
        "nblocks": blocks.count,
        "match_strict": False,
    }
    return new, config


def _check_equal(name: str, groups: Sequence[Group], b: Tensor) -> None:
    spans = [group.span for group in groups]
    edges = [0, *(span.stop for span in spans)]
    together = [span.start for span in spans] == edges[:-1] and edges[-1] == b.shape[0]
    alike = {
        (span.width, span.rank, group.scale) for span, group in zip(spans, groups, strict=True)
    }
    if not together or len(alike) > 1:
        raise AdapterFileError(
            f'layout="blocks": the adapters of {name} differ in columns, rank or scale, or leave '
            f"columns out: {[(g.name, g.span, g.scale) for g in groups]}"
        )


def _diagonal(b: Tensor, groups: Sequence[Group]) -> Tensor:
    rank = groups[0].span.rank
    rows = [b[g.span.start : g.span.stop, i * rank :][:, :rank] for i, g in enumerate(groups)]
    return torch.cat(rows)


# ``adapter_config.json``, read as PEFT reads it.
#
# PEFT looks a module's rank and alpha up by the first pattern key that matches its name,
# ``re.match(rf"(.*\.)?({key})$", name)``, and takes s = alpha / rank, or alpha / sqrt(rank).


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
HARMLESS = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
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
        return alpha / self._divisor(rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilized else rank

    def with_modules(self, modules: Mapping[str, tuple[int, float]]) -> Settings:
        """The same that also know rank and scale of ``modules``, by our names."""
        ranks = {f"^{re.escape(name)}": rank for name, (rank, _) in modules.items()}
        alphas = {
            f"^{re.escape(name)}": scale * self._divisor(rank)
            for name, (rank, scale) in modules.items()
        }
        return replace(
            self,
            rank_pattern=ranks | dict(self.rank_pattern),
            alpha_pattern=alphas | dict(self.alpha_pattern),
        )


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
        if value and key not in {*HARMLESS, *NEUTRAL, *READ, BLOCKS, DORA}:
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
