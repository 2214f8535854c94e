"""Launches: of Triton's kernels now, or as calls of a program, whose launches are bound.

``kernel[grid](...)`` finds out at every call what each argument is and which compiled kernel serves
it. In a program that is settled: from the second launch on the compiled kernel is called with its
pointers alone, the rest of its arguments constants of the program.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.gemm import is_tf32
from fused_lora.programs.program import Program
from fused_lora.programs.record import Value, opaque, recording


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    args: Sequence[Any],
    constants: dict[str, Any],
    writes: Sequence[Tensor | None],
    keeps: bool | None = None,
    room: int | None = None,
) -> Any:
    """``kernel[grid](*args, **constants)`` on ``device``: the compiled kernel, if one was made now.

    While a program is recorded, one of its calls, which changes the tensors ``writes``. ``keeps``
    makes it one that ``programs/once`` may join with others of its kernel, whose arguments are
    tuples with an entry for each piece, and whose blocks are those of the pieces in turn; and says
    whether what it writes may be kept for backward. ``room`` is the first place among ``args``
    where a kernel takes those of such a launch, which its programs past its own then do.
    """
    if not recording():
        with on_device(device):
            return kernel[grid](*args, **constants)
    forms = [_form(arg) for arg in args]
    bound = BoundLaunch(kernel, grid, device, forms, constants, keeps, room)
    given = [_bare(arg) for arg in args]
    opaque(bound, _nothing, *given, writes=[t for t in writes if t is not None])
    return None


class BoundLaunch:
    """One launch of a program, called with its arguments, tuples without their names."""

    by_address = True  # strides are arguments of their own

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        forms: list[Any],
        constants: dict[str, Any],
        keeps: bool | None = None,
        room: int | None = None,
    ) -> None:
        self.kernel, self.grid, self.device = kernel, grid, device
        self.forms, self.constants, self.keeps, self.room = forms, constants, keeps, room
        self.__name__ = kernel.__name__.lstrip("_")
        self.made = [i for i, form in enumerate(forms) if _is_made(form)]
        self._bound: tuple[Any, ...] | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Launches of one kind may be one."""
        return self.kernel, self.device, tuple(self.constants.items())

    def joined(self, others: Sequence[BoundLaunch]) -> BoundLaunch:
        """One launch with the pieces of all."""
        every = [self, *others]
        grid = sum(each.grid[0] for each in every), max(each.grid[1] for each in every)
        forms: list[Any] = [
            (tuple, [piece for _, pieces in of_all for piece in pieces])
            for of_all in zip(*(each.forms for each in every), strict=True)
        ]
        return BoundLaunch(self.kernel, grid, self.device, forms, self.constants, self.keeps)

    def carrying(self, other: BoundLaunch) -> BoundLaunch | None:
        """One launch that does ``other`` too, given its arguments as well; None without room."""
        if self.room is None or self.device != other.device:
            return None
        grid = (self.grid[0] + math.prod(other.grid),)
        forms = [*self.forms]
        forms[self.room : self.room + len(other.forms)] = other.forms
        both = BoundLaunch(self.kernel, grid, self.device, forms, self.constants)
        both.__name__ = f"{self.__name__}_and_{other.__name__}"
        return both

    def __call__(self, *args: Any) -> None:
        """Launch it on the current stream."""
        if self._bound is None:
            self._first(args)
            return
        run, before, after, stream_of = self._bound
        if self.made:
            args = tuple(
                _formed(self.forms[i], arg) if i in self.made else arg for i, arg in enumerate(args)
            )
        run(*self.grid, *(1,) * (3 - len(self.grid)), stream_of(), *before, *args, *after)

    def _first(self, args: Sequence[Any]) -> None:
        named = [_formed(form, arg) for form, arg in zip(self.forms, args, strict=True)]
        with on_device(self.device):
            compiled = self.kernel[self.grid](*named, **self.constants)
        if compiled is None:  # an interpreter's
            return
        names = [param.name for param in self.kernel.params]
        after = tuple(self.constants[name] for name in names[len(args) :])
        # metadata for a profiler's hooks, and the hooks: none of them
        before = (compiled.function, compiled.packed_metadata, None, None, None)
        self._bound = (compiled.run, before, after, self._stream)

    def _stream(self) -> int:
        from triton.runtime import driver

        return driver.active.get_current_stream(self.device.index or 0)  # type: ignore[no-any-return]


class Stand(NamedTuple):
    """A tensor by what a compiler asks of it."""

    dtype: torch.dtype
    start: int  # bytes past a multiple of 16


def requests(program: Program) -> Iterator[tuple[Any, ...]]:
    """What it takes to compile each Triton launch of ``program`` in another process."""
    pairs = zip(program.inputs, (g for g in program.given if g is not None), strict=True)
    starts = {value.storage: given.start for value, given in pairs}

    def stand(arg: Any) -> Any:
        if isinstance(arg, Value):
            start = starts.get(arg.storage, 0) + arg.offset * arg.dtype.itemsize
            return Stand(arg.dtype, start % 16)
        return tuple(stand(each) for each in arg) if isinstance(arg, tuple) else arg

    for call in (*program.calls, *program.calls_back):
        bound = call.target
        if isinstance(bound, BoundLaunch):
            name = (bound.kernel.fn.__module__, bound.kernel.fn.__name__)
            args = [stand(arg) for arg in call.args]
            yield *name, str(bound.device), bound.grid, bound.forms, args, bound.constants


def compile_one(
    module: str,
    name: str,
    device: str,
    grid: tuple[int, ...],
    forms: list[Any],
    args: list[Any],
    constants: dict[str, Any],
) -> str:
    """Compile one of ``requests`` without launching it; Triton keeps it in its cache folder."""
    where = torch.device(device)

    def tensor(arg: Any) -> Any:
        if isinstance(arg, Stand):
            room = torch.empty(64, dtype=torch.uint8, device=where)
            whole = 32 // arg.dtype.itemsize * arg.dtype.itemsize
            return room[arg.start :][:whole].view(arg.dtype)
        return tuple(tensor(each) for each in arg) if isinstance(arg, tuple) else arg

    kernel = getattr(importlib.import_module(module), name)
    named = [_formed(form, tensor(arg)) for form, arg in zip(forms, args, strict=True)]
    with on_device(where):
        kernel.warmup(*named, grid=grid, **constants)
    return f"{name.lstrip('_')}"


class _Descriptor:
    """A tensor descriptor by all but its tensor."""

    def __init__(self, descriptor: Any) -> None:
        self.kind = type(descriptor)
        self.sizes = (descriptor.shape, descriptor.strides, descriptor.block_shape)

    def of(self, base: Tensor) -> Any:
        """The descriptor of ``base``."""
        return self.kind(base, *self.sizes)


class Word(NamedTuple):
    """32 bits of a seed that is known only when a program runs."""

    seed: Tensor  # int64, on the CPU
    shift: int


class _Shift:
    """A ``Word`` without its seed."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def of(self, seed: Tensor) -> int:
        """The number that a kernel is handed."""
        return disguised(int(seed) >> self.bits)


def disguised(word: int) -> int:
    """32 bits as an odd int64, for which no value makes Triton compile a kernel anew."""
    return (1 << 40) + 2 * (word & 0xFFFFFFFF) + 1


def _form(arg: Any) -> Any:
    """What a bare argument lacks: names of tuples, sizes of descriptors, which word of a seed."""
    if type(arg).__name__ == "TensorDescriptor":
        return _Descriptor(arg)
    if isinstance(arg, Word):
        return _Shift(arg.shift)
    if isinstance(arg, tuple):
        return type(arg), [_form(each) for each in arg]
    return None


def _bare(arg: Any) -> Any:
    if type(arg).__name__ == "TensorDescriptor":
        return arg.base
    if isinstance(arg, Word):
        return arg.seed
    return tuple(_bare(each) for each in arg) if isinstance(arg, tuple) else arg


def _formed(form: Any, arg: Any) -> Any:
    if form is None:
        return arg
    if isinstance(form, (_Descriptor, _Shift)):
        return form.of(arg)
    kind, forms = form
    parts = [_formed(each, part) for each, part in zip(forms, arg, strict=True)]
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)


def _is_made(form: Any) -> bool:
    """Whether an argument of this form is made of its bare one at every launch."""
    if isinstance(form, tuple):
        return any(map(_is_made, form[1]))
    return form is not None


def _nothing(*args: Any) -> None:
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside go to ``device``; tensors of Triton's interpreter are on no device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def input_precision(dtype: torch.dtype) -> str:
    """``tf32`` only for fp32 products that torch may form so; narrower types are exact."""
    return "tf32" if is_tf32(dtype) else "ieee"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of ``device``; a small chip's for what is only interpreted or compiled."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; 80, the least, for what is only interpreted."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def words(noise: tuple[int, int] | None) -> tuple[int, ...]:
    """Seed and step as two 32-bit words each, low first, signed: an int32 whatever the bits."""
    seed, step = noise or (0, 0)
    halves = (seed, seed >> 32, step, step >> 32)
    return tuple((half + (1 << 31)) % (1 << 32) - (1 << 31) for half in halves)
