"""Calls that a program makes once, several as one, or within another.

Those that read an operation's inputs alone go where the first of them stands. A target says by
``keeps`` that its calls may be so, and whether backward may have what forward's made: then backward
does not repeat it. What backward no longer reads of the inputs is saved all the same, so that torch
still sees a write in between.

Those whose results nobody reads for a while go where the last of them stands: a target says by
``waits`` that its calls may.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fused_lora.programs.emit import needed, replaced, shows
from fused_lora.programs.record import Call, Value


class Preparation(Protocol):
    """A target whose arguments are tuples, an entry for each piece; it writes new memory."""

    keeps: bool  # whether what it writes may be kept for backward
    kind: Hashable  # calls of one kind may be one

    def joined(self, others: Sequence[Any]) -> Any:
        """The target of one call with the pieces of all."""


class Waiting(Protocol):
    """A target of one argument, a tuple of each piece's tensors in turn."""

    waits: bool  # whether its calls may be made later, as one
    kind: Hashable  # with those of this kind

    def joined(self, others: Sequence[Any]) -> Any | None:
        """The target of one call with the pieces of all; None where one cannot hold them."""


class Shared(NamedTuple):
    """Both directions, and the inputs that backward depends on without reading them."""

    ahead: list[Call]
    back: list[Call]
    watched: list[Value]


@dataclass(eq=False)
class _Found:
    call: Call
    before: list[Call]  # what it needs: views of inputs, and the memory that it writes


def shared(ahead: Sequence[Call], back: Sequence[Call], inputs: Sequence[Value]) -> Shared:
    """``ahead`` and ``back``, each with one such call of a kind as far as there can be one."""
    given = {value.storage for value in inputs}
    made: dict[Any, Call] = {}
    ahead = _once(ahead, _found(ahead, given), made)
    kept = {key: call for key, call in made.items() if call.target.keeps}  # type: ignore[attr-defined]
    again = _found(back, given)
    reads = {v.storage for each in again if _key(each.call) in kept for v in each.call.reads}
    back = _once(back, again, kept)
    watched = [value for value in inputs if value.storage in reads]
    return Shared(_late(_carried(ahead, given)), _late(_carried(back, given)), watched)


def _found(calls: Sequence[Call], given: set[int]) -> list[_Found]:
    """Those that depend on the inputs alone, whose memory is ``given``."""
    found = []
    for i, call in enumerate(calls):
        if getattr(call.target, "keeps", None) is None:
            continue
        before = needed(calls[:i], call.reads)
        known = given | {value.storage for value in call.writes}
        if all(
            not each.writes
            and all(out is None or out.storage in known for out in each.outs)
            and all(value.storage in known for value in each.reads)
            for each in (*before, Call(call.target, (), {}, [], False, reads=call.reads))
        ):
            found.append(_Found(call, before))
    return found


def _once(calls: Sequence[Call], found: Sequence[_Found], made: dict[Any, Call]) -> list[Call]:
    """``calls`` without those that repeat one of ``made``, to which they add; the rest joined."""
    stands: dict[Value, Value] = {}
    kinds: dict[Any, list[_Found]] = {}
    for each in found:
        same = made.setdefault(_key(each.call), each.call)
        if same is each.call:
            kinds.setdefault(same.target.kind, []).append(each)  # type: ignore[attr-defined]
        else:
            stands |= zip(each.call.writes, same.writes, strict=True)
    gone = {id(each.call) for each in found}
    joint: dict[int, list[Call]] = {}  # in the place of the first of a kind
    for first, *others in kinds.values():
        moved = {id(call): call for each in others for call in each.before}
        gone |= moved.keys()
        whole = _joined([first.call, *(each.call for each in others)])
        assert whole is not None, first.call.target
        joint[id(first.call)] = [*moved.values(), whole]
    written: list[Call] = []
    for call in calls:
        written += joint.get(id(call), [] if id(call) in gone else [call])
    return [replaced(call, stands) for call in _in_order(written)]


def _carried(calls: Sequence[Call], given: set[int]) -> list[Call]:
    """``calls``, such a call done by a launch before it that has room for its arguments."""
    for i, carrier in enumerate(calls):
        if getattr(carrier.target, "room", None) is None:
            continue
        for each in _found(calls, given):
            after = list(calls[i + 1 :])
            if each.call in after and (both := _with(carrier, each.call)):
                moved = [call for call in each.before if call in after]
                after = [call for call in after if call is not each.call and call not in moved]
                return [*calls[:i], *moved, both, *_carried(after, given)]
    return list(calls)


def _with(carrier: Call, other: Call) -> Call | None:
    """One call that does both; None where the carrier cannot."""
    target = carrier.target.carrying(other.target)  # type: ignore[attr-defined]
    if target is None:
        return None
    args = list(carrier.args)
    first = carrier.target.room  # type: ignore[attr-defined]
    args[first : first + len(other.args)] = other.args
    writes, reads = (*carrier.writes, *other.writes), [*carrier.reads, *other.reads]
    return Call(target, tuple(args), {}, carrier.outs, carrier.single, writes, False, reads)


def _in_order(calls: Sequence[Call]) -> list[Call]:
    """Each call once, the first time."""
    return list({id(call): call for call in calls}.values())


def _late(calls: Sequence[Call]) -> list[Call]:
    """``calls``, those that may wait joined with the next of their kind for which they can."""
    placed: list[Call | None] = []
    waiting: dict[Hashable, int] = {}  # where the last of a kind stands, all before it joined
    for call in calls:
        waiting = {kind: i for kind, i in waiting.items() if not _bars(call, placed[i])}
        if getattr(call.target, "waits", False):
            kind = call.target.kind  # type: ignore[attr-defined]
            before = waiting.get(kind)
            if before is not None and (both := _joined([placed[before], call])):
                placed[before], call = None, both
            waiting[kind] = len(placed)
        placed.append(call)
    return [call for call in placed if call is not None]


def _bars(call: Call, waiting: Call | None) -> bool:
    """Whether ``waiting`` must come before ``call``: one of them writes what the other uses."""
    if call.view or waiting is None:
        return False
    written = {value.storage for value in call.writes}
    used = written | {value.storage for value in call.reads}
    uses = any(value.storage in used for value in waiting.writes)
    return uses or any(value.storage in written for value in waiting.reads)


def _joined(calls: Sequence[Any]) -> Call | None:
    first, *others = calls
    if not others:
        return first
    target = first.target.joined([call.target for call in others])
    if target is None:
        return None
    args = tuple(sum(parts, ()) for parts in zip(*(call.args for call in calls), strict=True))
    writes = tuple(value for call in calls for value in call.writes)
    reads = [value for call in calls for value in call.reads]
    return Call(target, args, {}, first.outs, first.single, writes, False, reads)


def _key(call: Call) -> Any:
    """What two calls have in common that make the same of the same memory."""
    new = {id(value) for value in call.writes}

    def of(argument: Any) -> Any:
        if isinstance(argument, Value):
            return argument.shape if id(argument) in new else shows(argument)
        return tuple(map(of, argument)) if isinstance(argument, tuple) else argument

    return call.target.kind, of(call.args)  # type: ignore[attr-defined]
