"""Roles by structure: which child of an attention or an MLP is which projection.

A rule looks at one module's children and their shapes. A block is the nearest module that holds an
attention and an MLP; projections outside a block (patch embedding, heads, attention pooling)
are never hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from fused_lora.types import Role

QKV = (Role.Q, Role.K, Role.V)
Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class Rule:
    """One kind of attention or MLP."""

    name: str
    attention: bool  # else an MLP
    children: dict[str, tuple[Role, ...]]  # child linear: the roles of its equal column ranges
    fits: Callable[..., bool]  # the children's (out, in) sizes, in order

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` has this rule's children, with shapes that fit."""
        shapes = [_shape(getattr(module, child, None)) for child in self.children]
        return None not in shapes and self.fits(*shapes)


def _shape(module: object) -> Shape | None:
    """(out, in) of a linear or of what calls itself one; None for anything else."""
    n, k = (getattr(module, name, None) for name in ("out_features", "in_features"))
    known = isinstance(module, nn.Module) and isinstance(n, int) and isinstance(k, int)
    return (n, k) if known else None  # type: ignore[return-value]


def _fused_attention(qkv: Shape, proj: Shape) -> bool:
    return qkv[0] == 3 * proj[1]


def _separate_attention(q: Shape, k: Shape, v: Shape, proj: Shape) -> bool:
    return q[0] == proj[1] == k[0] == v[0]


def _mlp(fc1: Shape, fc2: Shape) -> bool:
    return fc1[0] in (fc2[1], 2 * fc2[1]) and fc1[1] == fc2[0]  # twice as wide: packed GLU


def _swiglu(gate: Shape, value: Shape, fc2: Shape) -> bool:
    return gate[0] == value[0] == fc2[1]


RULES = (
    Rule("fused attention", True, {"qkv": QKV, "proj": (Role.OUT,)}, _fused_attention),
    Rule(
        "separate attention",
        True,
        {"q_proj": (Role.Q,), "k_proj": (Role.K,), "v_proj": (Role.V,), "proj": (Role.OUT,)},
        _separate_attention,
    ),
    Rule(
        "SwiGLU",
        False,
        {"fc1_g": (Role.FC1,), "fc1_x": (Role.FC1,), "fc2": (Role.FC2,)},
        _swiglu,
    ),
    Rule("MLP", False, {"fc1": (Role.FC1,), "fc2": (Role.FC2,)}, _mlp),
)


@dataclass(frozen=True)
class Found:
    """One projection: the linear's dotted name, and the roles of its column ranges."""

    name: str
    module: nn.Module
    roles: tuple[Role, ...]


def find(model: nn.Module) -> list[Found]:
    """Every projection of every block, in the model's own order."""
    matched = {
        name: rule
        for name, module in model.named_modules()
        if (rule := next((rule for rule in RULES if rule.matches(module)), None))
    }
    blocks = {_block(name, matched) for name, rule in matched.items() if rule.attention}
    return [
        Found(path, model.get_submodule(path), roles)
        for name, rule in matched.items()
        if rule.attention or any(ancestor in blocks for ancestor in _ancestors(name))
        for child, roles in rule.children.items()
        for path in (f"{name}.{child}" if name else child,)
    ]


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _block(attention: str, matched: dict[str, Rule]) -> str | None:
    mlps = [name for name, rule in matched.items() if not rule.attention]
    for ancestor in _ancestors(attention):
        prefix = ancestor + "." if ancestor else ""
        if any(mlp.startswith(prefix) for mlp in mlps):
            return ancestor
    return None
