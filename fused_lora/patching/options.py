"""What a caller of patch asks for: its own options or a LoraConfig of PEFT."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor, nn

from fused_lora.arguments import brief, by_string, number, strings, whole
from fused_lora.nn import AdapterConfig
from fused_lora.nn.child_adapters import is_convolution, why_not_kernel
from fused_lora.patching.report import PatchError
from fused_lora.types import ALL_ROLES, Role

QKV_MODES = ("separate", "joint")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Selection:
    """Which of the projections found are taken."""

    layers: frozenset[int] | None = None  # None for every block
    exclude: tuple[str, ...] = ()  # regular expressions on dotted names
    keep_forward: bool = False  # take linears of other classes, with their own forward


@dataclass(frozen=True)
class Choice:
    """What the caller of ``patch`` asked for, of every projection alike."""

    config: AdapterConfig
    rank: int
    roles: tuple[Role, ...]
    qkv: str  # one of QKV_MODES
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    allow_large_rank: bool
    only: Any = None  # a LoraConfig that names modules
    selection: Selection = Selection()


def roles_of(targets: Iterable[Role | str] | str | None) -> tuple[Role, ...]:
    """The roles asked for; None for all six."""
    if targets is None:
        return ALL_ROLES
    names = strings("targets", targets, PatchError)
    known = [role.value for role in Role]
    if unknown := [name for name in names if name not in known]:
        raise PatchError(f"targets: {brief(unknown[0])} is no role; the roles are {known}")
    roles = tuple(dict.fromkeys(map(Role, names)))
    if not roles:
        raise PatchError("targets is empty: name at least one role")
    return roles


def block_numbers(layers: Iterable[int] | int | None) -> frozenset[int] | None:
    """The block numbers asked for; None for all."""
    if layers is None:
        return None
    one = not isinstance(layers, Iterable) or isinstance(layers, str | bytes | Tensor)
    numbers: list[Any] = [layers] if one else list(layers)  # type: ignore[arg-type]
    for each in numbers:
        whole("layers: a block's number", each, 0, PatchError)
    if not numbers:
        raise PatchError("layers is empty: name at least one block")
    return frozenset(numbers)


def layer_of(name: str) -> int | None:
    """The number in a dotted name, its block's: 3 of ``blocks.3.mlp.fc1``.

    torchvision writes ``encoder_layer_3``, and numbers the linears of the MLP inside.
    """
    found = (re.fullmatch(r"(?:\w*layer_)?(\d+)", part) for part in name.split("."))
    return next((int(match[1]) for match in found if match), None)


def compiled(option: str, pattern: str) -> re.Pattern[str]:
    """``pattern``; raises PatchError, naming the option, where it is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise PatchError(f"{option}: {brief(pattern)} is no regular expression: {error}") from None


def selected(names: Iterable[str], choice: Selection) -> set[str]:
    """The names that ``layers`` and ``exclude`` leave; raises PatchError where one hits nothing."""
    names = set(names)
    left = set(names)
    for key in choice.exclude:
        pattern = compiled("exclude", key)
        if not (hit := {name for name in names if pattern.search(name)}):
            raise PatchError(f"exclude: {brief(key)} matches no projection's name")
        left -= hit
    if choice.layers is not None:
        there = {layer for name in names if (layer := layer_of(name)) is not None}
        if missing := choice.layers - there:
            raise PatchError(
                f"layers: no block {brief(sorted(missing))}; the model has {sorted(there)}"
            )
        left = {name for name in left if layer_of(name) in choice.layers}
    if names and not left:
        raise PatchError(
            f"layers={choice.layers and sorted(choice.layers)} and exclude={list(choice.exclude)} "
            "leave no projection"
        )
    return left


def check_patterns(patterns: Mapping[str, float], option: str, names: Iterable[str]) -> None:
    """Raises PatchError for a key that is neither a role nor matches any module's name."""
    names = list(names)
    for key in patterns:
        if key in {role.value for role in Role}:
            continue
        if not any(map(compiled(option, key).search, names)):
            raise PatchError(f"{option}: {brief(key)} is no role and matches no projection's name")


def value_for(
    patterns: Mapping[str, Number], name: str, role: Role | None, default: Number
) -> Number:
    """A name's pattern goes before its role's, its role's before the default."""
    for key, value in patterns.items():
        if key not in {role.value for role in Role} and re.search(key, name):
            return value
    return default if role is None else patterns.get(role.value, default)


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
        raise PatchError(f"{clash[0]}={brief(given[clash[0]])}: the LoraConfig says that already")
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


def options_given(*values: Any) -> dict[str, Any]:
    """The options that the caller set."""
    names = ("rank", "targets", "qkv", "rank_pattern", "alpha_pattern", "trainable", "seed")
    return {
        n: v
        for n, v in zip(names, values, strict=True)
        if not (v is None or (isinstance(v, tuple) and not v))
    }


def _merged(of_config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A LoraConfig's options and the caller's own; a head may be named by both."""
    for name in ("targets", "rank_pattern", "alpha_pattern"):
        if name in given:
            raise PatchError(f"{name}={brief(given[name])}: the LoraConfig says that already")
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
    if (seed := asked.pop("seed", None)) is not None:
        whole("seed", seed, None, PatchError)
    rank, qkv = asked.pop("rank", 16), asked.pop("qkv", "separate")
    roles = roles_of(asked.pop("targets", None))
    ranks = by_string("rank_pattern", asked.pop("rank_pattern", {}), PatchError)
    for key, value in ranks.items():
        whole(f"rank_pattern[{key!r}]", value, 1, PatchError)
    alphas = by_string("alpha_pattern", asked.pop("alpha_pattern", {}), PatchError)
    for key, value in alphas.items():
        number(f"alpha_pattern[{key!r}]", value, PatchError)
    adapter = AdapterConfig(**asked)
    if adapter.base_dtype and selection.keep_forward:
        raise PatchError(
            f"base_dtype={adapter.base_dtype!r} quantises the base, and keep_forward=True leaves "
            "it to forwards of its own: give one of them"
        )
    choice = Choice(adapter, rank, roles, qkv, ranks, alphas, allow_large_rank, config, selection)
    return choice, trained


def patterns_of(trainable: Iterable[str]) -> list[re.Pattern[str]]:
    """``trainable`` as regular expressions; raises PatchError where one is none."""
    patterns = strings("trainable", trainable, PatchError)
    return [compiled("trainable", pattern) for pattern in patterns]
