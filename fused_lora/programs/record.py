"""Recording: an operation run once on tensors without data, every call it makes written down.

Fake tensors stand for the inputs: shapes, strides, dtype and device, no memory. What torch's
dispatcher is asked for under them is the flattened call, each choice made. Calls of this
project's own kernels go through ``opaque``, since a launch leaves no trace in the dispatcher.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

UNRECORDABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)


class CannotRecord(Exception):
    """An operation that no program can hold, with the reason."""


@dataclass(eq=False)
class Value:
    """A tensor of a program, by what is known of it without data."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int  # of what it shows
    storage: int  # which values share memory
    offset: int  # elements from the storage's first

    @property
    def name(self) -> str:
        """As the program's text calls it."""
        return f"v{self.index}"

    @property
    def dense(self) -> bool:
        """Whether its elements lie one behind another."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= max(size, 1)
        return True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(eq=False)
class Call:
    """One call: what is called, with which values and constants, and what comes out."""

    target: Callable[..., Any]  # an OpOverload, or what ``opaque`` was given
    args: tuple[Any, ...]  # Values in place of tensors
    kwargs: dict[str, Any]
    outs: list[Value | None]  # new ones; of a write in place, none
    single: bool  # whether it returns one tensor and no tuple
    writes: tuple[Value, ...] = ()  # those whose memory it changes
    view: bool = False  # whether its outs show memory that was there
    reads: list[Value] = field(default_factory=list)


class _Recording(threading.local):
    recorder: Recorder | None = None


_now = _Recording()


def recording() -> bool:
    """Whether a program is being recorded in this thread."""
    return _now.recorder is not None


class Recorder(TorchDispatchMode):
    """Writes down the calls made inside ``with``, under fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self._value_of: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # so that no id comes twice
        self._storages: dict[int, int] = {}
        self.starts: dict[int, int] = {}  # bytes by which inputs miss a multiple of 16
        self.launches = False  # whether a call is ``opaque``

    def __enter__(self) -> Recorder:
        self.fake.__enter__()
        super().__enter__()
        _now.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _now.recorder = None
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def input(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        start: int = 0,
    ) -> Tensor:
        """A tensor that the program will be given, ``start`` bytes past a multiple of 16."""
        recorder, _now.recorder = _now.recorder, None
        try:
            with _Silent(self):
                fake = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        finally:
            _now.recorder = recorder
        self.starts[self.value(fake).storage] = start
        return fake

    def value(self, t: Tensor) -> Value:
        """The value that stands for ``t``; a new one where it has none."""
        if found := self._value_of.get(id(t)):
            return found
        storage = t.untyped_storage()._cdata
        value = Value(
            len(self._alive),
            tuple(t.shape),
            t.stride(),
            t.dtype,
            t.numel() * t.element_size(),
            self._storages.setdefault(storage, len(self._storages)),
            int(t.storage_offset()),
        )
        self._value_of[id(t)] = value
        self._alive.append(t)
        return value

    def known(self, t: Tensor) -> Value:
        """The value of a tensor that was given or made here.

        Raises:
            CannotRecord: it comes from elsewhere.
        """
        if id(t) not in self._value_of:
            raise CannotRecord(f"a tensor {tuple(t.shape)} comes from outside the operation")
        return self._value_of[id(t)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` on fakes and write it down."""
        kwargs = kwargs or {}
        if self._silent or not any(isinstance(t, Tensor) for t in _flat([args, kwargs])):
            made = func(*args, **kwargs)
            if self._silent or not isinstance(made, Tensor):  # a question, of no tensor
                return made
            self._write(func, args, kwargs, made, (), False)
            return made
        given = self._given(args), {key: self._given(value) for key, value in kwargs.items()}
        try:
            out = func(*args, **kwargs)
        except UNRECORDABLE as error:
            raise CannotRecord(f"{func} reads a value on the host: {error}") from None
        if not any(isinstance(each, Tensor) for each in _flat([out])):
            return out  # a question, which sizes and layouts answer: there is no data to read
        schema = func._schema
        written = [
            value
            for argument, value in zip(schema.arguments, given[0], strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            given[1][a.name]
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in given[1]
        ]
        is_view = not written and any(a.alias_info is not None for a in schema.arguments)
        self._write(func, *given, out, tuple(_values(written)), is_view)
        return out

    _silent = False

    def _given(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.known(argument)
        if isinstance(argument, (list, tuple)):
            parts = [self._given(each) for each in argument]
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        if isinstance(argument, dict):
            return {key: self._given(each) for key, each in argument.items()}
        if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.Generator)):
            raise CannotRecord(f"an argument of type {type(argument).__name__}")
        return argument

    def _write(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        writes: tuple[Value, ...],
        view: bool,
    ) -> None:
        single = isinstance(out, Tensor)
        flat = [out] if single else list(out or ())
        outs = [
            self.value(t) if isinstance(t, Tensor) and id(t) not in self._value_of else None
            for t in flat
        ]
        reads = list(_values([*args, *kwargs.values()]))
        self.calls.append(Call(target, args, kwargs, outs, single, writes, view, reads))


class _Silent:
    """Inside, nothing is written down."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        self.recorder._silent = True

    def __exit__(self, *error: Any) -> None:
        self.recorder._silent = False


def _flat(arguments: Any) -> Iterator[Any]:
    """Everything among ``arguments``, however deep in tuples, lists and dicts."""
    for each in arguments:
        if isinstance(each, (tuple, list)):
            yield from _flat(each)
        elif isinstance(each, dict):
            yield from _flat(each.values())
        else:
            yield each


def _values(arguments: Any) -> Iterator[Value]:
    return (each for each in _flat(arguments) if isinstance(each, Value))


def begins_at(t: Tensor) -> int:
    """Where ``t`` begins in memory, in bytes; while a program is recorded, within 16 of them."""
    if _now.recorder is None:
        return t.data_ptr()
    value = _now.recorder.known(t)
    start = _now.recorder.starts.get(value.storage, 0)  # of what is made here, a multiple of 16
    return (start + value.offset * t.element_size()) % 16


def opaque(
    target: Callable[..., Any],
    fake: Callable[..., Any],
    *args: Any,
    writes: Sequence[Tensor] = (),
    **kwargs: Any,
) -> Any:
    """``target(*args, **kwargs)``; while a program is recorded, ``fake`` of the same and a call.

    ``fake`` gives tensors of the shapes, strides and dtypes that ``target`` will; both get
    tensors at any depth of tuples and dicts. ``writes`` are arguments that it changes in place.
    """
    recorder = _now.recorder
    if recorder is None:
        return target(*args, **kwargs)
    given = recorder._given(args), {k: recorder._given(v) for k, v in kwargs.items()}
    recorder.launches = True
    with _Silent(recorder):
        out = fake(*args, **kwargs)
    recorder._write(target, *given, out, tuple(recorder.known(t) for t in writes), False)
    return out
