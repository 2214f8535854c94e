"""Calls that read an operation's inputs alone: made once, several as one, or within another.

A target says by ``keeps`` that its calls may be so, and whether backward may have what forward's
made: then backward does not repeat it. What backward no longer reads of the inputs is saved all the
same, so that torch still sees a write in between.
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
    """``ahead`` and ``back``, each with one such call of a kind, where the first of them stood."""
    given = {value.storage for value in inputs}
    made: dict[Any, Call] = {}
    ahead = _once(ahead, _found(ahead, given), made)
    kept = {key: call for key, call in made.items() if call.target.keeps}  # type: ignore[attr-defined]
    again = _found(back, given)
    reads = {v.storage for each in again if _key(each.call) in kept for v in each.call.reads}
    back = _once(back, again, kept)
    watched = [value for value in inputs if value.storage in reads]
    return Shared(_carried(ahead, given), _carried(back, given), watched)


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
        joint[id(first.call)] = [*moved.values(), _joined([first, *others])]
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


def _joined(found: Sequence[_Found]) -> Call:
    first, *others = (each.call for each in found)
    if not others:
        return first
    args = tuple(sum(parts, ()) for parts in zip(*(each.call.args for each in found), strict=True))
    writes = tuple(value for each in found for value in each.call.writes)
    reads = [value for each in found for value in each.call.reads]
    target = first.target.joined([call.target for call in others])  # type: ignore[attr-defined]
    return Call(target, args, {}, first.outs, first.single, writes, False, reads)


def _key(call: Call) -> Any:
    """What two calls have in common that make the same of the same memory."""
    new = {id(value) for value in call.writes}

    def of(argument: Any) -> Any:
        if isinstance(argument, Value):
            return argument.shape if id(argument) in new else shows(argument)
        return tuple(map(of, argument)) if isinstance(argument, tuple) else argument

    return call.target.kind, of(call.args)  # type: ignore[attr-defined]
