"""A module of a known class becomes a fused one in place, and back: same object, same children."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

from torch import nn

from fused_lora.nn.graph_tools import Unscripted
from fused_lora.nn.stand_in import rebind
from fused_lora.ops.operand import RECOMPUTE, check_recompute

F = TypeVar("F", bound="Fused")


class Fused(Unscripted, nn.Module):
    """The half of an adopted module's class that comes first; the other is the class it had.

    What this half cannot compute is left to the other's own forward.
    """

    plain: type[nn.Module]  # the class it had
    known: frozenset[str]  # classes whose forward it computes, by where they are defined

    @property
    def recompute(self) -> str:
        """What backward makes again: "none", "elementwise" or "gemm"."""
        return self.__dict__.get("_recompute", RECOMPUTE[1])

    @recompute.setter
    def recompute(self, mode: str) -> None:
        check_recompute(mode)
        self.__dict__["_recompute"] = mode

    @classmethod
    def adopt(cls: type[F], module: nn.Module, recompute: str = RECOMPUTE[1]) -> F:
        """Turn ``module`` itself into one of these; its children, keys and hooks stay."""
        check_recompute(recompute)
        if isinstance(module, Fused):
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


def _root(made: type[Fused]) -> type[Fused]:
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
    cls = cls.plain if issubclass(cls, Fused) else cls
    return f"{cls.__module__}.{cls.__qualname__}"
