"""The table of rules by which projections are found: a block's linears and what each computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import product, takewhile

from torch import nn

from fused_lora.nn.child_adapters import child_name, is_convolution
from fused_lora.types import Role

# The table of rules: how models of timm, transformers, torchvision and open_clip are built.
#
# Each entry names descendants of one module: linears, or bare parameters that end in ``_weight``.
# Shapes decide whether they are what their names say.


Q, K, V, OUT, FC1, FC2 = Role
Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class Rule:
    """One kind of attention or MLP."""

    name: str
    attention: bool  # else an MLP
    roles: tuple[tuple[Role, ...], ...]  # of each projection's column ranges
    names: tuple[tuple[str, ...], ...]  # the ways to name the projections
    fits: Callable[..., bool]  # the projections' (out, in) sizes, in order

    @cached_property
    def ways(self) -> tuple[tuple[tuple[str, ...], frozenset[str]], ...]:
        """Each way of ``names``, and what a module must have for it: the first part of each."""
        return tuple((names, frozenset(map(_first, names))) for names in self.names)

    def paths(self, module: nn.Module, present: Set[str]) -> tuple[str, ...]:
        """Where in ``module`` the projections are; empty where the rule does not fit."""
        for names, needed in self.ways:
            if not needed <= present:
                continue
            found = tuple(takewhile(bool, (_path(module, name) for name in names)))
            if len(found) < len(names):
                continue
            shapes = [projection(module, path).shape for path in found if path]  # type: ignore[union-attr]
            if self.fits(*shapes):
                return tuple(path for path in found if path)
        return ()


@dataclass(frozen=True)
class Projection:
    """A linear, or what calls itself one; or a bare weight."""

    shape: Shape


def projection(module: nn.Module, path: str) -> Projection | None:
    """What lies at ``path``; None for anything that projects nothing."""
    owner: object = module
    for part in path.split("."):
        if not isinstance(owner, nn.Module):
            return None
        inside = getattr(owner, part, None)
        own = inside if isinstance(inside, nn.Module) else None
        owner = owner._parameters.get(part) if own is None else own  # no wrapper's property
    if isinstance(owner, nn.Parameter):
        return Projection(tuple(owner.shape)) if owner.dim() == 2 else None  # type: ignore[arg-type]
    n, k = (getattr(owner, name, None) for name in ("out_features", "in_features"))
    known = isinstance(owner, nn.Module) and isinstance(n, int) and isinstance(k, int)
    return Projection((n, k)) if known else None  # type: ignore[arg-type]


def _path(module: nn.Module, name: str) -> str | None:
    """``name``, or the linear that what is there wraps (a clamp or a norm around it)."""
    tries = (name, f"{name}.linear")
    return next((each for each in tries if projection(module, each)), None)


def _first(name: str) -> str:
    return name.partition(".")[0]


def _fused(qkv: Shape, proj: Shape) -> bool:
    return qkv[0] > proj[1]  # three times as wide, but where keys are narrower than values


def _separate(q: Shape, k: Shape, v: Shape, proj: Shape) -> bool:
    return q[0] == proj[1] and k[0] == v[0] and q[0] % k[0] == 0  # fewer keys where queries share


def _key_value(q: Shape, kv: Shape, proj: Shape) -> bool:
    return 2 * q[0] == kv[0] and q[0] == proj[1]


def _key_wide_value(q: Shape, kv: Shape, proj: Shape) -> bool:
    return kv[0] == q[0] + proj[1]  # values as wide as the output wants them


def _query_key(qk: Shape, v: Shape, proj: Shape) -> bool:
    return qk[0] % 2 == 0 and qk[1] == v[1] and v[0] == proj[1]


def _outlook(attn: Shape, v: Shape, proj: Shape) -> bool:
    return v[0] == proj[1] and attn[1] == v[1]


def _parallel(first: Shape, proj: Shape, fc2: Shape) -> bool:
    return first[0] == 3 * proj[1] + fc2[1]


def _parallel_joined(first: Shape, out: Shape) -> bool:
    return first[0] == 2 * out[0] + out[1] and out[1] > out[0]


def _mlp(fc1: Shape, fc2: Shape) -> bool:
    return fc1[0] in (fc2[1], 2 * fc2[1]) and fc1[1] == fc2[0]  # twice as wide: packed GLU


def _gated(gate: Shape, value: Shape, fc2: Shape) -> bool:
    return gate == value and gate[0] == fc2[1] and gate[1] == fc2[0]


def _with(
    inputs: tuple[tuple[str, ...], ...], outs: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    return tuple((*names, out) for names, out in product(inputs, outs))


def _nested(names: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, ...]]:
    """transformers until 4: the projections one module deeper than the output."""
    for inner, each in product(("attention", "self"), names):
        yield (*(f"{inner}.{name}" for name in each), "output.dense")


OUTS = (
    "proj", "out_proj", "o_proj", "projection", "projection_layer", "proj.ln", "to_out.0", "out",
    "merge",
)  # fmt: skip
QKV = (
    ("qkv",), ("to_qkv",), ("in_proj",), ("Wqkv",), ("qkv_proj",), ("queries_keys_values",),
)  # fmt: skip
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("projection_query", "projection_key", "projection_value"),
)

RULES = (
    Rule(
        "parallel block",
        True,
        ((FC1, Q, K, V), (OUT,), (FC2,)),
        (("in_proj", "attn_out_proj", "mlp_out_proj"),),
        _parallel,
    ),
    Rule(
        "parallel block, outputs joined",
        True,
        ((FC1, Q, K, V), (OUT,)),
        (("in_proj", "out_proj"),),
        _parallel_joined,
    ),
    Rule(
        "bare weights",
        True,
        ((Q, K, V), (OUT,)),
        (("in_proj_weight", "out_proj"),),
        lambda qkv, proj: qkv[0] == 3 * proj[1],
    ),
    Rule(
        "bare weights apart",
        True,
        ((Q,), (K,), (V,), (OUT,)),
        (("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"),),
        _separate,
    ),
    Rule(  # queries come from elsewhere
        "fused keys and values",
        True,
        ((K, V), (OUT,)),
        (("qkv", "proj"),),
        lambda kv, proj: kv[0] == 2 * proj[1],
    ),
    Rule(
        "fused attention",
        True,
        ((Q, K, V), (OUT,)),
        (*_with(QKV, OUTS), *_nested(QKV)),
        _fused,
    ),
    Rule(
        "separate attention",
        True,
        ((Q,), (K,), (V,), (OUT,)),
        (*_with(SEPARATE, OUTS), *_nested(SEPARATE)),
        _separate,
    ),
    Rule("key-value attention", True, ((Q,), (K, V), (OUT,)), (("q", "kv", "proj"),), _key_value),
    Rule(
        "key-value attention, values wider",
        True,
        ((Q,), (K, V), (OUT,)),
        (("queries", "keys_values", "projection"),),
        _key_wide_value,
    ),
    Rule("query-key attention", True, ((Q, K), (V,), (OUT,)), (("qk", "v", "proj"),), _query_key),
    Rule("outlook attention", True, ((), (V,), (OUT,)), (("attn", "v", "proj"),), _outlook),
    Rule(
        "gated MLP",
        False,
        ((FC1,), (FC1,), (FC2,)),
        (
            ("gate_proj", "up_proj", "down_proj"),
            ("fc1_g", "fc1_x", "fc2"),
            ("w0", "w1", "w2"),
            ("w1", "w2", "w3"),
            ("w1", "w3", "w2"),
        ),
        _gated,
    ),
    Rule(
        "MLP",
        False,
        ((FC1,), (FC2,)),
        (
            ("fc1", "fc2"),
            ("lin1", "lin2"),
            ("linear1", "linear2"),
            ("c_fc", "c_proj"),
            ("up_proj", "down_proj"),
            ("intermediate.dense", "output.dense"),
            ("w12", "w3"),
            ("weights_in", "weights_out"),
            ("dense1", "dense2"),
            ("ln1", "ln2"),
            ("linear_up", "linear_down"),
            ("0", "2"),
            ("0", "3"),
            ("1", "3"),
        ),
        _mlp,
    ),
)

FIRST = frozenset(first for rule in RULES for _, needed in rule.ways for first in needed)


# Roles by structure: which child of an attention or an MLP is which projection.
#
# A rule looks at one module's descendants and their shapes; names only say which descendant to look
# at. A block is the nearest module that holds an attention and an MLP; what lies outside a block
# (patch embedding, heads) or beside the repeated ones (attention pooling), and an MLP inside an
# attention or of another width (relative positions), is never hit.


LATENT = ("latent", "probe")  # what a pool asks with: its own parameter, no token


@dataclass(frozen=True)
class FoundProjection:
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


def find(model: nn.Module) -> list[FoundProjection]:
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
    present = _present(module)
    for rule in RULES if present else ():
        if paths := rule.paths(module, present):
            return Match(rule, module, paths)
    return None


def _present(module: nn.Module) -> Set[str]:
    """What ``module`` has of the names that rules begin with: most modules have none."""
    if type(module).__getattr__ is not nn.Module.__getattr__:  # one that hands on what it holds
        return FIRST
    own = module._modules.keys() | module._parameters.keys() | module.__dict__.keys()
    return FIRST & own | {name for name in FIRST if hasattr(type(module), name)}


def _projections(name: str, match: Match) -> Iterator[FoundProjection]:
    kind = type(match.module).__qualname__
    for path, roles in zip(match.paths, match.rule.roles, strict=True):
        where = f"{name}.{path}" if name else path
        holder, tensor = match.module, path
        if not roles:  # there for the rule's shapes alone
            continue
        if isinstance(holder._parameters.get(path), nn.Parameter):
            yield FoundProjection(where.removesuffix("_weight"), holder, roles, tensor, kind)
        else:
            yield FoundProjection(where, holder.get_submodule(path), roles, "weight", kind)


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
