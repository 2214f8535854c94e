"""What can be timed: methods, and the suites they are timed in."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:  # they import this file
    from fused_lora.bench.shapes import Grid
    from fused_lora.bench.workload import Workload

_T = TypeVar("_T")
Form = str  # "separate": three adapters on a fused qkv; "joint": one; "none": no adapters


class Method:
    """One way to put a trainable low-rank path beside frozen projections.

    Attributes:
        name: What rows and the command line call it.
        title: What a reader calls it.
        form: How many adapters it puts on a fused qkv projection.
        owns_weights: True when it trains the base weights and so needs its own copy.
        dtypes: The precisions it differs in; empty means all.
        ours: True where it is this library that adapts.
    """

    name: str
    title: str
    form: Form = "separate"
    owns_weights: bool = False
    dtypes: tuple[str, ...] = ()
    ours: bool = False

    def why_not(self, dtype: str) -> str | None:
        """Why it cannot run in ``dtype`` here, in one sentence; None when it can."""
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.title} is timed in {' and '.join(self.dtypes)}, not in {dtype}"
        return None

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Adapt ``model`` in place and return the module to call."""
        raise NotImplementedError(self.name)


class Registry(dict[str, _T]):
    """Things by name, each added by one decorator."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def pick(self, names: Iterable[str]) -> list[_T]:
        """The entries called ``names``.

        Raises:
            ValueError: one of them is not registered.
        """
        names = list(names)
        for name in names:
            if name not in self:
                raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self)}")
        return [self[name] for name in names]


METHODS: Registry[Method] = Registry("method")
SUITES: Registry[Callable[..., Workload]] = Registry("suite")
# Suites that time no methods and run by themselves.
JOBS: Registry[Callable[[argparse.Namespace, Grid], int]] = Registry("job")

_C = TypeVar("_C", bound=type[Method])
_S = TypeVar("_S", bound=Callable[..., Any])


def register(method: _C) -> _C:
    """Class decorator: make one instance of ``method`` known under its name."""
    METHODS[method.name] = method()
    return method


def job(name: str) -> Callable[[_S], _S]:
    """Decorator: make a function of (options, grid), which returns an exit status, known."""

    def keep(function: _S) -> _S:
        JOBS[name] = function
        return function

    return keep


def suite(name: str) -> Callable[[_S], _S]:
    """Decorator: make a workload factory known under ``name``."""

    def keep(factory: _S) -> _S:
        SUITES[name] = factory
        return factory

    return keep
