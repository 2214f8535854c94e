"""Running: from the inputs of a call to its program, and through one autograd node.

A call's signature is what its inputs are beside their numbers, and the few settings of torch that
change what is right. ``Memo`` remembers, for one place that calls, the last signature and its
program; behind it stands one bounded cache for all. A miss builds, under a lock; inside a capture
or a trace, and for what no program can hold, the operation runs as it is written, ``Interpreted``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from fused_lora import env
from fused_lora.programs.program import Given, Operation, Program, build
from fused_lora.programs.record import CannotRecord, recording

MOST = 1024  # programs kept
PLAIN = (Tensor, torch.nn.Parameter)

_BELOW = DispatchKeySet(DispatchKey.ADInplaceOrView)
for _key in (
    DispatchKey.AutogradCPU,
    DispatchKey.AutogradCUDA,
    DispatchKey.AutocastCPU,
    DispatchKey.AutocastCUDA,
):
    _BELOW = _BELOW | DispatchKeySet(_key)
_straight = torch._C._ExcludeDispatchKeyGuard  # no autograd, no autocast: both are settled

_programs: dict[Any, Program | str] = {}
_lock = threading.Lock()


class Memo:
    """The last signature seen at one place that calls, with its operation and its program."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: tuple[Any, Any, Any] = (None, None, None)  # one assignment: threads may share it

    def __reduce__(self) -> Any:  # a copy decides for itself
        return type(self), ()


def settings(kind: str) -> tuple[Any, ...]:
    """What of torch's state, on devices of ``kind``, decides which calls are right."""
    grad = torch.is_grad_enabled()
    if kind == "meta":
        return (grad,)
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind != "cuda":
        return grad, casts, torch.get_num_threads(), *_attention()
    return grad, casts, torch.backends.cuda.matmul.fp32_precision, *_attention()


def _attention() -> tuple[bool, ...]:
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def signature(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What ``inputs`` are beside their numbers, under torch's present settings; x comes first."""
    return (
        *settings(inputs[0].device.type),
        *[
            t
            if t is None
            else (t.__class__, t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
            for t in inputs
        ],
    )


def call(operation: Operation, inputs: Sequence[Any]) -> Any:
    """``operation`` on ``inputs``, by its program."""
    return run(program_of(operation, inputs), operation, inputs)


def program_of(operation: Operation, inputs: Sequence[Any]) -> Program | str:
    """The program of ``operation`` on such inputs, or a sentence why there is none."""
    key = (operation, *signature(inputs))
    return _programs.get(key) or find(key, operation, inputs)


def run(program: Any, operation: Operation, inputs: Sequence[Any]) -> Any:
    """``inputs`` through ``program``; through the operation itself where there is none."""
    if program.__class__ is str:
        return interpret(operation, inputs)
    if program.backward is not None:
        return apply(program, *inputs)
    with _straight(_BELOW):
        return program.forward(*inputs)


def find(key: Any, operation: Operation, inputs: Sequence[Any]) -> Program | str:
    """The program of a signature seen for the first time, or a sentence why there is none."""
    if reason := why_not(inputs):
        return reason
    with _lock:
        if found := _programs.get(key):
            return found
        grad = torch.is_grad_enabled()
        given = [None if t is None else Given.of(t, grad) for t in inputs]
        try:
            with without_autocast(inputs[0].device):
                found = build(operation, given)
        except CannotRecord as error:
            found = str(error)
        while len(_programs) >= MOST:
            _programs.pop(next(iter(_programs)))
        _programs[key] = found
        return found


def why_not(inputs: Sequence[Any]) -> str | None:
    """One sentence why no program is built at this moment; None when one may be."""
    if recording():
        return "a program is being recorded"
    if not env.flag("FUSED_LORA_PROGRAMS", default=True):
        return "FUSED_LORA_PROGRAMS is off"
    if any(t is not None and t.__class__ not in PLAIN for t in inputs):
        kinds = {type(t).__name__ for t in inputs if t is not None}
        return f"inputs of {', '.join(sorted(kinds))}"
    if any(t is not None and t.is_meta for t in inputs):
        return "tensors without data"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode watches"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def programs() -> list[Program]:
    """Those that are kept."""
    return [found for found in _programs.values() if isinstance(found, Program)]


def forget() -> None:
    """Drop all programs; those at work are finished."""
    with _lock:
        _programs.clear()


class LoRAProgram(torch.autograd.Function):
    """The node of every program."""

    @staticmethod
    def forward(ctx: Any, program: Program, *inputs: Any) -> Any:
        """What the program gives."""
        with _straight(_BELOW):
            result, saved = program.forward(*inputs)
        ctx.program = program
        ctx.save_for_backward(*saved)
        if not program.single:
            ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        """Its gradients."""
        refuse_double_backward()
        program, saved = ctx.program, ctx.saved_tensors
        with _straight(_BELOW):
            if program.single:
                (dy,) = dys
                return program.backward(dy if dy.is_contiguous() else dy.contiguous(), saved)
            whole = zeros_for(dys, [out.shape for out in program.outputs])
            grads = program.backward(*whole, saved)
        return without_unused(program.operation, grads, dys)


def zeros_for(dys: Sequence[Any], shapes: Sequence[Any]) -> list[Tensor]:
    """The gradients of all outputs, contiguous; zeros for those that nobody used."""
    like = next(dy for dy in dys if dy is not None)
    return [
        like.new_zeros(shape) if dy is None else dy.contiguous()
        for dy, shape in zip(dys, shapes, strict=True)
    ]


def without_unused(operation: Any, grads: Sequence[Any], dys: Sequence[Any]) -> tuple[Any, ...]:
    """None for what trains by outputs alone that nobody used; the node's own argument is first."""
    kept = list(grads)
    for i, dy in enumerate(dys):
        if dy is None:
            part = operation.of_output(i)
            kept[1 + part.start : 1 + part.stop] = [None] * (part.stop - part.start)
    return tuple(kept)


apply = LoRAProgram.apply


def interpret(operation: Operation, inputs: Sequence[Any]) -> Any:
    """``operation`` as it is written, without a program."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return Interpreted.apply(operation, *inputs)
    with without_autocast(next(t for t in inputs if t is not None).device):
        return operation.forward(inputs, (False,) * len(inputs))[0]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, operations run in their operands' dtype, as they were cast when autocast applied."""
    kind = device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def refuse_double_backward() -> None:
    """Raises RuntimeError where backward is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lora_linear: double backward is not supported (backward ran with "
            "create_graph=True); compute higher derivatives on an unpatched model"
        )


class Interpreted(torch.autograd.Function):
    """The node of an operation that runs as it is written."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, *inputs: Any) -> Any:
        """What the operation gives."""
        needs = ctx.needs_input_grad[1:]
        ctx.device = next(t for t in inputs if t is not None).device
        with without_autocast(ctx.device):
            result, (tensors, note) = operation.forward(inputs, needs)
        ctx.meta = operation, needs, note
        ctx.save_for_backward(*tensors)
        if not isinstance(result, Tensor):
            ctx.set_materialize_grads(False)
            ctx.shapes = [t.shape for t in result]
        return result

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        """Its gradients, where asked for."""
        refuse_double_backward()
        operation, needs, note = ctx.meta
        several = len(dys) > 1
        with without_autocast(ctx.device):
            given = zeros_for(dys, ctx.shapes) if several else dys
            grads = operation.backward((ctx.saved_tensors, note), given, needs)
        asked = [None, *(g if need else None for g, need in zip(grads, needs, strict=True))]
        return without_unused(operation, asked, dys) if several else tuple(asked)
