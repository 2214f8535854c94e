"""Roles by structure: which child of an attention or an MLP is which projection.

A rule looks at one module's descendants and their shapes; names only say which descendant to look
at. A block is the nearest module that holds an attention and an MLP; what lies outside a block
(patch embedding, heads) or beside the repeated ones (attention pooling), and an MLP inside an
attention or of another width (relative positions), is never hit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fused_lora.nn.bare import child_name
from fused_lora.nn.kernel import is_convolution
from fused_lora.patching.vocabulary import RULES, Rule, projection
from fused_lora.types import Role

LATENT = ("latent", "probe")  # what a pool asks with: its own parameter, no token


@dataclass(frozen=True)
class Found:
    """One projection: its dotted name, who holds its weight, and what its columns are for."""

    name: str
    module: nn.Module  # the linear; or, where the weight is a bare parameter, its holder
    roles: tuple[Role, ...]
    tensor: str = "weight"  # the weight's name in ``module``
    kind: str = ""  # of the module that the rule matched; alike ones take their columns apart alike

    @property
    def path(self) -> str:
        """Where its adapters are: in the linear, or in a child of the weight's holder."""
        return f"{self.name}.{child_name('weight')}" if is_convolution(self.module) else self.name


@dataclass(frozen=True)
class Match:
    """One module that a rule fits, and where its projections are, in the rule's order."""

    rule: Rule
    module: nn.Module
    paths: tuple[str, ...]  # relative to the module

    @property
    def widths(self) -> set[int]:
        """Sizes of the tokens that go in and come out."""
        shapes = [projection(self.module, path) for path in self.paths]
        assert all(each is not None for each in shapes)
        return {shapes[0].shape[1], shapes[-1].shape[0]}  # type: ignore[union-attr]


def find(model: nn.Module) -> list[Found]:
    """Every projection of every block, in the model's own order."""
    matched = {name: m for name, module in model.named_modules() if (m := _match(module))}
    attentions = {name: m for name, m in matched.items() if m.rule.attention}
    attentions = _without_pools(model, attentions)
    mlps = {name: m for name, m in matched.items() if not m.rule.attention}
    mlps = {name: m for name, m in mlps.items() if not set(_ancestors(name)) & set(attentions)}
    kept = dict(attentions)
    for name, attention in attentions.items():
        block = _block(name, mlps)
        inside = {} if block is None else _inside(block, mlps)
        kept |= {path: m for path, m in inside.items() if m.widths & attention.widths}
    return [each for name in matched if name in kept for each in _projections(name, kept[name])]


def _match(module: nn.Module) -> Match | None:
    for rule in RULES:
        if paths := rule.paths(module):
            return Match(rule, module, paths)
    return None


def _projections(name: str, match: Match) -> Iterator[Found]:
    kind = type(match.module).__qualname__
    for path, roles in zip(match.paths, match.rule.roles, strict=True):
        where = f"{name}.{path}" if name else path
        holder, tensor = match.module, path
        if not roles:  # there for the rule's shapes alone
            continue
        if isinstance(holder._parameters.get(path), nn.Parameter):
            yield Found(where.removesuffix("_weight"), holder, roles, tensor, kind)
        else:
            yield Found(where, holder.get_submodule(path), roles, "weight", kind)


def _without_pools(model: nn.Module, attentions: dict[str, Match]) -> dict[str, Match]:
    """Those in numbered blocks, where there are any; a pool or a neck has no number."""
    numbered = {n: m for n, m in attentions.items() if any(p.isdecimal() for p in n.split("."))}
    return {
        name: match
        for name, match in (numbered or attentions).items()
        if not _asks_with_its_own(model, name)
    }


def _asks_with_its_own(model: nn.Module, name: str) -> bool:
    owners = [model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])]
    return any(key in owner._parameters for owner in owners for key in LATENT)


def _block(attention: str, mlps: dict[str, Match]) -> str | None:
    return next((each for each in _ancestors(attention) if _inside(each, mlps)), None)


def _inside(block: str, mlps: dict[str, Match]) -> dict[str, Match]:
    prefix = block + "." if block else ""
    return {name: m for name, m in mlps.items() if name == block or name.startswith(prefix)}


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
