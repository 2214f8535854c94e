"""Running: from the inputs of a call to its program, and through one autograd node.

A call's signature is what its inputs are beside their numbers, and the few settings of torch that
change what is right. ``Memo`` remembers, for one place that calls, the last signature and its
program; behind it stands one bounded cache for all. A miss builds, under a lock; inside a capture
or a trace, and for what no program can hold, the operation runs as it is written, ``Interpreted``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _get_tracing_state,
)
from torch.autograd import forward_ad

from fused_lora import env
from fused_lora.programs.program import InputSpec, Operation, Program, build
from fused_lora.programs.record import CannotRecord, recording

MOST = 1024  # programs kept
SIZES = 24  # of one operation that have a program at once; of more, those seen often
OFTEN = 40  # sightings: three steps of a dozen blocks
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
_sizes: dict[Any, dict[Any, int]] = {}  # by operation, how often x came in which size
_lock = threading.Lock()
_looked_at: dict[Any, Program] | None = None  # by signature, while somebody is looking


_address = Tensor.data_ptr
_trains = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Later(str):
    """Why there is no program at this moment: nothing to remember."""

    __slots__ = ()


class Memo:
    """The last call at one place, by what decided it, with its operation and its program.

    Its tensors are first compared as objects, by address and by whether they train: nothing else
    can have changed of a parameter that is the same in these. Where they differ, as under FSDP,
    sizes and types are compared.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        # quick key, full key, operation, program, and the tensors whose ids are in the first;
        # one assignment, since threads may share it
        self.last: tuple[Any, ...] = (None,) * 5

    def __reduce__(self) -> Any:  # a copy decides for itself
        return type(self), ()

    def recall(self, state: Any, inputs: Sequence[Any], held: bool) -> tuple[Any, Any, Any]:
        """The key of this call, the operation and the program of the last one if it had that key.

        Args:
            state: what beside the tensors decides.
            inputs: x and the others, None where there is none.
            held: whether the others are held by their module, so that they may be held here.
        """
        x, *rest = [t for t in inputs if t is not None]
        device = x.device
        kind = device.type
        now = settings(kind)
        start = x.data_ptr() % 16 if kind == "cuda" else 0
        facts = (x.__class__, x.shape, x.stride(), x.dtype, device, x.requires_grad, start)
        quick = None
        last = self.last
        if held:
            try:
                ids, places = [*map(id, rest)], [*map(_address, rest)]
            except RuntimeError:  # a tensor without an address, such as one sharded over devices
                held = False
            else:
                quick = (state, now, facts, ids, places, [*map(_trains, rest)])
                if quick == last[0]:
                    return last[1], last[2], last[3]
        full = (state, now, facts, described(inputs))
        if full != last[1]:
            return full, None, None
        self.last = (quick, *last[1:4], rest if held else None)
        return last[1:4]  # type: ignore[return-value]

    def keep(self, key: Any, operation: Any, program: Any) -> None:
        """From now on calls with this key are of this operation and program."""
        if program.__class__ is Later:
            return
        self.last = (None, key, operation, program, None)


def settings(kind: str) -> tuple[Any, ...]:
    """What of torch's state, on devices of ``kind``, decides which calls are right."""
    grad = torch.is_grad_enabled()
    if kind == "meta":
        return (grad,)
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind != "cuda":
        return grad, casts, torch.get_num_threads()
    return grad, casts, torch.backends.cuda.matmul.fp32_precision


def attention_settings() -> tuple[bool, ...]:
    """What decides which of torch's attentions is right."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def described(inputs: Sequence[Any]) -> list[Any]:
    """What ``inputs`` are beside their numbers."""
    return [
        t
        if t is None
        else (t.__class__, t.shape, t.stride(), t.dtype, t.device, t.requires_grad, start_of(t))
        for t in inputs
    ]


def start_of(t: Tensor) -> int:
    """Bytes past a multiple of 16 at which ``t`` begins, where kernels may read it by address."""
    return t.data_ptr() % 16 if t.is_cuda else 0


def call(operation: Operation, inputs: Sequence[Any]) -> Any:
    """``operation`` on ``inputs``, by its program."""
    return run(program_of(operation, inputs), operation, inputs)


def program_of(operation: Operation, inputs: Sequence[Any]) -> Program | str:
    """The program of ``operation`` on such inputs, or a sentence why there is none."""
    key = (operation, settings(inputs[0].device.type), tuple(described(inputs)))
    return _programs.get(key) or find(key, operation, inputs)


def run(program: Any, operation: Operation, inputs: Sequence[Any]) -> Any:
    """``inputs`` through ``program``; through the operation itself where there is none."""
    if program.__class__ is not Program:
        return interpret(operation, inputs)
    present = [t for t in inputs if t is not None]
    if program.launches:
        return _launching(program, operation, inputs, present)
    if program.backward is not None:
        return apply(program, *present)
    with _straight(_BELOW):
        return program.forward(*present)


def _launching(
    program: Program, operation: Operation, inputs: Sequence[Any], present: Sequence[Tensor]
) -> Any:
    """As ``run``, where kernels of this project go to the current device, unseen by any mode."""
    if torch._C._len_torch_dispatch_stack():
        return interpret(operation, inputs)
    with on_device(program.device):
        if program.backward is not None:
            return apply(program, *present)
        with _straight(_BELOW):
            return program.forward(*present)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, ``device`` is the current one, if it is one of CUDA's."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def find(key: Any, operation: Operation, inputs: Sequence[Any]) -> Program | str:
    """The program of a signature seen for the first time, or a sentence why there is none."""
    if reason := why_not(inputs):
        return Later(reason)
    with _lock:
        if found := _programs.get(key):
            return found
        if _looked_at is not None:
            return _look(_looked_at, key, operation, inputs)
        if reason := _of_many_sizes(key):
            return Later(reason)
        found = _built(operation, inputs)
        while len(_programs) >= MOST:
            _programs.pop(next(iter(_programs)))
        _programs[key] = found
        return found


def _built(operation: Operation, inputs: Sequence[Any]) -> Program | str:
    grad = torch.is_grad_enabled()
    given = [None if t is None else InputSpec.of(t, grad) for t in inputs]
    try:
        with without_autocast(inputs[0].device):
            return build(operation, given)
    except CannotRecord as error:
        return str(error)


@contextmanager
def looking() -> Iterator[dict[Any, Program]]:
    """Inside, programs are built to be looked at and are not kept; operations run as written."""
    global _looked_at
    _looked_at, before = {}, _looked_at
    try:
        yield _looked_at
    finally:
        _looked_at = before


def _look(seen: dict[Any, Program], key: Any, operation: Operation, inputs: Sequence[Any]) -> Later:
    if key not in seen and isinstance(found := _built(operation, inputs), Program):
        seen[key] = found
    return Later("programs are being looked at")


def _of_many_sizes(key: Any) -> str | None:
    """Why a program of one more size of x is not worth its building: it may never come again."""
    operation, settings, (x, *others) = key
    family = (type(operation), settings, x[3:], *others)
    sizes = _sizes.setdefault(family, {})
    sizes[x[1]] = sizes.get(x[1], 0) + 1
    if len(sizes) > SIZES and sizes[x[1]] < OFTEN:
        return f"x came in {len(sizes)} sizes, and not yet {OFTEN} times in this one"
    if len(_sizes) > MOST:
        _sizes.clear()
    return None


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
        _sizes.clear()


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
                if not dy.is_contiguous() or start_of(dy):
                    dy = dy.clone(memory_format=torch.contiguous_format)
                return program.backward(dy, saved)
            if all(dy is None for dy in dys):
                return (None,) * (1 + len(program.present))
            whole = zeros_for(dys, [out.shape for out in program.outputs])
            grads = program.backward(*whole, saved)
        return without_unused(program.operation, grads, dys, program.present)


def zeros_for(dys: Sequence[Any], shapes: Sequence[Any]) -> list[Tensor]:
    """The gradients of all outputs, contiguous; zeros for those that nobody used."""
    like = next(dy for dy in dys if dy is not None)
    return [
        like.new_zeros(shape) if dy is None else dy.contiguous()
        for dy, shape in zip(dys, shapes, strict=True)
    ]


def without_unused(
    operation: Any, grads: Sequence[Any], dys: Sequence[Any], present: Sequence[int]
) -> tuple[Any, ...]:
    """None for what trains by outputs alone that nobody used.

    ``grads`` are first of the node's own argument, then of the inputs at ``present``.
    """
    unused = [operation.of_output(i) for i, dy in enumerate(dys) if dy is None]
    drops = {place for part in unused for place in range(part.start, part.stop)}
    own = (None if at in drops else grad for at, grad in zip(present, grads[1:], strict=True))
    return None, *own


apply = LoRAProgram.apply


def interpret(operation: Operation, inputs: Sequence[Any]) -> Any:
    """``operation`` as it is written, without a program."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return Interpreted.apply(operation, *inputs)
    with without_autocast(next(t for t in inputs if t is not None).device):
        return operation.forward(inputs, (False,) * len(inputs))[0]


def transformed() -> bool:
    """Whether a transform of torch's is watching the operations of this thread."""
    return (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


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
        if all(dy is None for dy in dys):
            return (None,) * (1 + len(needs))
        with without_autocast(ctx.device):
            given = zeros_for(dys, ctx.shapes) if several else dys
            grads = operation.backward((ctx.saved_tensors, note), given, needs)
        asked = [None, *(g if need else None for g, need in zip(grads, needs, strict=True))]
        places = range(len(needs))
        return without_unused(operation, asked, dys, places) if several else tuple(asked)
