"""From recorded calls to a Python function: a straight line, freed as it goes.

Calls that nobody reads are dropped, views that were taken twice are taken once, and each of torch's
operations goes by its shortest road: the binding of ``torch`` rather than the overload's, and one
``linear`` for a transposed view and a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_lora.programs.record import Call, Value

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)
_direct = torch._C._VariableFunctions


@dataclass
class Line:
    """One line of a program: its text, the values it reads and those it makes."""

    text: str
    reads: list[Value]
    call: Call


class Names:
    """What a program's text calls by name: functions, dtypes, devices."""

    def __init__(self) -> None:
        self.globals: dict[str, Any] = {}
        self._of: dict[int, str] = {}

    def of(self, thing: Any, name: str) -> str:
        """The name under which the text finds ``thing``."""
        if id(thing) not in self._of:
            base = "".join(c if c.isalnum() else "_" for c in name)
            while base in self.globals:
                base += "_"
            self.globals[base] = thing
            self._of[id(thing)] = base
        return self._of[id(thing)]

    def text(self, argument: Any) -> str:
        """``argument`` as it is written."""
        if isinstance(argument, Value):
            return argument.name
        if argument is None or isinstance(argument, (bool, int, str)):
            return repr(argument)
        if isinstance(argument, float):
            return (
                repr(argument)
                if argument == argument and abs(argument) != float("inf")
                else (f"float({str(argument)!r})")
            )
        if type(argument) in (tuple, list):
            inside = ", ".join(self.text(each) for each in argument)
            return f"({inside}{',' * (len(argument) == 1)})"
        if isinstance(argument, dict):
            inside = ", ".join(f"{key!r}: {self.text(each)}" for key, each in argument.items())
            return f"{{{inside}}}"
        if isinstance(argument, tuple):  # a named one
            kind = self.of(type(argument), type(argument).__name__)
            return f"{kind}({', '.join(self.text(each) for each in argument)})"
        return self.of(argument, str(argument).rpartition(".")[2] or "constant")


def needed(calls: Sequence[Call], wanted: Iterable[Value]) -> list[Call]:
    """Those of ``calls`` that ``wanted`` depend on, writes in place included."""
    values = {id(value) for value in wanted}
    storages = {value.storage for value in wanted}
    kept: list[Call] = []
    for call in reversed(calls):
        made = any(out is not None and id(out) in values for out in call.outs)
        wrote = any(value.storage in storages for value in call.writes)
        if made or wrote:
            kept.append(call)
            values |= {id(value) for value in call.reads}
            storages |= {value.storage for value in call.reads}
    return kept[::-1]


def merged_views(
    calls: Sequence[Call], wanted: Sequence[Value]
) -> tuple[list[Call], dict[Value, Value]]:
    """The calls that ``wanted`` depend on, ``fused``, no memory viewed the same way twice; and
    which value stands for which.

    A launch ``by_address`` has strides of its own: it takes whatever begins where a view does and
    shows as much, and the view is not made for it; nor for ``new_empty``, which reads a dtype.
    """
    calls = needed(calls, wanted)
    stands: dict[Value, Value] = {}
    shown: dict[Any, Value] = {}  # the first value that shows this memory so
    begins: dict[Any, Value] = {}  # the first value that begins there and shows as much
    viewed: dict[Value, Value] = {}  # by plain ``view``: of what, laid out without gaps
    kept = []
    for call in calls:
        call = replaced(call, stands)
        for value in (*call.reads, *(out for out in call.outs if out is not None)):
            same = shown.setdefault(shows(value), value)
            if same is not value and value in call.outs:
                stands[value] = same
            begins.setdefault(_begin(value), value)
        if call.target is aten.new_empty.default or getattr(call.target, "by_address", False):
            call = replaced(call, {value: begins[_begin(value)] for value in call.reads})
        if call.view and all(out is None or out in stands for out in call.outs):
            continue
        if call.target in VIEWS and not call.kwargs:
            source, size = call.args
            source = viewed.get(source, source)
            if source.dense:
                call = replace(call, args=(source, size), reads=[source])
                viewed[call.outs[0]] = source  # type: ignore[index]
        kept.append(call)
    return fused(kept, [stands.get(value, value) for value in wanted]), stands


def _begin(value: Value) -> tuple[Any, ...]:
    return value.storage, value.offset, value.nbytes, value.dtype


def shows(value: Value) -> tuple[Any, ...]:
    """Which memory it shows, and how."""
    return value.storage, value.offset, value.shape, value.stride, value.dtype


def replaced(call: Call, stands: dict[Value, Value]) -> Call:
    """``call`` with the values that stand for its own."""
    if not any(value in stands for value in call.reads):
        return call

    def other(argument: Any) -> Any:
        if isinstance(argument, Value):
            return stands.get(argument, argument)
        if type(argument) in (tuple, list):
            return tuple(other(each) for each in argument)
        if isinstance(argument, tuple):
            return type(argument)(*(other(each) for each in argument))
        if isinstance(argument, dict):
            return {key: other(each) for key, each in argument.items()}
        return argument

    return Call(
        call.target,
        tuple(other(each) for each in call.args),
        {key: other(each) for key, each in call.kwargs.items()},
        call.outs,
        call.single,
        tuple(stands.get(value, value) for value in call.writes),
        call.view,
        [stands.get(value, value) for value in call.reads],
    )


def function(
    name: str,
    calls: Sequence[Call],
    given: Sequence[Value],
    returned: str,
    wanted: Sequence[Value],
    names: Names,
    unpacked: Sequence[tuple[str, Sequence[Value | None]]] = (),
) -> str:
    """The text of ``def name(given)``: the calls in order, each value let go after its last use.

    ``unpacked`` are arguments that arrive as tuples, each with the values it holds.
    """
    lines = [line(call, names) for call in calls]
    last: dict[Value, int] = {}
    for i, each in enumerate(lines):
        for value in each.reads:
            last[value] = i
        for out in each.call.outs:
            if out is not None:
                last.setdefault(out, i)
    keep = {id(value) for value in wanted}
    ends: dict[int, list[str]] = {}
    for value, i in last.items():
        if id(value) not in keep:
            ends.setdefault(i, []).append(value.name)
    heads = [value.name for value in given] + [argument for argument, _ in unpacked]
    body = [f"def {name}({', '.join(heads)}):"]
    for argument, values in unpacked:
        if values:
            inside = ", ".join("_" if value is None else value.name for value in values)
            body.append(f"    {inside}{',' * (len(values) == 1)} = {argument}")
            body.append(f"    del {argument}")
    for i, each in enumerate(lines):
        body.append(f"    {each.text}")
        if i in ends and i + 1 < len(lines):
            body.append(f"    del {', '.join(ends[i])}")
    body.append(f"    return {returned}")
    return "\n".join(body) + "\n"


def fused(calls: Sequence[Call], wanted: Sequence[Value]) -> list[Call]:
    """A product with a transposed view as one ``linear``; views that only those read are gone."""
    transposed = {
        call.outs[0]: call.args[0] for call in calls if call.target is aten.t.default and call.outs
    }
    found = []
    for call in calls:
        if call.target is aten.mm.default and call.args[1] in transposed and not call.kwargs:
            x, w = call.args
            call = _linear(call, x, transposed[w], None)
        elif call.target is aten.addmm.default and call.args[2] in transposed:
            bias, x, w = call.args[:3]
            if not call.kwargs and len(call.args) == 3 and len(bias.shape) == 1:
                call = _linear(call, x, transposed[w], bias)
        found.append(call)
    return needed(found, wanted)


def _linear(call: Call, x: Value, w: Value, bias: Value | None) -> Call:
    args = (x, w) if bias is None else (x, w, bias)
    return Call(torch._C._nn.linear, args, {}, call.outs, call.single, reads=list(args))


def line(call: Call, names: Names) -> Line:
    """One call as text."""
    written = SHORT[call.target](call, names) if call.target in SHORT else None
    if written is None:
        target, name = call.target, getattr(call.target, "__name__", "call")
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.partition("::")[2]
            target = target._op
        arguments = [names.text(each) for each in call.args]
        arguments += [f"{key}={names.text(each)}" for key, each in call.kwargs.items()]
        written = f"{names.of(target, name)}({', '.join(arguments)})"
    outs = ["_" if out is None else out.name for out in call.outs]
    if any(out is not None for out in call.outs):
        left = outs[0] if call.single else f"{', '.join(outs)}{',' * (len(outs) == 1)}"
        written = f"{left} = {written}"
    return Line(written, call.reads, call)


Writer = Callable[[Call, Names], "str | None"]


def _method(name: str) -> Writer:
    """``x.name(...)``, where nothing is given by name."""

    def write(call: Call, names: Names) -> str | None:
        if call.kwargs:
            return None
        first, *rest = call.args
        return f"{names.text(first)}.{name}({', '.join(map(names.text, rest))})"

    return write


def _named(name: str, keys: tuple[str, ...] = ()) -> Writer:
    """``x.name(..., key=...)``: all keywords are those of the method."""

    def write(call: Call, names: Names) -> str | None:
        if not set(call.kwargs) <= set(keys):
            return None
        first, *rest = call.args
        given = [*map(names.text, rest), *(f"{k}={names.text(v)}" for k, v in call.kwargs.items())]
        return f"{names.text(first)}.{name}({', '.join(given)})"

    return write


def _function(target: Any, keys: tuple[str, ...] = ()) -> Writer:
    def write(call: Call, names: Names) -> str | None:
        if not set(call.kwargs) <= set(keys):
            return None
        given = [*map(names.text, call.args)]
        given += [f"{k}={names.text(v)}" for k, v in call.kwargs.items()]
        return f"{names.of(target, target.__name__)}({', '.join(given)})"

    return write


def _scaled_sum(name: str) -> Writer:
    """``addmm_`` and its like, their factors left out where they are 1."""

    def write(call: Call, names: Names) -> str:
        given = [*map(names.text, call.args[1:])]
        given += [f"{key}={names.text(value)}" for key, value in call.kwargs.items() if value != 1]
        return f"{names.text(call.args[0])}.{name}({', '.join(given)})"

    return write


def _addmm(call: Call, names: Names) -> str:
    given = [*map(names.text, call.args)]
    given += [f"{key}={names.text(value)}" for key, value in call.kwargs.items() if value != 1]
    return f"{names.of(_direct.addmm, 'addmm')}({', '.join(given)})"


def _slice(call: Call, names: Names) -> str | None:
    given: tuple[Any, ...] = (*call.args, *(None, 0, None, None, 1)[len(call.args) :])
    x, dim, start, _, step = given
    if call.kwargs or step != 1 or not isinstance(start, int) or start < 0:
        return None
    length = call.outs[0].shape[dim] if call.outs[0] is not None else 0
    return f"{x.name}.narrow({dim}, {start}, {length})"


def _to(call: Call, names: Names) -> str | None:
    x, out = call.args[0], call.outs[0]
    if set(call.kwargs) != {"dtype"} or out is None or out.dtype is x.dtype:
        return None  # of its own dtype ``to`` makes no copy
    return f"{names.text(x)}.to({names.text(call.kwargs['dtype'])})"


USUAL = {"pin_memory": (False, None), "layout": (None, torch.strided), "memory_format": (None,)}


def _unusual(call: Call) -> dict[str, Any]:
    """The keywords of an allocation that say more than its defaults."""
    return {k: v for k, v in call.kwargs.items() if v is not None and v not in USUAL.get(k, ())}


def _new_empty(call: Call, names: Names) -> str | None:
    x, size = call.args
    how = _unusual(call)
    if not size or not how.keys() <= {"dtype"}:
        return None
    given = [*map(names.text, size), *(f"{key}={names.text(value)}" for key, value in how.items())]
    return f"{names.text(x)}.new_empty({', '.join(given)})"


def _empty_like(call: Call, names: Names) -> str | None:
    how = _unusual(call)
    if not how.keys() <= {"dtype"}:
        return None
    given = [*map(names.text, call.args), *(f"{k}={names.text(v)}" for k, v in how.items())]
    return f"{names.of(_direct.empty_like, 'empty_like')}({', '.join(given)})"


SHORT: dict[Any, Writer] = {
    aten.mm.default: _method("mm"),
    aten.mm.out: _function(_direct.mm, ("out",)),
    aten.bmm.default: _method("bmm"),
    aten.t.default: _method("t"),
    aten.view.default: _method("view"),
    aten._unsafe_view.default: _method("view"),
    aten.transpose.int: _method("transpose"),
    aten.permute.default: _method("permute"),
    aten.unsqueeze.default: _method("unsqueeze"),
    aten.select.int: _method("select"),
    aten.unbind.int: _method("unbind"),
    aten.slice.Tensor: _slice,
    aten.split_with_sizes.default: _method("split_with_sizes"),
    aten.as_strided.default: _method("as_strided"),
    aten.addmm_.default: _scaled_sum("addmm_"),
    aten.baddbmm_.default: _scaled_sum("baddbmm_"),
    aten.add_.Tensor: _named("add_", ("alpha",)),
    aten.add.Tensor: _named("add", ("alpha",)),
    aten.mul_.Tensor: _method("mul_"),
    aten.mul.Tensor: _method("mul"),
    aten.mul_.Scalar: _method("mul_"),
    aten.mul.Scalar: _method("mul"),
    aten.copy_.default: _method("copy_"),
    aten.clone.default: _named("clone", ("memory_format",)),
    aten._to_copy.default: _to,
    aten.cat.default: _function(_direct.cat),
    aten.addmm.default: _addmm,
    aten.new_empty.default: _new_empty,
    aten.empty_like.default: _empty_like,
    aten.native_layer_norm.default: _function(_direct.native_layer_norm),
    aten.gelu.default: _function(torch._C._nn.gelu, ("approximate",)),
    aten.silu.default: _function(torch._C._nn.silu),
    aten.sigmoid.default: _method("sigmoid"),
    aten.sum.dim_IntList: _method("sum"),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _function(
        _direct._scaled_dot_product_flash_attention_for_cpu
    ),
}
