"""Which modules of a block are known, why one is left alone, and known ones swapped in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.stand_in import Unscripted, Watch, rebind
from fused_lora.ops.lora_dropout import seeded
from fused_lora.ops.operand import RECOMPUTE, Adapted, Norm, check_recompute, compute_dtype
from fused_lora.programs.run import Memo, program_of, run

F = TypeVar("F", bound="FusedModule")


class FusedModule(Unscripted, nn.Module):
    """The half of an adopted module's class that comes first; the other is the class it had.

    What this half cannot compute is left to the other's own forward.
    """

    plain: type[nn.Module]  # the class it had
    known: frozenset[str]  # classes whose forward it computes, by where they are defined

    @property
    def recompute(self) -> str:
        """What backward recomputes: "none", "elementwise" or "gemm"."""
        return self.__dict__.get("_recompute", RECOMPUTE[1])

    @recompute.setter
    def recompute(self, mode: str) -> None:
        check_recompute(mode)
        self.__dict__["_recompute"] = mode

    @classmethod
    def adopt(cls: type[F], module: nn.Module, recompute: str = RECOMPUTE[1]) -> F:
        """Turn ``module`` itself into one of these; its children, keys and hooks stay."""
        check_recompute(recompute)
        if isinstance(module, FusedModule):
            raise TypeError(f"{type(module).__name__} is fused already")
        if kind(module) not in cls.known:
            raise TypeError(f"{kind(module)} is not one of {sorted(cls.known)}")
        module.__class__ = fused_class(cls, type(module))  # type: ignore[arg-type]
        module.__dict__["_recompute"] = recompute
        return module  # type: ignore[return-value]

    def release(self) -> nn.Module:
        """Become what it was."""
        for name in ("_recompute", "_halves"):
            self.__dict__.pop(name, None)
        was = type(self)
        self.__class__ = self.plain  # type: ignore[assignment]
        rebind(self, was)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made on the fly and has no place of its own to be found at."""
        return _blank, (_root(type(self)), self.plain), self.__dict__


@lru_cache(maxsize=64)
def fused_class(root: Any, plain: Any) -> Any:
    """The class of an adopted ``plain``; ``isinstance`` goes on answering as before."""
    names = {"plain": plain, "__module__": root.__module__, "__doc__": root.__doc__}
    return type(f"FusedLoRA{plain.__name__}", (root, plain), names)


def _root(made: type[FusedModule]) -> type[FusedModule]:
    return made.__mro__[1]


def _blank(root: Any, plain: Any) -> nn.Module:
    made = fused_class(root, plain)
    return made.__new__(made)


def kind(module: nn.Module) -> str:
    """``timm.layers.mlp.Mlp``: a class by where it is defined, without importing it.

    Of a fused module it is the class that it had.
    """
    return _place(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _place(cls: Any) -> str:
    cls = cls.plain if issubclass(cls, FusedModule) else cls
    return f"{cls.__module__}.{cls.__qualname__}"


# What the modules of a block are, and in one sentence why one of them cannot be fused over.
#
# Classes are known by where they are defined: a forward that is stood in for must be one that was
# read. Everything is asked again at every call, since dropout, hooks and merged weights come and
# go.


BLOCKS = frozenset({"timm.models.vision_transformer.Block"})
ATTENTIONS = frozenset(
    {"timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"}
)
MLPS = frozenset({"timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU"})
NORMS = frozenset({"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"})
LAYER_SCALES = frozenset(
    {"timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale"}
)
DROP_PATHS = frozenset({"timm.layers.drop.DropPath"})
IDENTITY = "torch.nn.modules.linear.Identity"
ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}


def absent(module: Any) -> bool:
    """Whether there is nothing in this place."""
    return module is None or kind(module) == IDENTITY


def why_not_linear(linear: Any) -> str | None:
    """Why an adapted linear has to be called as a module."""
    if not isinstance(linear, AdaptedLinear):
        return f"{type(linear).__name__} without adapters"
    if linear.merged or not linear.adapter_enabled:
        return "merged or disabled adapters"
    if linear.config.dora:
        return "DoRA"
    if linear.config.base_dtype:
        return f"a base in {linear.config.base_dtype}"
    ours = type(linear).forward is AdaptedLinear.forward
    return None if ours else f"{type(linear).__name__}, whose forward is its own"


def why_not_norm(norm: Any) -> str | None:
    """Why a norm is no LayerNorm over the last dimension."""
    if kind(norm) not in NORMS or len(norm.normalized_shape) != 1:
        return f"norm of type {type(norm).__name__}"
    return "timm's fast norm" if getattr(norm, "_fast_norm", False) else None


def why_not_branch(scale: Any, drop: Any) -> str | None:
    """Why LayerScale and drop path are not the factors they should be."""
    if not absent(scale) and kind(scale) not in LAYER_SCALES:
        return f"layer scale of type {type(scale).__name__}"
    if not absent(scale) and scale.gamma.requires_grad:
        return "a LayerScale that trains"
    if not absent(drop) and kind(drop) not in DROP_PATHS:
        return f"drop path of type {type(drop).__name__}"
    return None


def active_dropout(*drops: Any) -> bool:
    """Whether any of these drops something now; what is no ``nn.Dropout`` might."""
    return any(
        type(drop) is not nn.Dropout or (drop.training and drop.p > 0)
        for drop in drops
        if not absent(drop)
    )


def operands(linear: AdaptedLinear) -> Adapted:
    """What the operations take of an adapted linear."""
    a, b = linear._operands()
    spans, config = linear._used, linear.config
    dropout = config.dropout if linear.training else 0.0
    return Adapted(linear.weight, linear.bias, a, b, linear.scales, spans, config.impl, dropout)


def norm_of(norm: nn.LayerNorm) -> Norm:
    """What the operations take of a LayerNorm."""
    return Norm(norm.weight, norm.bias, norm.eps)


def gamma_of(scale: Any) -> Tensor | None:
    """LayerScale's factor, if there is one."""
    return None if absent(scale) else scale.gamma


def mask_of(drop: Any, x: Tensor, gamma: Tensor | None) -> Tensor | None:
    """Drop path's factor per sample, drawn by the module itself; None where it draws nothing."""
    if absent(drop) or not drop.training or not drop.drop_prob:
        return None
    dtype = compute_dtype(x)  # what the module would see: the projection's, or LayerScale's
    dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    return drop(torch.ones((x.shape[0],) + (1,) * (x.dim() - 1), dtype=dtype, device=x.device))


def why_not_input(x: Tensor, weight: Tensor) -> str | None:
    """Why x has to go through the modules one by one."""
    if x.is_meta or x.numel() == 0:
        return "nothing to compute"
    casts = torch.is_autocast_enabled(x.device.type)
    return None if casts or x.dtype is weight.dtype else f"x in {x.dtype} and weights that are not"


NOTHING = (None,) * 5
MASK = 3  # where drop path's factor stands among the inputs of a chain


class Half(Memo):
    """Calls one half of a block; what kind of half is told by what derives from this."""

    __slots__ = ("watch",)
    weight = 6  # where the first projection's weight stands among the inputs

    def __init__(self) -> None:
        super().__init__()
        self.watch: Watch | None = None

    def __call__(self, block: Any, x: Tensor) -> Tensor:
        """y of x: by a program, by operations of which each has one, or by the modules."""
        watch = self.watch
        if watch is None or not watch.intact():
            if self.why_not(block):
                return self.by_modules(block, x)
            self.watch, self.last = Watch(self.watched(block)), NOTHING
        state, inputs, drop, held = self.gather(block, x)
        key, operation, program = self.recall(state, inputs, held)
        known = program is not None
        if not known:
            if self.why_not(block) or why_not_input(x, inputs[self.weight]):
                self.watch = None
                return self.by_modules(block, x)
            operation = self.choose(block, x)
        if operation is None:
            self.keep(key, None, "several operations")
            return self.by_parts(block, x)
        if operation.seeds:
            inputs = seeded(operation, inputs)
        if drop is not None:
            inputs[MASK] = mask_of(drop, x, inputs[2])
        if not known:
            program = program_of(operation, inputs)
            self.keep(key, operation, program)
        return run(program, operation, inputs)  # type: ignore[no-any-return]

    def watched(self, block: Any) -> Sequence[nn.Module]:
        """The modules that are stood in for."""
        raise NotImplementedError

    def why_not(self, block: Any) -> str | None:
        """One sentence why the half goes through its modules at present."""
        raise NotImplementedError

    def gather(self, block: Any, x: Tensor) -> tuple[tuple[Any, ...], list[Any], Any, bool]:
        """What beside tensors decides, the inputs of the chain, the drop path to draw from, and
        whether the inputs behind x are held by their modules."""
        raise NotImplementedError

    def choose(self, block: Any, x: Tensor) -> Any:
        """The one operation that the half is; None where it is several."""
        raise NotImplementedError

    def by_parts(self, block: Any, x: Tensor) -> Tensor:
        """By several operations."""
        raise NotImplementedError

    def by_modules(self, block: Any, x: Tensor) -> Tensor:
        """As the class of the block has it."""
        raise NotImplementedError
