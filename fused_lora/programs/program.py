"""A program: one operation on inputs of one signature, forward and backward, every choice made.

    build    the operation runs once on tensors without data (``record``); forward and backward
             are cut apart, what the one hands to the other is what the other reads
    run      one autograd node; between it and the kernels stands no decision

A program holds no tensor, so all blocks of a model share it. What backward reads of the inputs is
saved as it was given: views of it are taken again, so that torch sees a write in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_lora.programs import emit, once
from fused_lora.programs.record import Call, CannotRecord, Recorder, Value

Saved = tuple[Sequence[Any], Any]  # tensors for backward, or None, and what else it must know


class Operation(Protocol):
    """What can become a program: hashable, no tensor in it, its backward written out."""

    def forward(self, inputs: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Any, Saved]:
        """Its results, one tensor or a tuple, and what ``backward`` is given."""

    def backward(
        self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """A gradient for each input, or None; never asked of what only runs without gradients."""


class WithoutBackward:
    """The base of operations that are parts of others' autograd nodes."""

    def backward(self, saved: Saved, grads: Sequence[Any], needs: tuple[bool, ...]) -> Any:
        """There is none."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class InputSpec:
    """What is known of an input beside its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trains: bool
    start: int = 0  # bytes past a multiple of 16, where kernels read by address

    @classmethod
    def of(cls, t: Tensor, grad: bool) -> InputSpec:
        """Of one tensor; ``grad``: whether gradients are recorded."""
        start = t.data_ptr() % 16 if t.is_cuda else 0
        trains = grad and t.requires_grad
        return cls(tuple(t.shape), t.stride(), t.dtype, t.device, trains, start)


@dataclass(eq=False)
class Program:
    """A straight line forward, what is saved, a straight line backward."""

    operation: Operation
    given: tuple[InputSpec | None, ...]
    calls: list[Call]  # forward
    calls_back: list[Call]
    saved: list[Value]
    inputs: list[Value]
    present: list[int]  # which of the operation's inputs are there; the functions take no others
    outputs: list[Value]
    single: bool  # whether it gives one tensor and no tuple
    text: str  # of both functions
    launches: bool  # whether it runs kernels of this project, which dispatch modes do not see
    device: torch.device
    forward: Any = field(repr=False)
    backward: Any = field(repr=False)

    @property
    def trains(self) -> bool:
        """Whether it has a backward."""
        return self.backward is not None


def build(operation: Operation, given: Sequence[InputSpec | None]) -> Program:
    """The program of ``operation`` on inputs as ``given``.

    Raises:
        CannotRecord: it has a call that no program can hold.
    """
    needs = tuple(each is not None and each.trains for each in given)
    with torch.no_grad(), Recorder() as recorder:
        fakes = [
            None if g is None else recorder.input(g.shape, g.stride, g.dtype, g.device, g.start)
            for g in given
        ]
        inputs = [recorder.value(fake) for fake in fakes if fake is not None]
        result, saved = operation.forward(fakes, needs)
        results = [result] if isinstance(result, Tensor) else list(result)
        outputs = [recorder.known(t) for t in results]
        cut = len(recorder.calls)
        _check(recorder.calls, inputs, outputs)
        if not any(needs):
            return _forward_only(operation, given, recorder, inputs, outputs, result)
        dys = [recorder.input(t.shape, _dense(t.shape), t.dtype, t.device) for t in results]
        grads = operation.backward(saved, dys, needs)
        found = [
            recorder.known(grad) if need and grad is not None else None
            for grad, need, each in zip(grads, needs, given, strict=True)
            if each is not None
        ]
        _check(recorder.calls, [*inputs, *map(recorder.value, dys)], [])
    calls = recorder.calls
    return _both(
        operation,
        tuple(given),
        (calls[:cut], calls[cut:]),
        (inputs, outputs, [recorder.value(dy) for dy in dys], found),
        isinstance(result, Tensor),
        recorder.launches,
    )


def _forward_only(
    operation: Operation,
    given: Sequence[InputSpec | None],
    recorder: Recorder,
    inputs: list[Value],
    outputs: list[Value],
    result: Any,
) -> Program:
    single, names = isinstance(result, Tensor), emit.Names()
    calls, stands = emit.merged_views(once.shared(recorder.calls, [], inputs).ahead, outputs)
    outputs = [stands.get(value, value) for value in outputs]
    returned = _tuple(outputs) if not single else outputs[0].name
    text = emit.function("forward", calls, inputs, returned, outputs, names)
    forward = _compiled(text, names)["forward"]
    present = [i for i, each in enumerate(given) if each is not None]
    ends = (inputs, present, outputs, single)
    where = (recorder.launches, _device(given))
    return Program(operation, tuple(given), calls, [], [], *ends, text, *where, forward, None)


def _device(given: Sequence[InputSpec | None]) -> torch.device:
    return next(each for each in given if each is not None).device


def _both(
    operation: Operation,
    given: tuple[InputSpec | None, ...],
    calls: tuple[list[Call], list[Call]],
    ends: tuple[list[Value], list[Value], list[Value], list[Value | None]],
    single: bool,
    launches: bool,
) -> Program:
    (ahead, back), (inputs, outputs, dys, grads) = calls, ends
    names = emit.Names()
    wanted = [grad for grad in grads if grad is not None]
    ahead, back, watched = once.shared(ahead, emit.needed(back, wanted), inputs)
    back = emit.needed(back, wanted)
    back = [*_views_of_inputs(ahead, inputs), *back]
    back, stands = emit.merged_views(back, wanted)
    grads = [None if grad is None else stands.get(grad, grad) for grad in grads]
    wanted = [grad for grad in grads if grad is not None]
    made = {id(out) for call in back for out in call.outs} | {id(dy) for dy in dys}
    reads = [value for call in back for value in call.reads] + wanted + watched
    saved = list(dict.fromkeys(value for value in reads if id(value) not in made))
    forward, stands = emit.merged_views(ahead, [*outputs, *saved])
    saved_here = [stands.get(value, value) for value in saved]
    outputs = [stands.get(value, value) for value in outputs]
    returned = f"{outputs[0].name if single else _tuple(outputs)}, {_tuple(saved_here)}"
    text = emit.function("forward", forward, inputs, returned, [*outputs, *saved_here], names)
    # the node's own argument, the program, gets no gradient
    gives = ", ".join(["None", *("None" if grad is None else grad.name for grad in grads)])
    text += "\n\n" + emit.function("backward", back, dys, gives, wanted, names, [("saved", saved)])
    built = _compiled(text, names)
    return Program(
        operation,
        given,
        forward,
        back,
        saved_here,
        inputs,
        [i for i, each in enumerate(given) if each is not None],
        outputs,
        single,
        text,
        launches,
        _device(given),
        built["forward"],
        built["backward"],
    )


def _check(calls: Sequence[Call], inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
    """Raises CannotRecord where an input is changed, or handed out as a result."""
    storages = {value.storage for value in inputs}
    for call in calls:
        if any(value.storage in storages for value in call.writes):
            raise CannotRecord(f"{call.target} writes to an input")
    if any(value.storage in storages for value in outputs):
        raise CannotRecord("a result is an input")


def _views_of_inputs(calls: Sequence[Call], inputs: Sequence[Value]) -> list[Call]:
    """The calls that take views of inputs, and views of those."""
    of_inputs = {id(value) for value in inputs}
    found = []
    for call in calls:
        if call.view and all(id(value) in of_inputs for value in call.reads):
            found.append(call)
            of_inputs |= {id(out) for out in call.outs}
    return found


def _compiled(text: str, names: emit.Names) -> dict[str, Any]:
    scope = dict(names.globals)
    exec(compile(text, "<fused_lora program>", "exec"), scope)
    return scope


def _tuple(values: Sequence[Value]) -> str:
    return f"({', '.join(value.name for value in values)}{',' * (len(values) == 1)})"


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
